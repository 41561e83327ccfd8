"""Samples of queries, given with an import: counted right, kept with the context, and of use at the first step."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alaya_tiers.cache import Visible
from alaya_tiers.errors import InputError
from alaya_tiers.index.plan import LONGEST_PAUSE, PRIMED_PAUSE, History, Limit, Rates, Step
from alaya_tiers.needs import REACHES, STEP, Needs, Samples, counted
from tests.test_indexed import IDS, LAYERS, TOKENS, opened

ALPHA = 0.01
RATES = {
    "alpha": ALPHA,
    "read_rate": 1e9,
    "scan_rate": 1e9,
    "pick_seconds": 1e-7,
    "page_seconds": 1e-8,
    "look_seconds": 1e-9,
}
"""A machine on which looking pays for heads that need a few keys, and not for those that need all."""


def pieces(k: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for lo in range(0, k.shape[1], size):
        yield lo, k[:, lo : lo + size]


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 25), st.integers(3, 9), st.sampled_from([None, 2.0]), st.floats(0, 4))
def test_it_counts_what_a_loop_counts(seed: int, tokens: int, size: int, softcap: float | None, sharp: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    q, k = sharp * torch.randn(4, 3, 8, generator=rng), torch.randn(2, tokens, 8, generator=rng)
    inner = range(tokens // 4, tokens - tokens // 5)
    got = counted(q, lambda: pieces(k, size), 0.7, softcap, inner)
    for head in range(2):
        for reach in (1, 3, REACHES):
            total = 0
            for n in range(3):
                scores = 0.7 * q[2 * head : 2 * head + 2, n].double() @ k[head].double().T
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                below = (scores.amax(1, keepdim=True) - scores).amin(0)[inner.start : inner.stop]
                near = (below - reach * STEP).abs() < 1e-4
                total += int((below <= reach * STEP).sum()) if not near.any() else -(10**6)
            assert total < 0 or math.isclose(got[head, reach - 1], total / 3, rel_tol=1e-5)


def test_a_file_is_read_as_it_was_written_and_no_other(tmp_path: Path) -> None:
    needs = Needs(70, 4, {0: np.arange(2 * REACHES, dtype=np.float32).reshape(2, -1)})
    data, digest = needs.encoded()
    again = Needs.decoded(data, digest)
    assert (again.tokens, again.samples) == (70, 4)
    assert np.array_equal(again.counts[0], needs.counts[0])
    found = again.found(0, 1.25 * STEP)
    assert found is not None
    assert found.tolist() == [0.25, REACHES + 0.25]
    assert again.found(1, 1.0) is None
    for i in range(0, len(data), 7):
        with pytest.raises(ValueError, match="damaged"):
            Needs.decoded(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], digest)


STEP_ = Step(1e6, 1e4, 1e6, 512.0, 8192.0, 100, 0.0)


def test_a_head_that_needs_everything_reads_everything_at_once() -> None:
    history = History(3)
    history.prime(np.array([5.0, 1e6, 40.0]))
    rates = Rates(1e9, 1e10, 1e-7, 1e9)
    choice = history.plan(STEP_, rates, Limit())
    assert choice.look.tolist() == [True, False, True]
    asked = [history.plan(STEP_, rates, Limit()).look[1] for _ in range(PRIMED_PAUSE)]
    assert asked == [False] * (PRIMED_PAUSE - 1) + [True], "it is asked again: samples are not the truth"
    assert PRIMED_PAUSE < LONGEST_PAUSE
    assert History(3).plan(STEP_, rates, Limit()).look.all(), "without samples everybody looks"


# ---------------------------------------------------------------------- with a database


@pytest.fixture
def kv() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(1, 2, TOKENS, 16), torch.randn(1, 2, TOKENS, 16)) for _ in range(LAYERS)]


def queries(n: int = 5) -> list[Tensor]:
    """The first kv head's are near nothing in particular, the second's are sharp: [query_heads, n, 16] a layer."""
    sharpness = torch.tensor([0.01, 0.01, 12.0, 12.0])[:, None, None]
    return [sharpness * torch.randn(4, n, 16) for _ in range(LAYERS)]


def first_plan(db: Any, q: list[Tensor], ids: Tensor = IDS) -> list[list[bool]]:
    """Which kv heads look in the first step of a new session, layer by layer."""
    session, _ = db.create_session(ids)
    for layer in range(LAYERS):
        session.session.attention(layer, q[layer][None, :, :1], [Visible.all(session.get_seq_length(), 1)], 0.25)
    assert session.stats().sparse.steps > 0
    return [session.session.layers[n].history.choice.look.tolist() for n in range(LAYERS)]


@pytest.mark.slow
def test_the_first_step_is_planned_as_the_samples_say(tmp_path: Path, kv: Any) -> None:
    q = queries()
    with opened(tmp_path / "without", **RATES) as db:
        db.import_context(IDS, kv)
        assert first_plan(db, q) == [[True, True]] * LAYERS, "nothing is known"
    path = tmp_path / "with"
    with opened(path, **RATES) as db:
        name = db.import_context(IDS, kv, queries=q)
        assert first_plan(db, q) == [[False, True]] * LAYERS
        assert not db.verify()
    with opened(path, **RATES) as db:
        assert first_plan(db, q) == [[False, True]] * LAYERS, "it is kept"
        session, _ = db.create_session(IDS)
        found = session.session.layers[0].history.found
        warm = kv[0][0][0, 1, 16 : TOKENS - 32]  # what the second head's two query heads need, by hand
        below = torch.stack([(s := 0.25 * q[0][h] @ kv[0][0][0, 1].T).amax(1, keepdim=True) - s for h in (2, 3)])
        near = (below.amin(0)[:, 16 : TOKENS - 32] <= -math.log(ALPHA)).sum(1).float().mean()
        assert abs(found[1] - near) <= 0.2 * near + 1
        assert abs(found[0] - len(warm)) <= 1
        for layer in range(LAYERS):
            session.update(kv[layer][0][:, :, :40], kv[layer][1][:, :, :40], layer)
        length = session.get_seq_length()
        longer = torch.cat([IDS[:, :length], IDS[:, :40]], 1)
        (grown,) = db.store(session, longer)
        assert grown != name
    with opened(path, **RATES) as db:
        assert first_plan(db, q, torch.cat([longer, IDS[:, :1]], 1)) == [[False, True]] * LAYERS, "handed on"
        db.delete(name)
        db.delete(grown)
    assert not list(path.rglob("needs"))


@pytest.mark.slow
def test_damaged_needs_are_seen_and_not_used(tmp_path: Path, kv: Any) -> None:
    path, q = tmp_path / "store", queries()
    with opened(path, **RATES) as db:
        name = db.import_context(IDS, kv, queries=q)
    file = path / "segments" / name / "needs"
    data = file.read_bytes()
    file.write_bytes(data[:100] + b"9" + data[101:])
    with opened(path, **RATES) as db:
        assert [(d.kind, d.contexts) for d in db.verify()] == [("index", (name,))]
        assert first_plan(db, q) == [[True, True]] * LAYERS
        assert db.import_context(IDS, kv, queries=q) == name, "importing again mends it"
        assert not db.verify()
        assert first_plan(db, q) == [[False, True]] * LAYERS
    file.unlink()
    with opened(path, **RATES) as db:
        assert not db.verify(), "nothing depends on it"
        assert first_plan(db, q) == [[True, True]] * LAYERS
    file.symlink_to(tmp_path / "elsewhere")
    with opened(path, **RATES) as db:
        assert [d.kind for d in db.verify()] == ["index"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q[:2], "2 layers"),
        (lambda q: [], "no queries"),
        (lambda q: [q[0], q[1], q[2][:3]], "multiple of 2"),
        (lambda q: [x[..., :8] for x in q], "numbers"),
        (lambda q: [q[0], q[1][:, :2], q[2]], "same n"),
        (lambda q: [x.int() for x in q], "floating"),
        (lambda q: [x * math.inf for x in q], "finite"),
        (lambda q: [np.zeros((4, 5, 16)) for _ in q], "floating-point tensor"),
    ],
)
def test_samples_that_are_not_of_this_model_are_refused(tmp_path: Path, kv: Any, change: Any, says: str) -> None:
    with opened(tmp_path / "store") as db:
        with pytest.raises(InputError, match=says):
            db.import_context(IDS, kv, queries=change(queries()))
        assert not db.contexts()


def test_samples_have_the_scale_of_the_model(tmp_path: Path) -> None:
    made = Samples.of(queries(), lambda layer, dim: layer + dim)
    assert list(made.scale) == [16, 17, 18]
    assert replace(made, softcap=3.0).softcap == 3.0
