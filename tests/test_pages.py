"""Single pages of cold blocks: the answer is that of blocks in memory, and the pool's book always adds up."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alaya_tiers.blocks import PAGE
from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.depth import USUAL
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ConfigError, StoreCorrupt
from alaya_tiers.pages import NOWHERE, Pages
from alaya_tiers.policies import GUESS, SOURCES
from alaya_tiers.seams import SystemDisk

LAYERS, HEADS, GROUP, DIM, TOKENS = 3, 2, 2, 16, 1500
SIZES: dict[str, Any] = {
    "mode": "sparse", "block_tokens": 64, "segment_tokens": 256, "sink_tokens": 64, "recent_tokens": 64,
    "alpha": 0.05, "read_rate": 1.0, "io": "buffered", "guess": "none",
}  # fmt: skip
BLOCK = 64 * 2 * DIM * 4
ROOMY = {"device_budget": "8MiB", "host_budget": "8MiB"}
TIGHT = {"device_budget": 4 * LAYERS * HEADS * BLOCK, "host_budget": 16 * HEADS * BLOCK}


@pytest.mark.parametrize("setting", ["eviction", "prefetch", "guess"])
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_a_policy_that_nobody_knows_is_refused_before_anything_is_done(mode: str, setting: str) -> None:
    known = {"eviction": "cost, heat, lru", "prefetch": "next, none", "guess": "across, beside, confident"}[setting]
    with pytest.raises(ConfigError, match=f"unknown policy 'clock'; known are {known}"):
        Engine(Settings.from_dict(SIZES | ROOMY | {"mode": mode, setting: "clock"}))


def made(**changes: Any) -> Session:
    """A session of some layers, all coded."""
    session = Session(Engine(Settings.from_dict(SIZES | changes)))
    make = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for start in range(0, TOKENS, 500):
            n = min(500, TOKENS - start)
            k, v = (torch.randn(1, HEADS, n, DIM, generator=make) for _ in range(2))
            session.update(layer, k, v)
    session.build_index()
    return session


def ask(session: Session, step: int, layer: int) -> Tensor:
    make = torch.Generator().manual_seed(1000 * step + layer)
    q = 12 * torch.randn(1, HEADS * GROUP, 1, DIM, generator=make)
    return session.attention(layer, q, [Visible.all(session.length(layer), 1)], 0.25)


def pool(session: Session) -> Pages:
    assert session.engine.pages is not None
    return session.engine.pages


def settled(pages: Pages) -> None:
    """Nothing under way, nothing pinned, and every slot in exactly one place."""
    mover = pages._mover
    for future in list(pages._batches.values()):
        future.exception()
    with mover.lock:
        assert not pages._pins.any()
        assert not pages._coming.any()
        assert mover.ledger.pinned_count() == 0
        held = np.repeat(pages._frames >= 0, pages.per)
        mine = np.flatnonzero(pages._page != NOWHERE)
        assert (pages._slot[pages._page[mine]] == mine).all()
        assert np.count_nonzero(pages._slot >= 0) == mine.size
        free = pages._free[: pages._n_free]
        assert sorted([*free.tolist(), *mine.tolist()]) == np.flatnonzero(held).tolist()
        assert pages._unproved == np.count_nonzero(pages._source)
        mover.ledger.check_integrity()


@pytest.mark.parametrize("eviction", ["lru", "s3fifo", "heat", "cost", "scan"])
def test_cold_or_not_the_answer_is_the_same(eviction: str) -> None:
    roomy, tight = made(**ROOMY), made(**TIGHT, eviction=eviction)
    try:
        for step in range(20):
            for layer in range(LAYERS):
                torch.testing.assert_close(ask(tight, step, layer), ask(roomy, step, layer), rtol=1e-4, atol=1e-5)
        use = pool(tight).use
        assert use.wanted > use.missed > 0
        assert use.evicted > 0
        assert pool(roomy).use.wanted == 0
        assert use.rows <= use.wanted * PAGE
        settled(pool(tight))
        stats = tight.stats().as_dict()["pages"]
        assert 0 < stats["hit_rate"] < 1
        assert stats["read_amplification"] >= 1
    finally:
        roomy.engine.close()
        tight.engine.close()


def test_a_page_that_stays_is_not_read_again() -> None:
    session = made(**TIGHT)
    try:
        ask(session, 0, 0)
        read = session.stats().read_bytes
        for _ in range(5):
            ask(session, 0, 0)
        assert session.stats().read_bytes == read
    finally:
        session.engine.close()


@pytest.mark.parametrize("fixed", [None, 3])
def test_pages_are_read_at_the_depth_that_is_set(fixed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    used, read_pages = set[int](), SystemDisk.read_pages

    def noted(disk: SystemDisk, *arguments: Any) -> Any:
        used.add(arguments[-1])
        return read_pages(disk, *arguments)

    monkeypatch.setattr(SystemDisk, "read_pages", noted)
    session = made(**TIGHT, queue_depth=fixed)
    try:
        ask(session, 0, 0)
        assert pool(session).use.missed
        assert used == {fixed or USUAL}
        assert session.stats().queues.depth == (fixed or USUAL)
    finally:
        session.engine.close()


@pytest.mark.parametrize("guess", sorted(GUESS))
def test_guesses_change_no_answer_and_are_counted(guess: str) -> None:
    still, moving = made(**TIGHT), made(**TIGHT, guess=guess)
    try:
        for step in range(12):
            for layer in range(LAYERS):  # every layer asks about the same: what one wants, the next wants
                torch.testing.assert_close(ask(moving, step % 4, 0), ask(still, step % 4, 0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ask(moving, step, layer), ask(still, step, layer), rtol=1e-4, atol=1e-5)
        use = pool(moving).use
        assert set(use.guessed) <= ({guess} if guess in SOURCES else set(SOURCES))
        assert sum(use.used.values()) <= sum(use.guessed.values())
        assert all(0 <= share <= 1 for share in use.precision.values())
        assert 0 <= use.recall <= 1
        assert bool(use.guessed) == (guess != "none")
    finally:
        moving.engine.close()
        still.engine.close()


def test_the_query_of_the_layer_before_names_what_it_finds_in_the_next() -> None:
    """Here both layers look for the same, so that it finds nearly all."""
    missed = dict[str, int]()
    for guess in ("none", "query"):
        session = made(**TIGHT, guess=guess, prefetch_share=0.9)
        try:
            pages, make = pool(session), torch.Generator().manual_seed(5)
            q = 12 * torch.randn(1, HEADS * GROUP, 1, DIM, generator=make)
            session.attention(0, q, [Visible.all(TOKENS, 1)], 0.25)
            session.engine.submit(pages.idle()).result()
            before = pages.use.missed
            session.attention(1, q, [Visible.all(TOKENS, 1)], 0.25)
            missed[guess] = pages.use.missed - before
            session.engine.submit(pages.idle()).result()
            settled(pages)
        finally:
            session.engine.close()
    assert missed["none"] > 2 * missed["query"]


def test_whole_blocks_get_their_room_back() -> None:
    """Exact attention over everything, where pages have taken what they may."""
    session = made(**TIGHT, page_share=1.0)
    try:
        for step in range(10):
            ask(session, step, step % LAYERS)
        pages = pool(session)
        before = int((pages._frames >= 0).sum())
        q = torch.randn(1, HEADS * GROUP, 40, DIM)  # a chunk of a prompt is attended exactly
        session.attention(0, q, [Visible.all(TOKENS, 40)], 0.25)
        assert before > 0
        settled(pages)
        ask(session, 1, 0)
        settled(pages)
    finally:
        session.engine.close()


def test_what_is_dead_leaves_no_pages() -> None:
    session = made(**TIGHT)
    try:
        for step in range(6):
            ask(session, step, step % LAYERS)
        pages = pool(session)
        assert (pages._page >= 0).any()
        session.crop(0)
        assert not (pages._page >= 0).any()
        settled(pages)
    finally:
        session.engine.close()


def test_a_damaged_page_is_found_and_nothing_is_lost(tmp_path: Path) -> None:
    engine_path = str(tmp_path / "store")
    session = Session(Engine(Settings.from_dict(SIZES | TIGHT), engine_path))
    try:
        make = torch.Generator().manual_seed(0)
        for layer in range(LAYERS):
            session.update(layer, *(torch.randn(1, HEADS, TOKENS, DIM, generator=make) for _ in range(2)))
        session.build_index()
        want = ask(session, 0, 0)
        good = {file: file.read_bytes() for file in tmp_path.rglob("c/0/0/0")}
        for file, data in good.items():
            file.write_bytes(bytes(255 - byte for byte in data))

        def until_it_is_met() -> None:
            for step in range(1, 30):
                ask(session, step, step % LAYERS)

        with pytest.raises(StoreCorrupt, match="damaged"):
            until_it_is_met()
        settled(pool(session))
        for file, data in good.items():
            file.write_bytes(data)
        torch.testing.assert_close(ask(session, 0, 0), want, rtol=1e-4, atol=1e-5)
        settled(pool(session))
    finally:
        session.engine.close()


@pytest.mark.slow
def test_threads_share_pages() -> None:
    """Two sessions on the same blocks, from two threads, in too little room."""
    session = made(**TIGHT, guess="confident")
    expected = [[ask(session, step, layer) for layer in range(LAYERS)] for step in range(15)]
    errors: list[BaseException] = []

    def work(mine: Session) -> None:
        try:
            for step in range(15):
                for layer in range(LAYERS):
                    torch.testing.assert_close(ask(mine, step, layer), expected[step][layer], rtol=1e-4, atol=1e-5)
        except BaseException as error:
            errors.append(error)

    other = Session(session.engine)
    other.layers.update({layer: session.fork(layer) for layer in session.layers})
    threads = [threading.Thread(target=work, args=(one,)) for one in (session, other)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        other.clear()
    finally:
        session.engine.close()
