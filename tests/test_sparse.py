"""Sparse mode: the window and what matters exactly, the rest estimated; whatever is missing is attended exactly."""

import contextlib
import copy
import math
import random
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from alaya_tiers import AlayaCache, IndexFullWarning
from alaya_tiers.cache import Session, Visible
from alaya_tiers.errors import ConfigError, InputError, SessionClosed
from alaya_tiers.index import plan
from alaya_tiers.index.codes import Layout
from alaya_tiers.stats import SparseUse
from tests.tiny import generate, prompt, tiny

BLOCK = 16
SIZES: dict[str, Any] = {
    "mode": "sparse",
    "block_tokens": BLOCK,
    "segment_tokens": 4 * BLOCK,
    "sink_tokens": BLOCK,
    "recent_tokens": 2 * BLOCK,
    "io": "buffered",
    "read_rate": 1.0,  # or blocks this small would be read in order
}
ROOM: dict[str, Any] = {"device_budget": "1MiB", "host_budget": "4MiB"}
TIGHT: dict[str, Any] = {"device_budget": 3 * 2 * 4096, "host_budget": 16 * 2 * 4096}


def filled(k: Tensor, v: Tensor, **changes: Any) -> AlayaCache:
    """A cache with one layer that holds k and v, its codes made."""
    cache = AlayaCache(**(SIZES | ROOM | changes))
    cache.session.update(0, k, v)
    wait(cache)
    return cache


def wait(cache: AlayaCache) -> None:
    engine = cache.session.engine
    if engine.partitions is None or engine.pages is None:
        return
    engine.partitions.wait()
    assert engine.partitions.failure is None
    engine.submit(engine.pages.idle()).result()


def ask(session: Session, q: Tensor, lo: int = 0, **changes: Any) -> Tensor:
    length, n = session.length(0), q.shape[2]
    seen = Visible.causal(length - n, n)
    seen.lo[:] = lo
    return session.attention(0, q, [seen] * q.shape[0], 0.25, **changes)


def truth(k: Tensor, v: Tensor, q: Tensor, lo: int = 0, softcap: float | None = None) -> Tensor:
    group, n = q.shape[1] // k.shape[1], q.shape[2]
    scores = 0.25 * q.double() @ k.double().repeat_interleave(group, 1).mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    p = torch.arange(k.shape[2])
    hidden = (p > torch.arange(k.shape[2] - n, k.shape[2])[:, None]) | (p < lo)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v.double().repeat_interleave(group, 1)


def kv(n: int, rows: int = 1, heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, heads, n, dim), torch.randn(rows, heads, n, dim)


def used(cache: AlayaCache) -> SparseUse:
    use = cache.stats().sparse
    assert use is not None
    return use


