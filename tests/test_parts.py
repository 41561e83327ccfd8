"""Parts of 64 tokens by their summaries: what is left out cannot matter, and is estimated; codes may stay on disk."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alaya_tiers.attention import attend_naive
from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.engine import Engine
from alaya_tiers.index.codes import HEAD, RATIO, SLACK, Layout, Reach, Scratch, encode, rotation, scan
from alaya_tiers.index.plan import APART, History, Limit, Rates, Step
from alaya_tiers.index.summary import PART, Near, Shape, decode, near, scan_parts, summarise
from alaya_tiers.kept import Kept
from alaya_tiers.ledger import Ledger
from alaya_tiers.partitions import Partitions
from alaya_tiers.promises import Promise
from alaya_tiers.testing_index import KEYS, hard_keys
from tests.test_indexed import IDS, LAYERS, ask, indexes, opened
from tests.test_indexed import kv as kv
from tests.test_indexed import path as path

DIM, SIZE = 32, 256
LAYOUT = Layout(SIZE, DIM, DIM, 4)


class Blocks:
    """Coded blocks of some heads and their summaries. k, v: [heads, n, tokens, dim]."""

    def __init__(self, k: Tensor, v: Tensor, layout: Layout = LAYOUT) -> None:
        heads, n = k.shape[:2]
        coded = encode(k.flatten(0, 1), v.flatten(0, 1), layout)
        assert coded is not None
        self.coded, self.summaries = coded, summarise(coded, layout)
        at = np.arange(heads * n).reshape(heads, n)
        self.codes = coded.data_ptr() + at * coded.shape[1]
        self.short = self.summaries.data_ptr() + at * self.summaries.shape[1]
        self.first, self.count = np.zeros(n, np.int32), np.full(n, layout.tokens, np.int32)

    def of(self, columns: Any) -> Any:
        return self.codes[:, columns]


def passages(heads: int = 2, n: int = 24, apart: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of which 64 neighbours have a direction in common, values, and the directions [heads, parts, dim]."""
    directions = apart * torch.randn(heads, n * SIZE // PART, DIM)
    k = directions.repeat_interleave(PART, 1) + torch.randn(heads, n * SIZE, DIM)
    v = torch.randn(heads, n, 1, DIM) + 0.1 * torch.randn(heads, n, SIZE, DIM)
    return k.view(heads, n, SIZE, DIM), v, directions


@given(kind=st.sampled_from(KEYS[:-1]), bits=st.sampled_from([4, 8]), dim=st.sampled_from([5, 24, 64]))
def test_what_is_decoded_differs_by_no_more_than_the_code_says(kind: str, bits: int, dim: int) -> None:
    torch.manual_seed(0)
    keys, layout = hard_keys(kind, 96, dim), Layout(96, dim, 3, bits)
    coded = encode(keys[None], torch.randn(1, 96, 3), layout)
    assert coded is not None
    rest, scale = decode(coded, layout)
    head = coded[:, : 4 * HEAD].view(torch.float32)
    mean = coded[:, 4 * HEAD : 4 * HEAD + dim].view(torch.int8).float() * head[:, 5, None]
    away = ((rest + mean[:, None])[0].double() - (keys @ rotation(dim)).double()).norm(dim=1)
    assert bool((away <= (head[0, RATIO] * scale[0] + head[0, SLACK]).double() * 1.001 + 1e-30).all())


def naive(q: Tensor, summaries: Tensor, layout: Layout, sure: float | None, scale: float, cap: float | None) -> Near:
    """What near says, from the bytes. summaries: [heads, n, bytes]."""
    shape = Shape.of(layout)
    floats = summaries[..., : shape.spread_at].contiguous().view(torch.float32)
    numbers = summaries[..., shape.spread_at : shape.value_at].view(torch.int8).float()
    numbers = numbers.view(*summaries.shape[:2], 1 + shape.parts, shape.dims)[..., : shape.k_dim]
    means = numbers[:, :, 1:] * floats[..., 2 : 2 + shape.parts, None]
    score = torch.einsum("hnpd,hrd->hnpr", means, q)
    variance = torch.einsum("hnd,hrd->hnr", (numbers[:, :, 0] * floats[..., :1]) ** 2, q**2)[:, :, None]
    width = q.norm(dim=2)[:, None, None] * floats[..., 2 + shape.parts :, None]
    if sure is not None:
        width = torch.minimum(width, sure * variance.sqrt())
    most, mean = (score + width) * scale, score * scale + variance * scale**2 / 2
    mean = torch.minimum(mean, most)
    if cap:
        most, mean = cap * torch.tanh(most / cap), cap * torch.tanh(mean / cap)
    return Near(most.numpy(), mean.numpy())


@pytest.mark.parametrize(("rows", "dim", "size"), [(1, 8, 16), (4, 64, 256), (7, 100, 130), (33, 128, 256)])
@pytest.mark.parametrize("sure", [None, 4.0])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_near_is_what_the_summaries_say(
    rows: int, dim: int, size: int, sure: float | None, cap: float | None, instructions: int
) -> None:
    layout, heads, n = Layout(size, dim, 5, 4), 2, 70
    blocks = Blocks(torch.randn(heads, n, size, dim), torch.randn(heads, n, size, 5), layout)
    q = 3 * torch.randn(heads, rows, dim)
    got = near(q, blocks.short, Shape.of(layout), sure, 0.3, cap, Scratch())
    want = naive(q, blocks.summaries.view(heads, n, -1), layout, sure, 0.3, cap)
    for mine, right in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-3)


