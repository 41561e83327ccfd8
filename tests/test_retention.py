"""What stays on the SSD and what leaves; and that no tenant ever meets another."""

import os
import stat
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alaya_tiers import DB, Share, Shares
from alaya_tiers.errors import ConfigError, InputError, OutOfSpace
from alaya_tiers.identity import Identity, segment_name
from alaya_tiers.policies import Patience, PauseView, StoredView
from tests.test_db import TIGHT, check, continued, expected, made, stored

ROOMY = TIGHT | {"device_budget": 16 * 2 * 4096}


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


def words(n: int) -> Tensor:
    """Others each time."""
    return torch.randint(1, 97, (1, n))


def zeros(n: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of so many tokens."""
    return [(torch.zeros(1, 2, n, 16), torch.zeros(1, 2, n, 16))] * 3


# ---------------------------------------------------------------------- the policy, by itself

TENANTS = ("a", "b", "c")


@st.composite
def views(draw: st.DrawFn) -> tuple[Shares, StoredView, int, int]:
    n = draw(st.integers(0, 9))
    tenant = tuple(draw(st.sampled_from(TENANTS)) for _ in range(n))
    nbytes = np.array([draw(st.integers(0, 20)) for _ in range(n)], np.int64)
    used = {t: sum(int(b) for b, of in zip(nbytes, tenant, strict=True) if of == t) for t in TENANTS}
    shares = {}
    for name in TENANTS:
        floor = draw(st.integers(0, 30))
        ttl = draw(st.none() | st.integers(0, 9))
        shares[name] = Share(floor, draw(st.none() | st.integers(floor, 60)), ttl)
    unused = np.array([draw(st.integers(0, 12)) for _ in range(n)], np.float64)
    held = np.array([draw(st.booleans()) for _ in range(n)], bool)
    view = StoredView(tenant, nbytes, unused, held, used, draw(st.sampled_from(TENANTS)))
    return Shares(shares), view, draw(st.integers(0, 60)), draw(st.integers(0, 60))


@given(views())
def test_who_leaves(case: tuple[Shares, StoredView, int, int]) -> None:
    """Nobody who is held, nobody in vain, nobody's floor for somebody else, and nobody at all if it does not help."""
    shares, view, need, new = case
    gone = shares.leave(view, need, new)
    assert len(set(gone)) == len(gone)
    assert not view.held[gone].any()
    assert gone == shares.leave(view, need, new)
    left = dict(view.used_bytes)
    for i in gone:
        left[view.tenant[i]] -= int(view.nbytes[i])
    over_time = set(shares.expired(view))
    for name in TENANTS:
        if name != view.asking and left[name] < view.used_bytes[name]:
            others = [i for i in gone if view.tenant[i] == name and i not in over_time]
            assert not others or left[name] >= shares.share(name).floor, "a floor was taken away"
    if gone:
        assert view.nbytes[gone].sum() >= need
        most = shares.share(view.asking).most
        assert most is None or left[view.asking] + new <= most
        last = gone[-1]
        freed = view.nbytes[gone].sum() - view.nbytes[last]
        own = left[view.asking] + (int(view.nbytes[last]) if view.tenant[last] == view.asking else 0)
        assert freed < need or (most is not None and own + new > most), "one left who need not have"


def test_the_longest_unused_leaves_first_and_before_it_what_has_expired() -> None:
    view = StoredView(
        ("a", "a", "b", "b"), np.full(4, 10), np.array([5.0, 9.0, 7.0, 2.0]), np.zeros(4, bool), {"a": 20, "b": 20}, "a"
    )
    assert Shares().leave(view, 25, 0) == [1, 2, 0]
    assert Shares({"b": Share(ttl=1)}).leave(view, 25, 0) == [2, 3, 1]
    assert Shares({"b": Share(floor=20)}).leave(view, 25, 0) == []
    assert Shares({"b": Share(floor=20)}).leave(view, 15, 0) == [1, 0]
    assert Shares({"a": Share(most=15)}).leave(view, 0, 10) == [1, 0]
    for wrong in ({"floor": -1}, {"floor": 5, "most": 4}, {"ttl": -1}):
        with pytest.raises(ConfigError):
            Share(**wrong)


def test_patience_is_a_matter_of_time_and_of_how_full_memory_is() -> None:
    view = PauseView(expected=60, nbytes=1 << 30, memory=8 << 30, full=0.95, read_rate=1e9)
    assert not Patience().keep(view)
    assert Patience().keep(replace(view, expected=5))
    assert Patience().keep(replace(view, full=0.5))
    assert not Patience(roomy=0.4).keep(replace(view, full=0.5))
    assert Patience().keep(replace(view, memory=100 << 30)), "a small part of memory"


# ---------------------------------------------------------------------- in a store


def size(db: DB) -> int:
    return int(db._engine.accountant.used["ssd"])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, model: Any) -> int:
    """Bytes of a context of 40 tokens."""
    with DB(tmp_path_factory.mktemp("one"), model=model, **ROOMY) as db:
        stored(model, db, words(40))
        return size(db)