@pytest.mark.parametrize("room", [ROOM, TIGHT], ids=["in memory", "on ssd"])
@pytest.mark.parametrize("softcap", [None, 60.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_sharp_queries_get_the_exact_answer_from_a_few_keys(
    room: dict[str, Any], softcap: float | None, bits: int
) -> None:
    k, v = kv(1000)
    q = 12 * torch.randn(1, 8, 1, 16)
    with filled(k, v, index_bits=bits, alpha=0.05, measure_mass=True, **room) as cache:
        ask(cache.session, q, softcap=softcap)
        cache.build_index()
        cache.session.engine.sparse = SparseUse()
        got = ask(cache.session, q, softcap=softcap)
        want = truth(k, v, q, softcap=softcap)
        assert float((got - want).norm() / want.norm()) < 0.05
        use = used(cache)
        assert (use.steps, use.exact) == (8, 0)
        assert use.attended < 0.5 * use.visible
        assert use.recovered / use.steps > 0.95
        assert abs(use.recovered - use.true_recovered) < 0.02 * use.steps
        assert use.error / use.measured < 0.05
        wait(cache)
        assert cache.session.engine.mover.ledger.pinned_count() == 0
        if room is TIGHT:
            assert cache.stats().read_bytes > 0


def test_diffuse_queries_are_estimated() -> None:
    """Keys that all matter a little: a budget of a few of them, and still nearly the right answer."""
    k, v = kv(2000)
    v += torch.arange(2000)[:, None] / 500  # values that have something in common with their neighbours
    q = 0.5 * torch.randn(1, 8, 1, 16)
    with filled(k, v, most_selected=20) as cache:
        got, want = ask(cache.session, q), truth(k, v, q)
        assert float((got - want).norm() / want.norm()) < 0.05
        use = used(cache)
        assert use.attended <= use.window + 20 * use.steps
        assert use.recovered / use.steps < 0.2  # and it says so


def test_a_provable_scan_attends_to_every_key_that_matters() -> None:
    k, v = kv(600)
    q = 4 * torch.randn(1, 8, 1, 16)
    with filled(k, v, index_sure=0, alpha=1e-6, index_bits=4) as cache:
        torch.testing.assert_close(ask(cache.session, q).double(), truth(k, v, q), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("lo", [0, 37, 500])
@pytest.mark.parametrize("n", [1, 4])
def test_padding_and_several_queries(lo: int, n: int) -> None:
    k, v = kv(1000, rows=2)
    q = 12 * torch.randn(2, 4, n, 16)
    with filled(k, v) as cache:
        got, want = ask(cache.session, q, lo), truth(k, v, q, lo)
        assert float((got - want).norm() / want.norm()) < 0.03
        assert used(cache).steps == 2 * 4 * n


def test_what_cannot_be_coded_is_attended_exactly() -> None:
    k, v = kv(1000)
    k[0, 0, 300], v[0, 1, 700] = 1e20, 1e18
    q = 3 * torch.randn(1, 8, 1, 16)
    with filled(k, v) as cache:
        got, want = ask(cache.session, q), truth(k, v, q)
        assert float((got - want).norm() / want.norm()) < 0.02
        partitions = cache.session.engine.partitions
        assert partitions is not None
        state = cache.session.layers[0]
        coded, *_ = partitions.of(state.ids(state.rows[0].first[: 1000 // BLOCK]))
        assert (~coded).nonzero()[0].tolist() == [300 // BLOCK, 700 // BLOCK]
        nan = q.clone()
        nan[0, 0] = torch.nan
        assert ask(cache.session, nan)[0, 0].isnan().all()
        assert used(cache).exact == 8


def test_a_small_index_budget_leaves_the_rest_exact() -> None:
    k, v = kv(1000)
    q = 12 * torch.randn(1, 8, 1, 16)
    with filled(k, v, index_budget="16KiB") as cache:
        with pytest.warns(IndexFullWarning, match="index_budget=16384"):
            assert float((ask(cache.session, q) - truth(k, v, q)).norm()) < 0.05
        index = cache.stats().tiers["index"]
        assert index.peak <= 16 << 10
        assert index.budget == 16 << 10


def test_an_index_that_has_room_again_goes_on() -> None:
    k, v = kv(1000)
    q = 12 * torch.randn(1, 8, 1, 16)
    with filled(k, v, index_budget="128KiB") as cache, _quiet():
        fork = copy.deepcopy(cache)
        fork.session.crop(16)
        fork.session.update(0, k, v)
        wait(cache)
        partitions = cache.session.engine.partitions
        assert partitions is not None
        before = partitions.full
        cache.session.clear()
        assert (before, partitions.full) == (True, False)
        ask(fork.session, q)  # offers what is missing
        wait(cache)
        state = fork.session.layers[0]
        assert partitions.of(state.ids(state.rows[0].first[:60]))[0].all()


def test_a_layer_whose_codes_are_larger_than_those_of_the_first_is_exact_and_harms_no_other() -> None:
    (k, v), (wide_k, wide_v) = kv(1000), kv(1000, dim=64)
    q, wide_q = 12 * torch.randn(1, 8, 1, 16), 12 * torch.randn(1, 8, 1, 64)
    with filled(k, v) as cache:
        cache.session.update(1, wide_k, wide_v)
        cache.session.update(2, k, v)
        wait(cache)
        for layer, query, pair in ((1, wide_q, (wide_k, wide_v)), (2, q, (k, v))):
            got = cache.session.attention(layer, query, [Visible.all(1000, 1)], 0.25)
            assert float((got - truth(*pair, query)).norm() / truth(*pair, query).norm()) < 0.02
        assert (used(cache).steps, used(cache).exact) == (8, 8)


def test_an_index_is_built_block_by_block_whatever_interrupts_it() -> None:
    k, v = kv(1000)
    q = 12 * torch.randn(1, 8, 1, 16)
    with AlayaCache(**(SIZES | TIGHT)) as cache:
        cache.session.update(0, k[:, :, :16], v[:, :, :16])
        maker = cache.session.engine.partitions
        assert maker is not None
        maker.offer = lambda ids: None  # type: ignore[method-assign]  # no idle time
        cache.session.update(0, k[:, :, 16:], v[:, :, 16:])
        wait(cache)
        torch.testing.assert_close(ask(cache.session, q).double(), truth(k, v, q), atol=1e-4, rtol=1e-3)
        assert used(cache).exact == 8
        seen: list[tuple[int, int]] = []

        def interrupted(done: int, of: int) -> None:
            seen.append((done, of))
            if done == 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.build_index(interrupted)
        cache.build_index(lambda done, of: seen.append((done, of)))
        assert seen[0][1] - 20 == seen[-1][1] == seen[-1][0]
        want = truth(k, v, q)
        assert float((ask(cache.session, q) - want).norm() / want.norm()) < 0.02
        assert used(cache).steps == 8
        cache.build_index(lambda done, of: pytest.fail("nothing is left to build"))


def test_short_contexts_are_exact() -> None:
    k, v = kv(6 * BLOCK)
    q = torch.randn(1, 8, 1, 16)
    with filled(k, v) as cache:
        torch.testing.assert_close(ask(cache.session, q).double(), truth(k, v, q), atol=1e-5, rtol=1e-4)
        assert (used(cache).steps, used(cache).exact) == (0, 8)


def test_forks_share_codes_and_dead_blocks_give_them_back() -> None:
    k, v = kv(1000)
    q = 12 * torch.randn(1, 8, 1, 16)
    with filled(k, v) as cache:
        partitions = cache.session.engine.partitions
        assert partitions is not None
        arena = partitions._memory.arena
        assert arena is not None
        before = arena.used
        assert before == 1000 // BLOCK * 2
        fork = copy.deepcopy(cache)
        more, values = kv(100)
        fork.session.update(0, more, values)
        wait(cache)
        whole = torch.cat([k, more], 2), torch.cat([v, values], 2)
        for one, pair in ((fork, whole), (cache, (k, v))):
            want = truth(*pair, q)
            assert float((ask(one.session, q) - want).norm() / want.norm()) < 0.02
        assert before < arena.used < 1.2 * before
        fork.session.clear()
        assert arena.used == before
        cache.session.crop(500)
        assert arena.used == -(-500 // BLOCK) * 2
        want = truth(k[:, :, :500], v[:, :, :500], q)
        assert float((ask(cache.session, q) - want).norm() / want.norm()) < 0.02
        cache.session.engine.mover.ledger.check_integrity()


@pytest.mark.parametrize("implementation", ["alaya", "sdpa"])
def test_generation(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every key in reach the tokens are those of DynamicCache; left padding and beams go the same way."""
    monkeypatch.setattr(plan.Step, "flat", lambda step, rates: math.inf)  # or all would be read in order
    model = tiny()
    model.set_attn_implementation(implementation)
    inputs = {"input_ids": prompt(1, 300)}
    for mode in ({}, {"num_beams": 2}, {"prefill_chunk_size": 64}):
        expected = generate(model, DynamicCache(config=model.config), inputs, **mode)
        with AlayaCache(config=model.config, alpha=1e-9, **SIZES, **ROOM) as cache, _quiet():
            with torch.no_grad():
                model(input_ids=inputs["input_ids"][:, :-1], past_key_values=cache)
            cache.build_index()
            assert torch.equal(generate(model, cache, inputs, **mode), expected)
            assert used(cache).steps > 0


def _quiet() -> Any:
    return warnings.catch_warnings(action="ignore")


def test_a_layer_that_needs_nearly_all_reads_all_and_asks_rarely() -> None:
    k, v = kv(2000)
    with filled(k, v) as cache:
        diffuse, sharp = 0.3 * torch.randn(1, 8, 1, 16), 12 * torch.randn(1, 8, 1, 16)
        for _ in range(40):
            torch.testing.assert_close(ask(cache.session, diffuse).double(), truth(k, v, diffuse), atol=1e-5, rtol=1e-4)
        history = cache.session.layers[0].history
        assert (used(cache).steps, used(cache).exact) == (0, 8 * 40)
        assert history.pause.tolist() == [31, 31]  # after 1, 3, 7, 15
        for _ in range(40):
            ask(cache.session, sharp)
        assert history.pause.tolist() == [0, 0]
        assert used(cache).steps > 0


def test_each_head_has_a_plan_of_its_own_and_explains_it() -> None:
    k, v = kv(2000)
    q = torch.cat([0.3 * torch.randn(1, 4, 1, 16), 12 * torch.randn(1, 4, 1, 16)], 1)
    with filled(k, v, measure_mass=True) as cache:
        assert "no layer has decoded" in str(cache.explain())
        for step in range(3):  # the first head reads everything: after a scan, then without one
            got, want = ask(cache.session, q), truth(k, v, q)
            torch.testing.assert_close(got[:, :4].double(), want[:, :4], atol=1e-5, rtol=1e-4)
            assert float((got[:, 4:] - want[:, 4:]).norm() / want[:, 4:].norm()) < 0.02
            plans = cache.explain().layers[0]
            assert plans.plan == ("1 codes (DIPR) + 1 flat" if step == 1 else "2 codes (DIPR)")
            assert plans.found[0] > 1500 > 100 > plans.found[1] > 0
            assert plans.measured > 0
            assert (plans.gave_up, plans.outcome) == ((0, "") if step == 1 else (1, "1 found too much and read all"))
            assert plans.attended[0] == plans.tokens == 2000 > 300 > plans.attended[1] > plans.found[1]
            assert plans.mass[0] == 1 > plans.mass[1] == pytest.approx(used(cache).least, abs=1e-6)
            assert plans.kv_bytes == sum(plans.attended) * 2 * 16 * 4
            assert f"least mass of a query head {plans.mass[1]:.3f}" in str(cache.explain())
        assert (used(cache).steps, used(cache).exact) == (4 * 3, 4 * 3)
        assert f"{plans.found[0]} {plans.found[1]}" in str(cache.explain())
        assert cache.explain().as_dict()["predicted"] == cache.explain().layers[0].predicted


@pytest.mark.parametrize(("look_seconds", "plan"), [(1e-9, "2 codes (DIPR)"), (1.0, "2 flat")])
def test_nobody_looks_where_to_look_takes_longer_than_to_read(look_seconds: float, plan: str) -> None:
    k, v = kv(2000)
    q = 12 * torch.randn(1, 8, 1, 16)
    rates = {"read_rate": 1e9, "scan_rate": 1e12, "pick_seconds": 1e-9, "look_seconds": look_seconds}
    with filled(k, v, **rates) as cache:
        for _ in range(2):
            got = ask(cache.session, q)
            if look_seconds == 1.0:
                torch.testing.assert_close(got.double(), truth(k, v, q), atol=1e-5, rtol=1e-4)
            assert cache.explain().layers[0].plan == plan


def test_a_target_of_time_cuts_what_is_selected_and_says_so() -> None:
    k, v = kv(2000)
    q = 0.3 * torch.randn(1, 8, 1, 16)
    rates = {"read_rate": 1e9, "scan_rate": 1e9, "pick_seconds": 1e-7, "look_seconds": 1e-9}
    with filled(k, v, attention_target=5e-4, **rates) as cache:
        ask(cache.session, q)
        plans = cache.explain().layers[0]
        assert plans.most is not None
        assert 0 < plans.most < 1500
        assert plans.plan == f"2 codes (DIPR, at most {plans.most})"
        assert used(cache).attended == used(cache).steps * plans.most + used(cache).window
        assert used(cache).least < 0.9
        ask(cache.session, q)
        assert cache.explain().predicted <= 5e-4
    with filled(k, v, attention_target=1e-9, **rates) as cache:  # cannot be met: the window and the scan are left
        ask(cache.session, q)
        assert cache.explain().layers[0].most == 0
        assert cache.explain().predicted > 1e-9


def test_what_is_attended_exactly_says_why() -> None:
    k, v = kv(1000)
    q, mad = 12 * torch.randn(1, 8, 1, 16), torch.full((1, 8, 1, 16), torch.nan)
    rates = {"read_rate": 1e12, "look_seconds": 1.0}
    for changes, why in (
        ({"recent_tokens": 960}, "short: fewer than 4 blocks"),
        ({"index_budget": 0}, "no codes yet"),
        (rates, "to look would take longer than to read all"),
        ({}, "queries that are not finite"),
    ):
        with filled(k, v, **changes) as cache, _quiet():
            ask(cache.session, q if changes else mad)
            layer = cache.explain().layers[0]
            assert why in layer.outcome
            assert why in str(cache.explain())
            assert (layer.plan, layer.mass, layer.attended) == ("2 flat", (1, 1), (1000, 1000))
    with filled(k.double(), v.double()) as cache:
        ask(cache.session, q)
        assert cache.explain().layers[0].outcome == "keys are torch.float64"


@pytest.mark.parametrize("room", [ROOM, TIGHT], ids=["in memory", "on ssd"])
@pytest.mark.parametrize("read_rate", [1.0, 1e12])
def test_a_budget_of_bytes_is_kept_even_where_to_read_all_is_faster(room: dict[str, Any], read_rate: float) -> None:
    """Two layers, whose heads all want everything: they have half of it each, and say what they leave out."""
    k, v = kv(2000)
    v += torch.arange(2000)[:, None] / 500
    q = 0.3 * torch.randn(1, 8, 1, 16)
    budget, row = 20_000, 2 * 16 * 4
    with filled(k, v, attention_budget=budget, read_rate=read_rate, **room) as cache:
        cache.session.update(1, k, v)
        cache.build_index()
        for _ in range(3):
            for layer in (0, 1):
                got = cache.session.attention(layer, q, [Visible.all(2000, 1)], 0.25)
                assert float((got - truth(k, v, q)).norm() / truth(k, v, q).norm()) < 0.05
        for plans in cache.explain().layers:
            assert plans.most is not None
            assert 0 < plans.most * row * 2 <= budget / 2
            assert plans.found == (plans.most, plans.most)
            assert plans.gave_up == 0
            assert max(plans.mass) < 0.3
        if room is ROOM:
            assert plans.most == budget // 2 // 2 // row
        assert (used(cache).steps, used(cache).exact) == (8 * 2 * 3, 0)
    with filled(k, v, attention_budget="1GiB") as cache:  # enough for everything: the plan is what it would be
        ask(cache.session, q)
        assert used(cache).exact == 8


@pytest.mark.parametrize("room", [ROOM, TIGHT], ids=["in memory", "on ssd"])
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_any_set_of_ranges_is_all_that_is_seen(mode: str, room: dict[str, Any]) -> None:
    k, v = kv(2000)
    q = 12 * torch.randn(1, 8, 1, 16)
    ranges = [(1990, 2000), (3, 9), (9, 25), (30, 31), (64, 1000), (1003, 1005), (1007, 1009), (1500, 1900)]
    seen = torch.zeros(2000, dtype=torch.bool)
    for start, end in ranges:
        seen[start:end] = True
    want = truth(k[:, :, seen], v[:, :, seen], q)
    with filled(k, v, **(room | {"mode": mode} | ({"measure_mass": True} if mode == "sparse" else {}))) as cache:
        got = cache.session.attention(0, q, [Visible.only(ranges, 1)], 0.25)
        assert float((got - want).norm() / want.norm()) < (1e-5 if mode == "exact" else 0.02)
        if mode == "sparse":
            assert used(cache).steps == 8
            assert used(cache).visible == 8 * int(seen.sum())
            assert used(cache).true_recovered / used(cache).measured > 0.9
        nothing = cache.session.attention(0, q, [Visible.only([], 1)], 0.25)
        assert not nothing.any()
        wait(cache)
        assert cache.session.engine.mover.ledger.pinned_count() == 0
    for bad in ((-1, 5), (7, 6)):
        with pytest.raises(InputError, match="no range"):
            Visible.only([bad], 1)


def test_a_prompt_is_attended_sparsely_where_that_is_asked_for() -> None:
    """Over a long stored context, in pieces; each query sees what came before it."""
    k, v = kv(2000)
    q = 12 * torch.randn(1, 8, 100, 16)
    want = truth(k, v, q)
    for sparse, steps in ((True, 800), (False, 0)):
        with filled(k, v, sparse_prefill=sparse) as cache:
            got = ask(cache.session, q)
            assert float((got - want).norm() / want.norm()) < 0.03
            assert used(cache).steps == steps
            assert not sparse or used(cache).attended < 0.3 * used(cache).visible
    with filled(k, v, sparse_prefill=True) as cache:  # where all keys matter the rest is attended exactly, at once
        torch.testing.assert_close(ask(cache.session, 0.01 * q).double(), truth(k, v, 0.01 * q), atol=1e-5, rtol=1e-4)
        assert used(cache).steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_closing_while_another_thread_works(mode: str) -> None:
    """Appending, attending, forking and coding either end or say that the session is closed; nothing else."""
    for seed in range(25):
        rng = random.Random(seed)
        cache = AlayaCache(**(SIZES | rng.choice([TIGHT, ROOM]) | {"mode": mode}))
        closer = threading.Timer(rng.random() * 0.1, cache.close)
        forks, q = [cache], 12 * torch.randn(1, 8, 1, 16)
        k, v = kv(150)
        closer.start()
        try:
            while True:
                one = rng.choice(forks)
                one.session.update(0, k, v)
                if rng.random() < 0.7:
                    assert ask(one.session, q).isfinite().all()
                if rng.random() < 0.2 and len(forks) < 3:
                    forks.append(copy.deepcopy(one))
                if rng.random() < 0.1:
                    one.build_index()
                if one.session.length(0) > 2000:
                    one.session.crop(200)
        except SessionClosed:
            pass
        closer.join()


@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_closing_while_the_first_layer_comes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A close that falls into the making of the tiers is not forgotten: the cache does not come back to life."""
    cache = AlayaCache(**(SIZES | ROOM | {"mode": mode}))
    engine, begun = cache.session.engine, threading.Event()
    start = engine._start

    def slow(*arguments: Any) -> None:
        closer.start()
        begun.wait(0.2)
        start(*arguments)

    def close() -> None:
        cache.close()
        begun.set()

    closer = threading.Thread(target=close)
    monkeypatch.setattr(engine, "_start", slow)
    with contextlib.suppress(SessionClosed):
        cache.session.update(0, *kv(100))
    closer.join()
    assert engine.closed
    with pytest.raises(SessionClosed):
        cache.session.update(0, *kv(100))


@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_questions_that_make_no_sense(mode: str) -> None:
    k, v = kv(1000)
    q, seen = torch.randn(1, 8, 1, 16), [Visible.all(1000, 1)]
    with filled(k, v, mode=mode) as cache:
        session = cache.session
        ask(session, q)
        for wrong, says in (
            ((1, q, seen, 0.25), "layer 1 holds no keys"),
            ((0, q[..., :8], seen, 0.25), "queries"),
            ((0, q[:, :7], seen, 0.25), "a multiple of 2 heads"),
            ((0, q[0], seen, 0.25), "queries"),
            ((0, q, [], 0.25), "one Visible for each of 1 rows"),
            ((0, q, [*seen, *seen], 0.25), "one Visible"),
            ((0, q, [Visible.all(1000, 2)], 0.25), "of 1 queries each"),
            ((0, q, seen, math.nan), "scale nan"),
            ((0, q, seen, 0.25, 0.0), "softcap"),
            ((0, q, seen, 0.25, None, torch.zeros(3)), "sinks are one logit for each of 8"),
        ):
            with pytest.raises(InputError, match=says):
                session.attention(*wrong)
        assert str(cache.explain()).startswith("mode='exact'" if mode == "exact" else "layer")


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"alpha": 0.0}, {"alpha": 2.0}, {"index_bits": 3}, {"index_sure": -1.0}, {"most_selected": -1}):
        with pytest.raises(ConfigError):
            AlayaCache(**(SIZES | wrong))


@pytest.mark.parametrize("heads", [4, 40, 128])
def test_latents_are_compared_as_whole_rows(heads: int) -> None:
    """MLA: what is looked for is [latent | rotary key], what is summed is the latent. 128 heads: DeepSeek-V3."""
    latent, rotary = torch.randn(1, 1, 1000, 32), torch.randn(1, 1, 1000, 8)
    rows = torch.cat([latent, rotary], -1)
    q = 4 * torch.randn(1, 1, 1, 40) + 0.2 * torch.randn(1, heads, 1, 40)  # they want much the same
    with filled(latent, rotary, alpha=0.01, index_sure=0, measure_mass=True) as cache:
        want = truth(rows, latent, q)
        for _ in range(2):  # the codes were made for the other way; then there are none
            got = cache.session.attention(0, q, [Visible.all(1000, 1)], 0.25, latent=True)
            assert float((got - want).norm() / want.norm()) < 0.03
            cache.build_index()
        use = used(cache)
        assert use.steps == heads
        assert use.attended < 0.6 * use.visible
        assert abs(use.recovered - use.true_recovered) < 0.02 * use.steps
        got = cache.session.attention(0, q[..., :32], [Visible.all(1000, 1)], 0.25)  # and back
        want = truth(latent, rotary, q[..., :32])
        assert float((got - want).norm() / want.norm()) < 0.03


def test_a_model_with_latents_decodes_sparsely() -> None:
    model = deepseek()
    ids, budgets = prompt(1, 700), {"device_budget": "4MiB", "host_budget": "4MiB"}
    with torch.no_grad(), AlayaCache.for_model(model, **(SIZES | budgets | {"most_selected": 50})) as cache:
        model(input_ids=ids, past_key_values=cache)
        cache.build_index()
        got = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
        assert (used(cache).steps, used(cache).exact) == (2 * 4, 0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(input_ids=torch.cat([ids, torch.tensor([[5]])], 1)).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("read_rate", "pick_seconds"), [(1.0, 1e-12), (1e12, 2e-10)], ids=["look deeper", "read everything"]
)
def test_heads_attend_to_the_share_that_is_asked_for(read_rate: float, pick_seconds: float) -> None:
    """Keys that all matter a little: alpha alone leaves most of them to the estimate."""
    k, v = kv(2000)
    q = 1.5 * torch.randn(1, 8, 1, 16)
    rates = {"read_rate": read_rate, "pick_seconds": pick_seconds, "scan_rate": 1e15, "look_seconds": 1e-12}
    with filled(k, v, alpha=0.3, least_mass=0.0, measure_mass=True, **rates) as cache:
        ask(cache.session, q)
        assert used(cache).true_least < 0.5
    with filled(k, v, alpha=0.3, least_mass=0.8, measure_mass=True, **rates) as cache:
        for step in range(2):
            cache.session.engine.sparse = SparseUse()
            got, want = ask(cache.session, q), truth(k, v, q)
            use = used(cache)
            assert use.steps + use.exact == 8
            assert use.least >= 0.8
            assert use.true_least > 0.75
            assert float((got - want).norm() / want.norm()) < 0.05
            once = 2 * 125 * Layout(BLOCK, 16, 16, 4).nbytes
            assert use.scanned_bytes > once if step == 0 else use.scanned_bytes <= once  # it remembers
        alphas = cache.session.explain().layers[0].alphas
        assert all(0 < alpha < 0.3 for alpha in alphas)
    with filled(k, v, alpha=0.3, least_mass=0.8, most_selected=10) as cache:
        ask(cache.session, q)
        assert used(cache).least < 0.5  # a budget is a budget, and it says so


def deepseek() -> Any:
    torch.manual_seed(2)
    config = transformers.DeepseekV3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model: Any = transformers.DeepseekV3ForCausalLM(config)
    return model.eval()