@given(kind=st.sampled_from(KEYS[:-1]), bits=st.sampled_from([4, 8]), dim=st.sampled_from([3, 24, 64]))
def test_no_key_scores_above_its_part(kind: str, bits: int, dim: int) -> None:
    torch.manual_seed(1)
    keys, layout = hard_keys(kind, 2 * 150, dim), Layout(150, dim, 4, bits)
    blocks = Blocks(keys.view(1, 2, 150, dim), torch.randn(1, 2, 150, 4), layout)
    q = torch.randn(1, 3, dim)
    most = near(q, blocks.short, Shape.of(layout), None, 1.0, None, Scratch()).most
    scores = torch.einsum("rd,ntd->ntr", q[0].double(), keys.view(2, 150, dim).double())
    for block in range(2):
        for part in range(3):
            truth = scores[block, part * PART : (part + 1) * PART].amax(0)
            slack = 1e-5 * truth.abs() + 1e-30
            assert bool((torch.from_numpy(most[0, block, part]).double() >= truth - slack).all())


def test_parts_find_what_a_scan_finds_and_look_at_little(instructions: int) -> None:
    k, v, directions = passages()
    blocks, heads, rows = Blocks(k, v), 2, 3
    wanted = torch.tensor([[5, 40, 77], [3, 3, 90]])
    q = torch.stack([directions[h, wanted[h]] for h in range(heads)])
    reach, scale = Reach.of_share(0.001), 0.15
    every = scan(q, blocks.codes, blocks.first, blocks.count, LAYOUT, reach, scale)
    found, looked = scan_parts(
        q, blocks.short, blocks.of, blocks.first, blocks.count, LAYOUT, reach, scale, deviations=4.0
    )
    assert looked < 0.4 * 24 * SIZE
    flat_k, flat_v = k.flatten(1, 2), v.flatten(1, 2)
    for head in range(heads):
        scores = scale * q[head].double() @ flat_k[head].double().T
        must = (scores >= scores.amax(1, keepdim=True) + math.log(0.001)).any(0).nonzero().flatten()
        assert set(must.tolist()) <= set(found.tokens[head].tolist())
        assert set(found.tokens[head].tolist()) <= set(every.tokens[head].tolist()) | set(must.tolist())
        left = torch.ones(24 * SIZE, dtype=torch.bool)
        left[torch.from_numpy(found.tokens[head]).long()] = False
        truth = scores[:, left].logsumexp(1)
        assert float((found.rest_lse[head] - truth).abs().max()) < 0.3
        out = torch.softmax(scores[:, left], 1) @ flat_v[head][left].double()
        assert float((found.rest[head] - out).norm() / out.norm()) < 0.5
    assert torch.all(found.top <= every.top + 1e-3)
    assert rows == found.rest.shape[1]


def test_a_filter_holds_and_what_is_left_out_is_estimated() -> None:
    k, v, directions = passages()
    blocks = Blocks(k, v)
    blocks.first[:], blocks.count[:] = 70, 100
    blocks.count[5] = 0
    q, scale = directions[:, [6, 21]], 0.15  # parts 2 of block 1, and 1 of block 5
    found, looked = scan_parts(
        q, blocks.short, blocks.of, blocks.first, blocks.count, LAYOUT, Reach.of_share(0.001), scale, deviations=4.0
    )
    seen = np.zeros((24, SIZE), bool)
    seen[:, 70:170] = True
    seen[5] = False
    assert 0 < looked < seen.sum()
    for head in range(2):
        assert seen.ravel()[found.tokens[head]].all()
        assert not len(np.intersect1d(found.tokens[head], np.arange(5 * SIZE, 6 * SIZE)))
        left = torch.from_numpy(seen.ravel().copy())
        left[torch.from_numpy(found.tokens[head]).long()] = False
        truth = (scale * q[head] @ k[head].flatten(0, 1)[left].T).logsumexp(1)
        assert float((found.rest_lse[head] - truth).abs().max()) < 0.3