def ids(db: DB) -> set[str]:
    return {context.id for context in db.contexts()}


def test_a_full_store_lets_go_of_what_was_not_used_for_longest(tmp_path: Path, model: Any, one: int) -> None:
    texts = [words(40) for _ in range(5)]
    with DB(tmp_path, model=model, shares=Shares(), ssd_budget=3 * one, **ROOMY) as db:
        names = [stored(model, db, text)[0] for text in texts[:3]]
        db.create_session(torch.cat([texts[0], texts[1]], 1))[0].close()  # used again
        names += stored(model, db, texts[3])
        assert ids(db) == {names[0], names[2], names[3]}
        pin = db.pin(names[2], owner="me", reason="a test", seconds=100)
        assert db.pins() == [pin]
        session, _ = db.create_session(torch.cat([texts[0], texts[1]], 1))
        names += stored(model, db, texts[4])
        assert ids(db) == {names[0], names[2], names[4]}, "what a session has, or a pin holds, stays"
        with pytest.raises(OutOfSpace):
            db.import_context(words(90), zeros(90))
        assert ids(db) == {names[0], names[2], names[4]}, "nobody leaves in vain"
        session.close()
        db.unpin(pin)
        with pytest.raises(InputError):
            db.unpin(pin)
        stored(model, db, words(90))
        check(db)
    with DB(tmp_path, model=model, ssd_budget=3 * one, **ROOMY) as db:
        with pytest.raises(OutOfSpace):
            stored(model, db, words(90))  # without a policy nothing leaves
        assert not db.verify()


@pytest.mark.slow
def test_a_flood_leaves_another_tenants_floor_alone(tmp_path: Path, model: Any, one: int) -> None:
    shares = Shares({"b": Share(floor=2 * one), "a": Share(most=3 * one)})
    with DB(tmp_path, model=model, shares=shares, ssd_budget=5 * one, **ROOMY) as db:
        a, b = db.tenant("a", "secret a"), db.tenant("b", "secret b")
        texts = [words(40) for _ in range(2)]
        mine = {stored(model, b, text)[0] for text in texts}
        for _ in range(8):
            stored(model, a, words(40))
            assert ids(b) == mine
            assert len(ids(a)) <= 3
        for text in texts:
            continued(model, b, torch.cat([text, words(5)], 1), 40).close()
        with pytest.raises(OutOfSpace, match="may have"):
            a.import_context(words(200), zeros(200))
        assert len(ids(a)) == 3
        for _ in range(3):
            stored(model, b, words(40))  # may push out what is above a's floor, which is none
        assert len(ids(b)) > 2
        check(db)
    floors = Shares(others=Share(floor=100 * one))  # those who were not named in this process have one too
    with DB(tmp_path, model=model, shares=floors, ssd_budget=5 * one, **ROOMY) as db, pytest.raises(OutOfSpace):
        stored(model, db, words(40))


