"""What is known of a row's blocks from one attention to the next holds until something moves, and no longer."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alaya_tiers import AlayaCache
from alaya_tiers.cache import Session
from alaya_tiers.ledger import Ids
from alaya_tiers.partitions import Known, Partitions
from tests.test_sparse import BLOCK, ROOM, SIZES, ask, kv, truth, wait

CLEAR: dict[str, Any] = {"alpha": 0.05, "least_mass": 0.0}


def forget(session: Session) -> None:
    for row in session.layers[0].rows:
        row.at_hand = row.divided = None


def asked_once(cache: AlayaCache) -> tuple[Session, Tensor]:
    """A session of 20 blocks that have codes, and the query that it answered."""
    cache.session.update(0, *kv(20 * BLOCK))
    wait(cache)
    q = 12 * torch.randn(1, 8, 1, 16)
    ask(cache.session, q)
    return cache.session, q


@pytest.mark.parametrize("mode", ["exact", "sparse"])
@pytest.mark.parametrize("seed", range(4))
def test_an_attention_that_remembers_is_one_that_looks_again(mode: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with AlayaCache(**(SIZES | ROOM | CLEAR | {"mode": mode})) as cache:
        first = cache.session
        held: list[tuple[Session, Tensor, Tensor]] = []

        def grow(i: int, n: int) -> None:
            session, k, v = held[i]
            more_k, more_v = kv(n)
            session.update(0, more_k, more_v)
            held[i] = session, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)

        held.append((first, *kv(0)))
        grow(0, 12 * BLOCK)
        for _ in range(12):
            i = rng.randrange(len(held))
            session, k, v = held[i]
            match rng.choice(["grow", "grow", "crop and grow", "fork", "let go"]):
                case "grow":
                    grow(i, rng.randrange(1, 3 * BLOCK))
                case "crop and grow":  # as many blocks as before, but others
                    n = rng.randrange(1, 2 * BLOCK)
                    session.crop(session.length(0) - n)
                    held[i] = session, k[:, :, :-n], v[:, :, :-n]
                    grow(i, n)
                case "fork" if len(held) < 3:
                    other = Session(session.engine)
                    other.layers[0] = session.fork(0)
                    held.append((other, k, v))
                case _:
                    session.flush()
                    ids = session.layers[0].ids(session.layers[0].rows[0].first[:-1]).ravel()
                    session.engine.let_go(ids)
            session, k, v = held[i]
            wait(cache)
            q = 12 * torch.randn(1, 8, 1, 16)
            ask(session, q)  # reads what is on ssd
            wait(cache)
            got = [ask(session, q), ask(session, q)]
            forget(session)
            again = ask(session, q)
            assert torch.equal(got[0], again)
            assert torch.equal(got[1], again)
            want = truth(k, v, q)
            assert float((again - want).norm() / want.norm()) < (1e-4 if mode == "exact" else 0.1)
        assert session.engine.mover.ledger.pinned_count() == 0


def test_codes_are_asked_for_when_something_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    of = Partitions.of

    def counted(self: Partitions, ids: Ids) -> Known:
        asked.append(ids.shape[1])
        return of(self, ids)

    monkeypatch.setattr(Partitions, "of", counted)
    with AlayaCache(**(SIZES | ROOM | CLEAR)) as cache:
        session, q = asked_once(cache)
        for _ in range(BLOCK - 1):
            session.update(0, *kv(1))
            ask(session, q)
        opened = len(asked)
        assert opened <= 2  # the first, and the one after a block was opened
        session.update(0, *kv(2))
        wait(cache)
        ask(session, q)
        assert len(asked) == opened + 1


def test_codes_of_blocks_that_are_gone_are_not_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    with AlayaCache(**(SIZES | ROOM | CLEAR)) as cache:
        session, q = asked_once(cache)
        monkeypatch.setattr(Partitions, "offer", lambda self, ids: None)  # what comes now has no codes
        session.crop(14 * BLOCK)
        session.update(0, *kv(6 * BLOCK))
        got = ask(session, q)
        forget(session)
        assert torch.equal(got, ask(session, q))


def test_codes_that_were_made_since_are_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    with AlayaCache(**(SIZES | ROOM | CLEAR)) as cache:
        session = cache.session
        session.update(0, *kv(10 * BLOCK))
        wait(cache)
        monkeypatch.setattr(Partitions, "offer", lambda self, ids: None)
        session.update(0, *kv(10 * BLOCK))
        q = 12 * torch.randn(1, 8, 1, 16)
        sizes = []
        for _ in range(2):
            ask(session, q)
            divided = session.layers[0].rows[0].divided
            assert divided is not None
            sizes.append(divided.middle.run.size)
            cache.build_index()
        assert sizes == [9, 17]  # all but sinks and window


def test_only_what_was_attended_counts_as_used() -> None:
    k, v = kv(40 * BLOCK)
    k[:, :, : 30 * BLOCK] *= 0.01
    with AlayaCache(**(SIZES | ROOM | CLEAR)) as cache:
        session = cache.session
        session.update(0, k, v)
        wait(cache)
        before = cache.stats().touched.total
        ask(session, k[:, :, -5 * BLOCK - 3, None].repeat_interleave(4, 1) * 12)
        state, book = session.layers[0], session.engine.mover.ledger
        uses = book.uses[state.ids(state.rows[0].first)]
        assert (uses[:, [0, -1, -2]] == 1).all()  # the window
        assert not uses[:, 1:30].any()
        assert cache.stats().touched.total - before == np.count_nonzero(uses) * state.shape.nbytes
