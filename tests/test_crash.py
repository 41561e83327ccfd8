"""Power is lost, or the process killed, at any point of storing: what was stored is whole, the rest was never there.

More than the usual figures: ALAYA_TIERS_CRASH_IMAGES=200 (random images for each operation) and ALAYA_TIERS_KILLS=1000.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor

from alaya_tiers.blocks import PAGE
from alaya_tiers.cache import Session
from alaya_tiers.config import Settings
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import AlayaError, StoreError
from alaya_tiers.identity import Identity
from alaya_tiers.seams import SystemDisk
from tests.crash import CrashDisk, Image

ROOT = "/store"
LAYERS, HEADS, DIM, BLOCK = 2, 1, 8, 4
SETTINGS = Settings(
    device_budget=8 * PAGE,
    host_budget=8 * PAGE,
    block_tokens=BLOCK,
    segment_tokens=4 * BLOCK,
    io="buffered",
    io_threads=2,
)
WHO = Identity(model="m", weights="w", dtype="float32", block_tokens=BLOCK, segment_tokens=4 * BLOCK, lossy=False)
IMAGES = int(os.environ.get("ALAYA_TIERS_CRASH_IMAGES", "3"))
KILLS = int(os.environ.get("ALAYA_TIERS_KILLS", "12"))


def kv(tokens: np.ndarray[Any, Any], layer: int) -> Tensor:
    """K and V that only these tokens have, [2, 1, heads, n, dim]: of each the hash of it and all before."""
    state, rows = layer, []
    for token in tokens.tolist():
        state = xxhash.xxh3_64_intdigest(f"{state} {token}".encode())
        rows.append(state % 100_003)
    base = torch.tensor(rows, dtype=torch.float32)
    return torch.stack([base + n for n in range(2 * HEADS * DIM)], -1).view(-1, 2, 1, HEADS, DIM).permute(1, 2, 3, 0, 4)


class Base:
    """Contexts on some disk, and texts that go into it."""

    def __init__(self, disk: Any, path: str = ROOT) -> None:
        self.engine = Engine(SETTINGS, path, {"some": "model"}, disk=disk)
        try:
            self.contexts = Contexts(self.engine)
        except BaseException:
            self.engine.close()
            raise

    def session(self, tokens: list[int]) -> tuple[Session, int]:
        """Everything of these tokens, what is stored of it reused."""
        ids = np.array(tokens)
        names, known = self.contexts.match(WHO.root(), ids)
        session = self.contexts.open([names], known, None, torch.device("cpu"))
        for layer in range(LAYERS):
            if known < ids.size:
                k, v = kv(ids, layer)[..., known:, :]
                session.update(layer, k, v)
        return session, known

    def store(self, tokens: list[int]) -> str:
        session, _ = self.session(tokens)
        (name,) = self.contexts.store(session, np.array([tokens]), WHO)
        session.clear()
        return name

    def close(self) -> None:
        self.engine.close()


TEXTS = [list(range(1, 22)), list(range(1, 19)) + [50, 51, 52, 53, 54], [9] * 7, list(range(1, 30))]
"""More than a segment and a tail; one that parts from it inside a block; less than two blocks; one that goes on."""


def scenario(disk: Any, acked: Callable[[dict[str, list[int]]], None], path: str = ROOT) -> None:
    """Stores and a delete, in two openings. acked: told what is stored, whenever that has changed for certain."""
    known: dict[str, list[int]] = {}
    base = Base(disk, path)
    for tokens in TEXTS[:2]:
        known[base.store(tokens)] = tokens
        acked(dict(known))
    base.close()
    base = Base(disk, path)
    for tokens in TEXTS[2:]:
        known[base.store(tokens)] = tokens
        acked(dict(known))
    first = next(iter(known))
    acked({name: tokens for name, tokens in known.items() if name != first})
    base.contexts.delete(first)
    base.close()


def survey(image: Image) -> dict[str, list[int]]:
    """What a new opening finds, every byte of it compared; AssertionError where something is not whole."""
    disk = CrashDisk(image)
    try:
        base = Base(disk)
    except AlayaError as error:
        raise AssertionError(f"it does not open: {error!r}") from error
    try:
        found = {name: base.contexts.tokens(name).tolist() for name in base.contexts.manifest.contexts}
        damage = base.contexts.verify()
        assert not damage, f"{len(damage)} damages, the first {damage[0]}"
        for name in found:
            check_kv(base, name)
        manifest = base.contexts.manifest
    except StoreError as error:
        raise AssertionError(f"what is listed cannot be read: {error!r}") from error
    finally:
        base.close()
    left = disk.image(random.Random(0), 1)
    arrays = {path.partition("/c/0/0/0")[0].removeprefix(f"{ROOT}/") for path in left if path.endswith("/c/0/0/0")}
    assert arrays == set(manifest.files), "files that nothing names were left, or some are missing"
    assert not [path for path in left if path.endswith((".partial", "probe"))]
    for path in left if manifest.generation else ():
        if path.endswith("zarr.json"):
            for folder in Path(path).parents[: -len(Path(ROOT).parts) + 1 or None]:
                check_metadata(left, folder)
    return found


def check_metadata(image: Image, folder: Path) -> None:
    """Any Zarr reader gets through here."""
    data = image.get(str(folder / "zarr.json"))
    assert data is not None, "a group without metadata"
    try:
        assert json.loads(data)["node_type"] in ("group", "array")
    except ValueError:
        raise AssertionError("torn metadata") from None


def check_kv(base: Base, name: str) -> None:
    ids, parts = base.contexts.tokens(name), [chunk for _, chunk in base.contexts.read(name)]
    for layer in range(LAYERS):
        for n in range(2):
            assert torch.cat([part[layer][n] for part in parts], 2).equal(kv(ids, layer)[n]), "other keys or values"


class Recorder:
    """Images after every operation, each with what had been acknowledged then; the same image only once."""

    def __init__(self, images: int, seed: int = 0) -> None:
        self.rng, self.images = random.Random(seed), images
        self.acked: dict[str, list[int]] = {}
        self.found: dict[int, tuple[dict[str, list[int]], Image]] = {}
        self.operations = 0

    def __call__(self, disk: CrashDisk) -> None:
        self.operations += 1
        for share in (0.0, 1.0, *(self.rng.choice((0.2, 0.5, 0.8)) for _ in range(self.images))):
            image = disk.image(self.rng, share)
            key = hash((tuple(sorted(image.items())), tuple(self.acked)))
            self.found.setdefault(key, (self.acked, image))

    def acknowledge(self, known: dict[str, list[int]]) -> None:
        self.acked = known


def recorded(images: int, skip: int | None = None, upto: int | None = None) -> tuple[Recorder, CrashDisk]:
    """The scenario on a disk without one of its barriers; upto: acknowledged contexts after which it ends."""
    disk, recorder = CrashDisk(skip=skip), Recorder(images)
    disk._folder(ROOT)
    disk.root.sync()  # the directory itself is the user's

    class Enough(Exception):
        pass

    def acked(known: dict[str, list[int]]) -> None:
        recorder.acknowledge(known)
        if upto is not None and len(known) >= upto:
            recorder(disk)
            raise Enough

    disk.after_each = recorder
    try:
        scenario(disk, acked)
    except Enough:
        disk.after_each = lambda _: None
    return recorder, disk


def violations(recorder: Recorder) -> list[str]:
    """Every image in which what was acknowledged is not whole, or something else is."""
    texts, problems = [tuple(text) for text in TEXTS], []
    for acked, image in recorder.found.values():
        try:
            found = survey(image)
            lost = acked.keys() - found.keys()
            assert not lost, f"{len(lost)} acknowledged contexts are lost"
            assert all(tuple(tokens) in texts for tokens in found.values()), "half a context"
        except AssertionError as error:
            problems.append(str(error).splitlines()[0])
    return problems


@pytest.mark.slow
@pytest.mark.timeout(600 if IMAGES < 10 else 36_000)
def test_after_a_crash_at_any_operation_what_was_stored_is_whole() -> None:
    recorder, _ = recorded(IMAGES)
    began = time.monotonic()
    problems = violations(recorder)
    print(f"{recorder.operations} operations, {len(recorder.found)} images, {time.monotonic() - began:.1f} s")
    assert recorder.operations > 100
    assert not problems, f"{len(problems)} of {len(recorder.found)}: {problems[0]}"


def barriers() -> list[str]:
    """Every sync and rename of the first store into a new directory."""
    _, disk = recorded(0, upto=1)
    return disk.barriers


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_barrier_of_a_commit_is_needed() -> None:
    """The images have teeth: without any one sync, or the rename, some of them lose or tear what was acknowledged."""
    for number, what in enumerate(barriers()):
        recorder, disk = recorded(8, skip=number, upto=1)
        what = disk.barriers[number]
        assert violations(recorder), f"nobody notices that {what!r} is missing"