def test_what_was_not_used_for_its_time_leaves(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with DB(tmp_path, model=model, shares=Shares(others=Share(ttl=60)), **ROOMY) as db:
        texts = [words(30), words(30)]
        names = [stored(model, db, text)[0] for text in texts]
        assert not db.expire()
        before = db._engine.clock.monotonic
        monkeypatch.setattr(db._engine.clock, "monotonic", lambda: before() + 50)
        db.create_session(torch.cat([texts[1], texts[0]], 1))[0].close()
        pin = db.pin(names[0], owner="me", reason="a test", seconds=30)
        monkeypatch.setattr(db._engine.clock, "monotonic", lambda: before() + 70)
        assert not db.expire()
        assert db.pins() == [pin]
        monkeypatch.setattr(db._engine.clock, "monotonic", lambda: before() + 90)
        assert not db.pins(), "its deadline is past"
        assert db.expire() == [names[0]]
        assert ids(db) == {names[1]}


def test_a_paused_session_goes_on_as_if_nothing_had_been(tmp_path: Path, model: Any) -> None:
    text = words(60)
    wanted = expected(model, text, 9)
    for roomy, kept in ((1.1, True), (0.0, False)):
        with DB(tmp_path / str(kept), model=model, patience=Patience(roomy), **ROOMY) as db:
            session, _ = db.create_session(text)
            out = model.generate(text, past_key_values=session, max_new_tokens=4)
            paused = db.pause(session, expected_return=30.0, reason="a tool runs")
            assert paused.kept is kept
            mover = db._engine.mover
            assert [(pin.owner, pin.reason) for pin in db.pins()] == [] if kept else [("pause", "a tool runs")]
            if not kept:
                whole = mover.ledger.file[: mover.ledger._made] >= 0
                assert not mover.ledger.readable(np.flatnonzero(whole)).any(), "what is on disk is in memory still"
            assert model.generate(out, past_key_values=session, max_new_tokens=5).equal(wanted)
            check(db)


# ---------------------------------------------------------------------- tenants


def test_a_tenant_sees_what_is_its_own(tmp_path: Path, model: Any) -> None:
    text = words(60)
    with DB(tmp_path, model=model, **ROOMY) as db:
        a, b = db.tenant("a", "secret a"), db.tenant("b", "secret b")
        (name,) = stored(model, a, text)
        for other in (b, db):
            session, rest = other.create_session(text)
            assert rest.shape[1] == 60, "another tenant's context was found"
            session.close()
            assert not other.contexts()
            calls: list[Any] = [
                other.export_context,
                other.delete,
                lambda n, o=other: o.pin(n, owner="", reason="", seconds=1),
            ]
            for call in calls:
                with pytest.raises(InputError) as theirs:
                    call(name)
                with pytest.raises(InputError) as nothing:
                    call("0" * 64)
                assert str(theirs.value).replace(name, "") == str(nothing.value).replace("0" * 64, "")
        pin = a.pin(name, owner="a", reason="mine", seconds=100)
        assert not b.pins()
        with pytest.raises(InputError):
            b.unpin(pin)
        session, _ = a.create_session(torch.cat([text, text], 1))
        with pytest.raises(InputError, match="another tenant"):
            b.store(session)
        with pytest.raises(InputError, match="another tenant"):
            b.store(session.fork())
        (same,) = stored(model, b, text)
        assert same != name
        assert [c.id for c in a.contexts()] == [name]
        for wrong in (("a", "secret b"), ("c", "secret a")):
            with pytest.raises(InputError):
                db.tenant(*wrong)
        for shard in tmp_path.rglob("c/0/0/0"):
            shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
        assert {c for d in a.verify() for c in d.contexts} == {name}
        assert all(not d.contexts for d in db.verify())
    with DB(tmp_path, model=model, tenant="secret a", **ROOMY) as again:
        assert [c.id for c in again.contexts()] == [name]


def test_nobody_else_on_the_machine_may_look(tmp_path: Path, model: Any) -> None:
    old = os.umask(0)
    try:
        with DB(tmp_path / "new" / "store", model=model, **ROOMY) as db:
            stored(model, db, words(60))
            for path in (tmp_path / "new" / "store").rglob("*"):
                wanted = 0o700 if path.is_dir() else 0o600
                assert stat.S_IMODE(path.stat().st_mode) == wanted, f"{path} is {oct(path.stat().st_mode)}"
            assert stat.S_IMODE((tmp_path / "new" / "store").stat().st_mode) == 0o700
    finally:
        os.umask(old)


# ---------------------------------------------------------------------- names

BASE: dict[str, Any] = {
    "model": "m",
    "weights": "w",
    "dtype": "float32",
    "block_tokens": 16,
    "segment_tokens": 64,
    "lossy": False,
}
TEXT = st.text("ab\x00,'\"=|w1", max_size=6)
IDENTITY = st.builds(
    Identity, model=TEXT, weights=TEXT, dtype=TEXT, lossy=st.booleans(), block_tokens=st.integers(1, 130),
    segment_tokens=st.integers(1, 130),
)  # fmt: skip
IDS = st.lists(st.sampled_from([0, 1, 2, 255, 256, 1 << 16, (1 << 40) + 1]), max_size=6)


@given(IDENTITY, IDENTITY, TEXT, TEXT)
def test_different_identities_or_tenants_have_different_roots(a: Identity, b: Identity, one: str, other: str) -> None:
    """Built from few characters, so that they would collide if fields ran into each other."""
    assert (a.root(one) == b.root(other)) == ((a, one) == (b, other))


@given(st.lists(IDS, max_size=3), st.lists(IDS, max_size=3))
def test_different_chains_of_tokens_have_different_names(a: list[list[int]], b: list[list[int]]) -> None:
    """The same tokens cut elsewhere are another chain too."""

    def name(parts: list[list[int]]) -> str:
        before = Identity(**BASE).root()
        for part in parts:
            before = segment_name(before, np.array(part, np.int64))
        return before

    assert (name(a) == name(b)) == (a == b)


@pytest.mark.parametrize("field", [field.name for field in fields(Identity)])
def test_any_field_that_differs_is_a_miss(field: str) -> None:
    for changed in _others(BASE[field]):
        assert Identity(**BASE | {field: changed}).root() != Identity(**BASE).root()


def _others(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, value * 2)
    else:
        yield from (value + "x", "", value + "\0", f" {value}")
