"""An operation fails, or the process is killed, at any point: what was stored is whole, the rest was never there.

More than the usual figures: ALAYA_TIERS_KILLS=1000. A loss of power is in test_images.py.
"""

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
import time
import traceback
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
from alaya_tiers.errors import IOFailed, StoreError
from alaya_tiers.identity import Identity, model_digest
from alaya_tiers.seams import SystemDisk
from alaya_tiers.snapshot import Snapshot
from tests.crash import CrashDisk

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
MODEL = {"some": "model"}
WHO = Identity(
    model=model_digest(MODEL), weights="w", dtype="float32", block_tokens=BLOCK, segment_tokens=4 * BLOCK, lossy=False
)
IMAGES = int(os.environ.get("ALAYA_TIERS_CRASH_IMAGES", "3"))
KILLS = int(os.environ.get("ALAYA_TIERS_KILLS", "200"))


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

    def __init__(self, disk: Any, path: str = ROOT, *, read_only: bool = False, settings: Settings = SETTINGS) -> None:
        snapshot = Snapshot(path, {"some": "model"}, disk) if read_only else None
        self.engine = Engine(settings, None if read_only else path, MODEL, disk=disk)
        try:
            self.contexts = Contexts(self.engine, snapshot)
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
        self.contexts.close()


TEXTS = [list(range(1, 22)), [*range(1, 19), 50, 51, 52, 53, 54], [9] * 7, list(range(1, 30))]
"""More than a segment and a tail; one that parts from it inside a block; less than two blocks; one that goes on."""


def check_kv(base: Base, name: str) -> None:
    ids, parts = base.contexts.tokens(name), [chunk for _, chunk in base.contexts.read(name)]
    for layer in range(LAYERS):
        for n in range(2):
            assert torch.cat([part[layer][n] for part in parts], 2).equal(kv(ids, layer)[n]), "other keys or values"


def test_the_real_disk_syncs_and_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the images take for granted: ``sync`` syncs, and ``save`` syncs a file before it has its name."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def moved(old: str, new: str) -> None:
        calls.append(("replace", new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", moved)
    disk, path = SystemDisk(), str(tmp_path / "file")
    asyncio.run(disk.save(path, b"x"))
    assert calls == [("fsync", f"{path}.partial"), ("replace", path), ("fsync", str(tmp_path))]
    calls.clear()
    disk.sync(path)
    disk.sync(str(tmp_path))
    disk.rename(path, f"{path}2")
    assert calls == [("fsync", path), ("fsync", str(tmp_path)), ("replace", f"{path}2")]


# ---------------------------------------------------------------------- errors


def failing(number: int, error: int, *, always: bool) -> bool:
    """Store under a fault at the ``number``-th operation; whether it struck. What was stored before stays whole."""
    disk = CrashDisk()
    base = Base(disk)
    known = {base.store(TEXTS[0]): TEXTS[0]}
    told = list[int | None]()
    disk.operations, disk.fail_at, disk.always, disk.error = 0, number, always, error
    try:
        name = base.store(TEXTS[1])
        known[name] = TEXTS[1]
    except StoreError as failure:
        told.append(failure.errno)
    assert set(told) <= {error}
    disk.fail_at = -1
    for name, tokens in known.items():
        assert base.contexts.tokens(name).tolist() == tokens
        check_kv(base, name)
    assert set(base.contexts.manifest.contexts) == set(known)
    try:
        known[base.store(TEXTS[1])] = TEXTS[1]  # the disk is well again
    except IOFailed:
        assert "sync" in disk.failed, "only a sync that failed leaves a doubt that lasts"
    assert base.engine.mover.ledger.pinned_count() == 0
    base.engine.mover.ledger.check_integrity()
    base.close()
    left = CrashDisk(disk.image(random.Random(0), 1))
    base = Base(left)
    assert base.contexts.manifest.contexts.keys() >= known.keys()
    assert not base.contexts.verify()
    base.close()
    return bool(disk.failed)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("always", [False, True], ids=["once", "persistent"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_any_operation_of_a_store_may_fail(error: int, *, always: bool) -> None:
    number = 0
    while failing(number, error, always=always):
        number += 1
    assert number > 30


# ---------------------------------------------------------------------- processes that are killed

SERVER = """
import torch
torch.set_num_threads(1)
from tests.test_crash import serve
serve()
"""


def life(path: str, seed: int, log: str) -> None:
    """Stores and deletes without end, writing down what is done before it begins and after it ended."""
    rng, base = random.Random(seed), Base(SystemDisk(), path)
    with open(log, "a", encoding="utf-8") as file:

        def say(what: str, name: str) -> None:
            file.write(f"{what} {name}\n")
            file.flush()

        while True:
            contexts = list(base.contexts.manifest.contexts)
            if len(contexts) > 6 or (contexts and rng.random() < 0.2):
                name = rng.choice(contexts)
                say("deleting", name)
                base.contexts.delete(name)
            else:
                shared = TEXTS[0][: rng.randrange(len(TEXTS[0]))]
                say("stored", base.store([*shared, *(rng.randrange(1000) for _ in range(rng.randint(1, 30)))]))


def inspect(path: str, log: str) -> None:
    """AssertionError where something that was stored is not whole, or something is there that was not."""
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    stored = {name for what, name in lines if what == "stored"}
    deleted = {name for what, name in lines if what == "deleting"}
    base = Base(SystemDisk(), path)
    found = set(base.contexts.manifest.contexts)
    assert stored - deleted <= found, "a context that was stored is lost"
    assert not base.contexts.verify()
    for name in found:
        check_kv(base, name)
    base.close()
    arrays = {str(p.parents[3].relative_to(path)) for p in Path(path).rglob("c/0/0/0")}
    assert arrays == set(base.contexts.manifest.files), "leftovers"
    Path(log).write_text("".join(f"stored {name}\n" for name in found))


def forked(work: Callable[[], None]) -> int:
    """The process id of a child that does this."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def serve() -> None:
    """Kills processes that store, one after the other in the same directory, and looks at what they left."""
    kills, path = int(sys.argv[1]), sys.argv[2]
    log, rng = f"{path}.log", random.Random(int(sys.argv[3]))
    Path(log).touch()
    done = 0
    for n in range(kills):
        child = forked(lambda n=n: life(path, n, log))  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 0.06) if n % 10 else rng.uniform(0.0, 0.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"it ended by itself, {n=}"
        done += Path(log).read_text().count("stored")
        _, status = os.waitpid(forked(lambda: inspect(path, log)), 0)
        assert status == 0, f"{n=}"
    print(done)


@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * KILLS)
def test_killed_at_any_moment_nothing_stored_is_lost(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(KILLS), str(tmp_path / "store"), "7"], cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=99 + 2 * KILLS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0, "nothing was ever stored: the test is about nothing"
