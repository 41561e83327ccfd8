"""Tenants in one store: no name of one is ever another's, nothing tells one what another has stored, no bytes are left.

More than usual: ALAYA_TIERS_PAIRS=1000000 (pairs of keys that nearly collide), ALAYA_TIERS_PROBES=2000 (timed, of each
length).
"""

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alaya_tiers.config import Settings
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.identity import Identity, segment_name
from alaya_tiers.seams import SystemDisk
from tests.test_crash import WHO, Base
from tests.test_db import opened
from tests.tiny import prompt

PAIRS = int(os.environ.get("ALAYA_TIERS_PAIRS", "5000"))
PROBES = int(os.environ.get("ALAYA_TIERS_PROBES", "0"))
LENGTHS = (8, 32, 64, 128, 256)
STORED = 20
"""Texts that the victim has, and as many that nobody has."""

Key = tuple[Identity, str, tuple[tuple[int, ...], ...]]
"""Who computed it, the tenant, and tokens cut into segments."""


def name(key: Key) -> str:
    who, tenant, parts = key
    found = who.root(tenant)
    for part in parts:
        found = segment_name(found, np.array(part, np.int64))
    return found


def near(rng: random.Random, key: Key) -> Key:
    """A key that says almost the same."""
    who, tenant, parts = key
    match rng.randrange(9):
        case 0:  # text goes over from one field to the next
            cut = rng.randrange(len(who.model) + 1)
            return replace(who, model=who.model[:cut], weights=who.model[cut:] + who.weights), tenant, parts
        case 1:
            return replace(who, weights=who.weights + tenant), "", parts
        case 2:
            return replace(who, block_tokens=who.segment_tokens, segment_tokens=who.block_tokens), tenant, parts
        case 3:
            return replace(who, lossy=not who.lossy), tenant, parts
        case 4:  # the tokens are cut elsewhere
            flat = [t for part in parts for t in part]
            cut = rng.randrange(len(flat) + 1)
            return who, tenant, (tuple(flat[:cut]), tuple(flat[cut:]))
        case 5:  # the bytes of two tokens in other places
            flat = [t << 8 if t < 1 << 50 else t >> 8 for part in parts for t in part]
            return who, tenant, (tuple(flat), *parts[1:])
        case 6:
            return who, tenant + rng.choice(["\0", " ", "a", tenant]), parts
        case 7:
            return replace(who, dtype=rng.choice(["float16", "bfloat16", who.dtype + "\0"])), tenant, parts
        case _:
            return who, tenant, (*parts[:-1], (*parts[-1], rng.choice([0, 1, -1])))


def test_no_two_keys_have_one_name() -> None:
    """Pairs made to collide if fields ran into each other, were truncated, or left out."""
    rng, tried = random.Random(0), 0
    while tried < PAIRS:
        text = ["".join(rng.choices("ab\0,=1", k=rng.randrange(5))) for _ in range(4)]
        sizes = [rng.choice([1, 16, 61, 161]) for _ in range(2)]
        who = Identity(
            model=text[0], weights=text[1], dtype=text[2], block_tokens=sizes[0], segment_tokens=sizes[1], lossy=False
        )
        ids = [0, 1, 255, 256, 1 << 16, 1 << 40, -1]
        parts = tuple(tuple(rng.choices(ids, k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4)))
        key: Key = (who, text[3], parts)
        other = near(rng, key)
        assert (name(key) == name(other)) == (key == other), f"{key} and {other}"
        tried += key != other


def area(hits: list[float], misses: list[float]) -> float:
    """Of the curve by which an attacker tells two kinds of times apart: 0.5 is a guess."""
    order = np.argsort(np.concatenate([hits, misses]), kind="stable")
    ranks = np.empty(order.size)
    ranks[order] = np.arange(1, order.size + 1)
    return float((ranks[: len(hits)].sum() - len(hits) * (len(hits) + 1) / 2) / (len(hits) * len(misses)))


def probes(path: Path, length: int, count: int) -> float:
    """How well a tenant can tell by time which prompts of so many tokens another tenant has stored."""
    rng = np.random.default_rng(length)
    texts = rng.integers(1, 97, (2 * STORED, length))
    times: tuple[list[float], list[float]] = ([], [])
    settings = Settings(device_budget=1 << 20, host_budget=1 << 20, block_tokens=4, segment_tokens=64, io_threads=2)
    who = replace(WHO, segment_tokens=64)
    contexts = Contexts(Engine(settings, str(path), {"some": "model"}))
    session = contexts.open([[]], 0, None, torch.device("cpu"))
    session.update(0, torch.zeros(STORED, 1, length, 8), torch.zeros(STORED, 1, length, 8))
    contexts.store(session, texts[:STORED], who, "victim")
    session.clear()
    assert contexts.match(who.root("victim"), texts[0])[1] == length
    root = who.root("attacker")
    for i in (rng.permutation(count) % len(texts)).tolist():
        began = time.perf_counter()
        found = contexts.find(root, texts[i], "recompute")
        times[i >= STORED].append(time.perf_counter() - began)
        assert found == ([], 0)
    contexts.engine.close()
    return area(*times)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.alone
@pytest.mark.parametrize("length", LENGTHS if PROBES else LENGTHS[-1:])
def test_times_tell_nothing_about_another_tenant(tmp_path: Path, length: int) -> None:
    found = probes(tmp_path, length, PROBES or 400)
    print(f"{length} tokens: area {found:.3f}")
    assert abs(found - 0.5) <= (0.05 if PROBES else 0.15)


def test_a_miss_of_another_tenant_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why times tell nothing: what is done does not depend on what others have."""
    with opened(tmp_path) as db:
        contexts, read = db._contexts, list[str]()
        session = contexts.open([[]], 0, None, torch.device("cpu"))
        for layer in range(2):
            session.update(layer, torch.zeros(1, 1, 90, 8), torch.zeros(1, 1, 90, 8))
        contexts.store(session, prompt().numpy(), WHO, "victim")
        monkeypatch.setattr(contexts.shelf, "record", lambda name: read.append(name))
        monkeypatch.setattr(contexts._prefixes, "record", lambda name: read.append(name))
        assert contexts.match(WHO.root("attacker"), prompt()[0].numpy()) == ([], 0)
        assert contexts.match(WHO.root(), prompt()[0].numpy()) == ([], 0)
        assert not read


def test_nothing_of_another_tenant_is_left_in_the_room_between_blocks(tmp_path: Path) -> None:
    """Blocks do not fill their pages, and their memory was another's before."""
    settings = Settings(
        device_budget=1 << 19, host_budget=1 << 18, block_tokens=16, segment_tokens=64, io_threads=2, io="buffered"
    )
    base = Base(SystemDisk(), str(tmp_path / "store"), settings=settings)
    secret, who = 1234.5678, replace(WHO, block_tokens=16, segment_tokens=64)

    def store(tenant: str, value: float) -> str:
        session = base.contexts.open([[]], 0, None, torch.device("cpu"))
        for layer, dim in enumerate((24, 40)):
            session.update(layer, *(torch.full((1, 1, 517, dim), value) for _ in range(2)))
        (made,) = base.contexts.store(session, np.full((1, 517), 3), who, tenant)
        session.clear()
        return made

    for _ in range(2):
        base.contexts.delete(store("one", secret))
    store("other", 1.0)
    files = [p for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert len([p for p in files if p.parts[-4:] == ("c", "0", "0", "0")]) == 18
    assert not [p for p in files if np.float32(secret).tobytes() in p.read_bytes()]
    base.close()
