"""A replay asks for the very blocks and pages that the engine asked for: step by step, none left to who is faster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alaya_tiers import Settings
from alaya_tiers.cache import Session, Visible
from alaya_tiers.engine import Engine
from alaya_tiers.ledger import Ids
from alaya_tiers.mover import Mover
from alaya_tiers.pages import Pages
from alaya_tiers.tools.recorded import open_recording
from alaya_tiers.tools.replay import Replay
from tests.test_profile import KNOWN

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 64
BLOCK, TOKENS, STEPS = 64, 3072, 6
ROW = 2 * DIM * 4
RUN = HEADS * BLOCK * ROW

PATIENT = replace(KNOWN, memory_copy=1e6)
"""A machine that writes everything behind while it is given the next tokens: as the engine is made to, here."""

Asked = tuple[str, tuple[Any, ...]]


def settings(kv_share: float, **changes: Any) -> Settings:
    base: dict[str, Any] = {
        "mode": "sparse", "alpha": 0.05, "block_tokens": BLOCK, "sink_tokens": BLOCK, "recent_tokens": 2 * BLOCK,
        "device_budget": 3 * LAYERS * RUN, "host_budget": int(kv_share * LAYERS * TOKENS * HEADS * ROW),
        "index_budget": None, "dirty_limit": 0.0, "ssd_rate": 1e9, "page_seconds": 5e-6,
    }  # fmt: skip
    return Settings(**(base | changes))


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Asked]]:
    """What is asked of the disk and of the pool of pages while it lasts, by layer, first token, kv head, page."""
    told: list[Asked] = []

    def names(mover: Mover, ids: Ids) -> list[tuple[int, ...]]:
        book = mover.ledger
        return [(int(book.layer[i]), int(book.start[i]), int(book.head[i])) for i in ids.tolist()]

    fetch, take = Mover._fetch, Pages.take

    async def fetched(self: Mover, ids: Ids) -> Any:
        told.append(("blocks", tuple(sorted(names(self, ids)))))
        return await fetch(self, ids)

    def taken(self: Pages, pages: Ids) -> Any:
        self._reach(pages)
        told.append(("pages", tuple(sorted(_paged(self, pages)))))
        told.append(("pages read", tuple(sorted(_paged(self, pages[self._slot[pages] < 0])))))
        return take(self, pages)

    def _paged(pool: Pages, pages: Ids) -> list[tuple[int, ...]]:
        numbers = (pages % pool.per).tolist()
        return [(*one, n) for one, n in zip(names(pool._mover, pages // pool.per), numbers, strict=True)]

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "_fetch", fetched)
        patch.setattr(Pages, "take", taken)
        yield told


def run(s: Settings, told: list[Asked], trace: Path | None = None) -> list[list[Asked]]:
    """What an engine asks for in each step. Queries come from nowhere, so that no rounding leads elsewhere."""
    make = torch.Generator().manual_seed(1)
    session = Session(Engine(s))
    k, v = torch.randn(2, LAYERS, 1, HEADS, TOKENS + STEPS, DIM, generator=make)
    q = 1.5 * torch.randn(STEPS, LAYERS, 1, HEADS * GROUP, 1, DIM, generator=make)

    def work(say: Callable[[str], None]) -> list[list[Asked]]:
        say("prompt")
        for start in range(0, TOKENS, BLOCK):
            for layer in range(LAYERS):
                _put(session, layer, k[layer, :, :, start : start + BLOCK], v[layer, :, :, start : start + BLOCK])
        session.build_index()
        say("decode")
        told.clear()
        steps = []
        for step in range(STEPS):
            at = slice(TOKENS + step, TOKENS + step + 1)
            for layer in range(LAYERS):
                _put(session, layer, k[layer, :, :, at], v[layer, :, :, at])
                session.attention(layer, q[step, layer], [Visible.all(TOKENS + step + 1, 1)], DIM**-0.5)
            steps.append(told.copy())
            told.clear()
        return steps

    try:
        if trace is None:
            return work(lambda name: None)
        with session.record(trace) as recorder:
            return work(recorder.mark)
    finally:
        session.engine.close()


def _put(session: Session, layer: int, k: Tensor, v: Tensor) -> None:
    """Until its codes are made and all is written: what is held or unwritten when room is wanted would be chance."""
    session.update(layer, k, v)
    engine = session.engine
    assert engine.partitions is not None
    engine.partitions.wait()
    while True:
        with engine.mover.lock:
            dirty, unsafe = engine.mover.ledger.dirty_ids(), engine.mover.ledger.unsafe_count()
        if not unsafe:
            return
        engine.write_out(dirty)  # none, while others are being written


def replayed(trace: Path, s: Settings, told: list[Asked]) -> list[list[Asked]]:
    """The same of a replay."""
    steps: list[list[Asked]] = []

    def seen(replay: Replay, part: Any, read: Any) -> None:
        if part.layer == LAYERS - 1:
            steps.append(told.copy())
            told.clear()

    replay = Replay(open_recording(trace), s, PATIENT, seen)
    ended = replay._end_phase

    def end(name: str) -> None:
        told.clear()
        ended(name)

    replay._end_phase = end  # type: ignore[method-assign]
    replay.run()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"page_share": 0.75, "eviction": "lru"},
        {"page_share": 0.5, "eviction": "s3fifo"},
        {"page_share": 0.0, "eviction": "lru"},
        {"page_share": 0.75, "eviction": "lru", "least_mass": 0.7},
    ],
    ids=str,
)
def test_a_replay_asks_for_the_same_blocks_and_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    trace = tmp_path / "t.jsonl"
    loose = {name: value for name, value in changes.items() if name == "least_mass"}
    run(settings(2.0, read_rate=1e6, **loose), [], trace)  # reading all is dear: every head looks, and is written down
    assert ('"look"' in trace.read_text()) == bool(loose), "heads look several times where they must find much"
    tight = settings(0.25, **changes)
    with asked(monkeypatch) as told:
        engine = run(tight, told)
        again = replayed(trace, tight, told)
    assert len(engine) == len(again) == STEPS
    for step, (one, other) in enumerate(zip(engine, again, strict=True)):
        assert one == other, step
    kinds = {kind for step in engine for kind, some in step if some}
    assert kinds == ({"blocks", "pages", "pages read"} if changes["page_share"] else {"blocks"}), "nothing was tested"
    wanted = sum(len(some) for step in engine for kind, some in step if kind != "pages read")
    assert wanted > 200
