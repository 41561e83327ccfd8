"""Who pins what: seen in the stats, and named while somebody looks."""

from typing import Any

import numpy as np
import torch

from alaya_tiers.cache import Visible
from alaya_tiers.testing_pins import watching_pins
from tests.test_pages import DIM, GROUP, HEADS, TIGHT, TOKENS, ask, made


def test_a_pin_that_is_left_is_seen_and_named() -> None:
    session = made(**TIGHT)
    engine = session.engine
    try:
        engine.submit(engine.mover.flush()).result()
        with watching_pins(engine.mover, engine.clock) as pins:
            for layer in range(2):
                ask(session, 0, layer)
            session.attention(0, torch.randn(1, HEADS * GROUP, 9, DIM), [Visible.all(TOKENS, 9)], 0.25)
            assert pins.held() == []
            assert session.stats().queues.pinned == 0
            state = session.layers[0]
            ids = state.ids(state.rows[0].first[:3])
            reading: Any = engine.reading(ids, lambda: iter(()))
            next(reading)  # and nobody goes on
            left, blocks = pins.held(), set[int]()
            for held in left:
                assert held.since <= engine.clock.monotonic()
                assert held.why.count(" < ") == 3
                blocks |= set(held.blocks)
            assert any("Engine.reading" in held.why or "Loads." in held.why for held in left)
            assert blocks <= set(ids.ravel().tolist())
            assert session.stats().queues.pinned >= len(blocks) * engine.mover.host.slot_bytes > 0
            reading.close()
            assert pins.held() == []
            assert session.stats().queues.pinned == 0
        with engine.mover.lock:
            some = np.unique(ids)[:1]
            engine.mover.ledger.pin(some)
            assert pins.held() == []  # it looks no more
            engine.mover.give_back(engine.mover.ledger.unpin(some))
    finally:
        engine.close()


def test_pins_of_two_calls_on_the_same_blocks_are_told_apart() -> None:
    session = made(**TIGHT)
    mover = session.engine.mover
    try:
        with watching_pins(mover, session.engine.clock) as pins, mover.lock:
            ids = session.layers[0].ids(session.layers[0].rows[0].first[:2]).ravel()
            mover.ledger.pin(ids)
            mover.ledger.pin(ids[:1])
            assert [len(held.blocks) for held in pins.held()] == [ids.size, 1]
            mover.give_back(mover.ledger.unpin(ids))
            assert [held.blocks for held in pins.held()] == [(int(ids[0]),)]
            mover.give_back(mover.ledger.unpin(ids[:1]))
            assert pins.held() == []
    finally:
        session.engine.close()