def test_nothing_to_look_at_is_nothing() -> None:
    k, v, _ = passages(n=2)
    blocks = Blocks(k, v)
    blocks.count[:] = 0
    found, looked = scan_parts(
        torch.randn(2, 1, DIM), blocks.short, blocks.of, blocks.first, blocks.count, LAYOUT, Reach(1.0), 1.0
    )
    assert looked == 0
    assert [tokens.size for tokens in found.tokens] == [0, 0]
    assert bool((found.rest_lse == -math.inf).all())
    assert not bool(found.rest.any())


# ---------------------------------------------------------------------- the plan
RATES = Rates(read=3e10, scan=2e10, pick=1e-7, ssd=1.5e9, look=1e-5)
LONG = Step(1e9, 1e5, 2e8, 512.0, 131072.0, 8000, 0.0)


def test_heads_that_find_things_together_look_by_parts_and_those_that_do_not_stop() -> None:
    history, heads = History(2), np.arange(2)
    assert not history.plan(LONG, RATES, Limit(), summaries=True).coarse.any(), "nothing is known yet"
    history.note_parts(heads, np.array([0.001, 0.9]), LONG, RATES)
    assert history.parts.tolist() == [APART * 0.001, 1.0]
    assert history.lies_together(LONG, RATES).tolist() == [True, False]
    assert not history.plan(LONG, RATES, Limit(), summaries=False).coarse.any()
    assert not history.plan(LONG, RATES, Limit(), summaries=True, recorded=True).coarse.any()
    assert history.plan(LONG, RATES, Limit(), summaries=True).coarse.tolist() == [True, False]
    cheaper = history.predicted
    assert cheaper < History(2).plan(LONG, RATES, Limit()).look.sum() * LONG.scan(RATES)
    history.note_parts(heads, np.array([0.95, 0.001]), LONG, RATES)  # it looked at nearly everything
    choices = [history.plan(LONG, RATES, Limit(), summaries=True).coarse.tolist() for _ in range(2)]
    assert choices == [[False, True], [False, True]]


def test_codes_on_disk_are_looked_at_by_parts_or_not_at_all() -> None:
    history, cold = History(2), Step(1e9, 1e5, 2e8, 512.0, 131072.0, 8000, 1.0, 1.0, 1e8)
    choice = history.plan(cold, RATES, Limit(), summaries=True, recorded=True)
    assert choice.coarse.tolist() == [True, True]
    history.failed("why")
    assert not history.plan(cold, RATES, Limit(), summaries=True).look.any()
    assert history.plan(cold, RATES, Limit(), summaries=True).look.all()
    history.failed("why")
    assert history.left.tolist() == [3, 3]


# ---------------------------------------------------------------------- codes that come and go
def test_slots_are_free_only_when_nobody_reads_them() -> None:
    book = Ledger()
    book.opened(0, 0, 0, np.arange(6, dtype=np.int32))
    book.code[:3] = [7, 8, 9]
    kept, promise = Kept[str](book), Promise("file", 0)
    kept.add(promise, np.array([0, 1, 2, 4]), np.arange(4))
    kept.want(np.array([2]))
    kept.want(np.array([0]))
    assert kept.oldest(9).tolist() == [1, 2], "0 is wanted now, 4 has no codes in memory"
    before = kept.reader()
    kept.leave(book.left(np.array([1])))
    assert kept.oldest(9).tolist() == [2]
    after = kept.reader()
    assert kept.free() == []
    del before
    assert [slots.tolist() for slots in kept.free()] == [[8]]
    assert kept.free() == []
    del after


@pytest.mark.parametrize("fault", ["", "codes", "summaries", "gone"])
def test_codes_stay_on_disk_where_memory_has_no_room_for_them(
    path: Path, kv: list[tuple[Tensor, Tensor]], fault: str
) -> None:
    """The answer is right whatever happens to the file; nothing damaged is used."""
    for number, file in enumerate(indexes(path)):
        data = bytearray(file.read_bytes())
        if fault == "codes":
            data[4096 + 700 * number] ^= 1
        elif fault == "summaries":
            data[-1] ^= 1
        if fault == "gone":
            file.unlink()
        else:
            file.write_bytes(bytes(data))
    for _, partitions in ask(path, kv, index_budget="160KiB"):
        assert partitions.tight == (fault != "gone")
    with opened(path, index_budget="160KiB") as db:
        session, _ = db.create_session(IDS)
        for question in questions(session.session, kv):
            assert question < 0.02
        use, engine = session.stats().sparse, session.session.engine
        assert use is not None
        assert engine.used_bytes("index") <= 160 << 10
        if not fault:
            plans = session.session.explain().layers
            assert [one.plan for one in plans] == ["2 coarse (DIPR)"] * LAYERS
            assert use.steps == 6 * LAYERS * 8
            assert use.exact == 0


def questions(session: Session, kv: list[tuple[Tensor, Tensor]]) -> Iterator[float]:
    """Errors of attention to different queries, layer by layer."""
    torch.manual_seed(5)
    length = session.length(0)
    for _ in range(6):
        for layer, (k, v) in enumerate(kv):
            q = 12 * torch.randn(1, 8, 1, 16)
            got = session.attention(layer, q, [Visible.all(length, 1)], 0.25)
            want = attend_naive(q[0].view(2, 4, 16), k[0, :, :length], v[0, :, :length], 0.25).out.view(1, 8, 1, 16)
            yield float((got - want).norm() / want.norm())


def test_an_index_that_was_not_all_in_memory_is_stored_whole_again(path: Path, kv: list[tuple[Tensor, Tensor]]) -> None:
    before = [file.read_bytes() for file in indexes(path)]
    with opened(path, index_budget="160KiB") as db:
        db.build_index(db.contexts()[0].id)
    assert [file.read_bytes() for file in indexes(path)] == before


# ---------------------------------------------------------------------- the engine, everything in memory
def test_an_engine_looks_by_parts_where_that_pays() -> None:
    torch.manual_seed(0)
    k, v, directions = passages(2, 40)
    k, v = k.flatten(1, 2)[None], v.flatten(1, 2)[None]
    settings = Settings(
        mode="sparse", device_budget=16 << 20, host_budget=16 << 20, look_seconds=1e-9, scan_rate=1e6, read_rate=1.0,
        sink_tokens=16, recent_tokens=32, index_parts=4,
    )  # fmt: skip
    engine = Engine(settings)
    try:
        session = Session(engine)
        session.update(0, k, v)
        session.build_index()
        plans, wanted = [], [7, 30, 30, 90, 120]
        for passage in wanted:
            q = directions[:, passage].repeat_interleave(2, 0)[None, :, None]
            got = session.attention(0, q, [Visible.all(k.shape[2], 1)], 0.3)
            want = attend_naive(q[0].view(2, 2, DIM), k[0], v[0], 0.3).out.view(1, 4, 1, DIM)
            assert float((got - want).norm() / want.norm()) < 0.01
            plans.append(session.explain().layers[0].plan)
            assert isinstance(engine.partitions, Partitions)
            engine.partitions.wait()
        assert plans == ["2 codes (DIPR)"] * 1 + ["2 coarse (DIPR)"] * 4
        used = engine.used_bytes("index")
        session.clear()
        book = engine.mover.ledger
        assert not (book.summary >= 0).any()
        assert engine.used_bytes("index") == used  # slots, not memory, are given back
    finally:
        engine.close()
    assert engine.used_bytes("index") == 0


def test_a_needle_is_found_unless_that_was_given_up() -> None:
    """One key that is like none of its neighbours: a bound that is sure has it, deviations overlook it."""
    k = torch.nn.functional.normalize(torch.randn(1, 24, SIZE, DIM), dim=3)
    blocks, found = Blocks(k, torch.randn(1, 24, SIZE, DIM)), dict[float | None, int]()
    for deviations in (None, 1.0):
        found[deviations] = 0
        for needle in range(0, 24 * SIZE, 97):
            q = k.view(1, -1, DIM)[:, needle : needle + 1]
            got, _ = scan_parts(
                q, blocks.short, blocks.of, blocks.first, blocks.count, LAYOUT, Reach.of_share(0.001), 50.0,
                deviations=deviations,
            )  # fmt: skip
            found[deviations] += needle in got.tokens[0].tolist()
    assert found[None] == len(range(0, 24 * SIZE, 97))
    assert found[1.0] < 0.8 * found[None]
