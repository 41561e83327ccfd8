"""The graph index: right in what it finds, as good as it says, and safe whatever its arrays hold."""

import math
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alaya_tiers.errors import InputError
from alaya_tiers.index import Graph, Index
from alaya_tiers.testing_index import BETA, HEAD, ApproximateIndexTests, head_keys, truth
from alaya_tiers.tools.synthetic import KINDS

TOKENS = 4096


class TestGraph(ApproximateIndexTests):
    recall = 0.95

    def make(self, keys: Tensor) -> Index:
        return Graph.build(keys, beam=256)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph.build(head_keys(TOKENS))


def queries(step: int) -> Tensor:
    return HEAD.queries(KINDS["sharp"], step, TOKENS)


def literal(
    links: Any, scores: list[float], k0: int, l0: int, beta: float, seed: float = -math.inf
) -> tuple[set[int], int]:
    """Algorithm 1 of the paper, word by word: what it returns, and how many keys it compared."""
    candidates, visited, i = [k0], {k0}, 0
    while i < len(candidates):
        c, i = candidates[i], i + 1
        for k in links[c][links[c] >= 0].tolist():
            if k in visited:
                continue
            best = max(seed, max(scores[x] for x in candidates))
            visited.add(k)
            if len(candidates) <= l0 or scores[k] >= best - beta:
                candidates.append(k)
    best = max(seed, max(scores[x] for x in candidates))
    return {x for x in candidates if scores[x] >= best - beta}, len(visited)


class TestAgainstTheLiteralAlgorithm:
    def test_both_find_the_set_where_queries_are_like_keys(self) -> None:
        keys = torch.randn(1500, 16)
        graph = Graph.build(keys)
        wanted = ours = theirs = scored = compared = 0
        for _ in range(20):
            q = keys[torch.randint(1500, (1,))] + 0.3 * torch.randn(1, 16)
            must, may = truth(keys, q, 3.0)
            got, n = literal(graph.neighbours, (q @ keys.T)[0].tolist(), int(graph.entries[0]), 64, 3.0)
            walk = graph.walk(q, 3.0)
            found = set(walk.found.tokens.tolist())
            assert (got | found) <= may
            wanted, ours, theirs = wanted + len(must), ours + len(found & must), theirs + len(got & must)
            scored, compared = scored + walk.scored, compared + n
        assert min(ours, theirs) >= 0.95 * wanted
        assert scored < compared  # best first is why

    def test_a_seed_stops_the_literal_walk_and_not_ours(self, graph: Graph) -> None:
        """The seed is the true maximum, the best a window can know. Pruned by it, few stepping stones are kept."""
        keys, ours = head_keys(TOKENS), Graph.from_arrays(graph.arrays(), beam=16)
        wanted, found = 0, np.zeros(4, int)
        for step in range(0, 128, 16):
            q = queries(step)
            scores = q @ keys.T
            must, _ = truth(keys, q, BETA)
            wanted += len(must)
            answers: list[set[int]] = []
            for seed in (torch.full((4,), -torch.inf), scores.amax(1)):
                literally = [literal(graph.neighbours, row.tolist(), int(graph.entries[0]), 8, BETA, float(best))
                             for row, best in zip(scores, seed, strict=True)]  # fmt: skip
                answers.append(set().union(*(got for got, _ in literally)))
                answers.append(set(ours.walk(q, BETA, seed=seed).found.tokens.tolist()))
            found += [len(answer & must) for answer in answers]
        theirs, own, seeded_theirs, seeded_own = found
        assert theirs > 0.8 * wanted
        assert seeded_theirs < 0.5 * theirs
        assert own > 0.8 * wanted
        assert seeded_own >= 0.98 * own


class TestWhatTheCallerKnows:
    def test_a_seed_above_all_keys_leaves_nothing(self, graph: Graph) -> None:
        q = queries(0)
        assert not len(graph.walk(q, 1.0, seed=torch.full((4,), 1e9)).found.tokens)

    def test_the_last_steps_keys_lead_to_this_steps(self, graph: Graph) -> None:
        """With the right keys to start from, the smallest beam finds them and what is linked to them."""
        narrow = Graph.from_arrays(graph.arrays(), beam=1)
        before = after = wanted = 0
        for step in range(0, 64, 16):
            must, _ = truth(head_keys(TOKENS), q := queries(step), BETA)
            before += len(must & set(narrow.walk(q, BETA).found.tokens.tolist()))
            start = np.array(sorted(must)[::2])
            after += len(must & set(narrow.walk(q, BETA, entries=start).found.tokens.tolist()))
            wanted += len(must)
        assert after >= before
        assert after > 0.6 * wanted

    @pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
    def test_a_prefix_is_searched_as_if_it_were_all(self, share: float) -> None:
        kept, wanted, n = 0, 0, int(share * TOKENS)
        keys = head_keys(TOKENS)
        graph = Graph.build(keys, beam=256)
        for step in range(0, 128, 16):
            q = HEAD.queries(KINDS["topical"], step, TOKENS)
            found = graph.walk(q, BETA, ranges=np.array([[0, n]])).found
            must, may = truth(keys[:n], q, BETA)
            got = set(found.tokens.tolist())
            assert max(got) < n
            kept, wanted = kept + len(got & may), wanted + len(must)
        assert kept >= 0.9 * wanted

    @given(cuts=st.lists(st.integers(0, 300), min_size=2, max_size=8).filter(lambda x: len(x) % 2 == 0))
    def test_nothing_outside_any_ranges_is_found_or_compared(self, cuts: list[int]) -> None:
        torch.manual_seed(0)
        keys = torch.randn(300, 8)
        ranges = np.array(sorted(cuts)).reshape(-1, 2)
        asked = np.concatenate([np.arange(a, b) for a, b in ranges])
        walk = Graph.build(keys, degree=4, beam=8).walk(torch.randn(3, 8), 2.0, ranges=ranges)
        assert set(walk.found.tokens.tolist()) <= set(asked.tolist())
        assert bool(len(walk.found.tokens)) == bool(len(asked))
        assert walk.scored <= len(set(asked.tolist()))

    def test_wrong_hints_are_refused(self, graph: Graph) -> None:
        q = queries(0)
        for seed in (torch.zeros(3), torch.zeros(4, 1), torch.full((4,), math.nan)):
            with pytest.raises(InputError, match="seed"):
                graph.walk(q, 1.0, seed=seed)
        for entry in (-1, TOKENS):
            with pytest.raises(InputError, match="entries"):
                graph.walk(q, 1.0, entries=np.array([entry]))
        for ranges in ([[5, 3]], [[0, TOKENS + 1]], [[-1, 2]], [[10, 20], [15, 30]]):
            with pytest.raises(InputError, match="ranges"):
                graph.walk(q, 1.0, ranges=np.array(ranges))
        with pytest.raises(InputError, match="64 queries"):
            graph.walk(torch.ones(65, 64), 1.0)


@pytest.mark.parametrize("ranges", [[[0, 800]], [[0, 160]], [[3, 90], [90, 200], [500, 500], [701, 799]]])
@pytest.mark.parametrize("dim", [1, 7, 16, 37])
def test_every_instruction_set_walks_the_same_way(instructions: int, dim: int, ranges: list[list[int]]) -> None:
    keys, q = torch.randint(-8, 8, (800, dim)).float(), torch.randint(-8, 8, (6, dim)).float()  # exact in any order
    neighbours = np.random.default_rng(0).integers(0, 800, (800, 8)).astype(np.int32)
    neighbours[neighbours == np.arange(800)[:, None]] = -1
    neighbours = -np.sort(-neighbours, 1)
    graph = Graph(keys.numpy(), neighbours, np.array([0], np.int32), beam=5)
    found, scored = graph.walk(q, 5.0, ranges=np.array(ranges))
    torch.testing.assert_close(found.scores, q @ keys[found.tokens].T, rtol=0, atol=0)
    assert (found.tokens.tolist(), scored) == walked(graph, q, 5.0, ranges)


def walked(graph: Graph, q: Tensor, beta: float, ranges: list[list[int]]) -> tuple[list[int], int]:
    """The walk in plain Python: a beam for each query in turn, then all that is near. Found, and how many scored."""
    scores = (q @ torch.from_numpy(graph.keys).T).numpy()
    asked = [key for low, high in ranges for key in range(low, high)]
    listed: list[int] = []
    seen: set[int] = set()
    expanded: set[int] = set()
    beams: list[list[int]] = [[] for _ in q]

    def near(key: int) -> list[int]:
        return [int(k) for k in graph.neighbours[key] if k >= 0]

    def take(fresh: list[int], seat: bool) -> None:
        listed.extend(fresh)
        for key in fresh if seat else []:
            for row, beam in zip(scores, beams, strict=True):
                beam.append(key)
                beam.sort(key=lambda k, row=row: -row[k])  # type: ignore[misc] # stable: of equals the first stays
                del beam[graph.beam :]

    def expand(key: int, seat: bool) -> None:
        expanded.add(key)
        fresh: list[int] = []
        for k in near(key):
            if k in asked:
                fresh += [k] if k not in seen else []
                seen.add(k)
            elif len(fresh) < 2 * graph.neighbours.shape[1] and k not in seen:
                seen.add(k)
                for behind in near(k):
                    fresh += [behind] if behind in asked and behind not in seen else []
                    seen.update([behind] if behind in asked else [])
        take(fresh, seat)

    starts = [*graph.entries.tolist(), *(asked[i * len(asked) // 16] for i in range(16))]
    fresh = [key for key in dict.fromkeys(starts) if key in asked]
    seen.update(fresh)
    take(fresh, True)
    while any(set(beam) - expanded for beam in beams):
        for beam in beams:
            if waiting := [key for key in beam if key not in expanded]:
                expand(waiting[0], True)
    for key in listed:  # grows on the way
        if key not in expanded and (scores[:, key] >= scores[:, listed].max(1) - beta).any():
            expand(key, False)
    bar = scores[:, listed].max(1) - beta
    return sorted(key for key in listed if (scores[:, key] >= bar).any()), len(listed)


class TestArrays:
    def test_they_are_all_there_is(self, graph: Graph) -> None:
        again = Graph.from_arrays(graph.arrays())
        q = queries(3)
        assert torch.equal(again.in_range(q, BETA).tokens, graph.in_range(q, BETA).tokens)
        assert graph.nbytes == TOKENS * 32 * 4 + 4
        assert graph.neighbours.shape == (TOKENS, 32)

    def test_they_may_lie_in_files(self, graph: Graph, tmp_path: Path) -> None:
        for name, array in graph.arrays().items():
            np.save(tmp_path / f"{name}.npy", array)
        arrays = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in graph.arrays()}
        again = Graph.from_arrays(arrays)
        assert torch.equal(again.in_range(queries(3), BETA).tokens, graph.in_range(queries(3), BETA).tokens)

    @given(
        name=st.sampled_from(["keys", "neighbours", "entries"]),
        how=st.sampled_from(["drop", "cut", "type", "axes", "value", "self", "hole", "empty"]),
        value=st.sampled_from([-2, 300, 2**31 - 1, -(2**31)]),
        place=st.integers(0, 10**6),
    )
    def test_a_damaged_one_is_refused(self, name: str, how: str, value: int, place: int) -> None:
        torch.manual_seed(0)
        keys = torch.randn(300, 8)
        arrays = {k: v.copy() for k, v in Graph.build(keys, degree=4).arrays().items()}
        if how == "drop":
            del arrays[name]
        elif how == "cut":
            arrays[name] = arrays[name][:-1]
        elif how == "type":
            arrays[name] = arrays[name].astype(np.float64)
        elif how == "axes":
            arrays[name] = arrays[name][None]
        elif how == "value":
            arrays[name].flat[place % arrays[name].size] = math.nan if name == "keys" else value
        elif how == "self":
            arrays["neighbours"][place % 300, 0] = place % 300
        elif how == "hole":
            arrays["neighbours"][place % 300, :2] = [-1, (place + 1) % 300]
        else:
            arrays[name] = arrays[name][:0]
        with pytest.raises(InputError):
            Graph.from_arrays(arrays)

    def test_what_changes_behind_its_back_harms_no_memory(self) -> None:
        graph = Graph.build(torch.randn(500, 8))
        graph.neighbours[:] = np.random.default_rng(0).integers(-(2**31), 2**31, graph.neighbours.shape)
        found = graph.in_range(torch.randn(4, 8), math.inf)
        assert len(found.tokens) <= 500


class TestBuild:
    def test_one_thread_gives_the_same_graph_every_time(self) -> None:
        keys = torch.randn(700, 12)
        one, other = Graph.build(keys), Graph.build(keys)
        assert (one.neighbours == other.neighbours).all()

    def test_neighbours_are_near_however_many_threads(self) -> None:
        """With threads hnswlib numbers keys in the order they happen to arrive: labels are what counts."""
        keys = torch.randn(3000, 8)
        graph = Graph.build(keys, threads=4)
        centred = keys - keys.mean(0)
        scores = centred @ centred.T
        links = torch.from_numpy(graph.neighbours).long()
        near = scores.gather(1, links.clamp_min(0))[links >= 0].mean()
        assert near > scores.mean() + scores.std()

    def test_centring_is_what_makes_it_good(self) -> None:
        """Keys far from the origin: a graph of inner products would link all of them to the same few."""
        keys = torch.randn(2000, 16) + 20.0
        q = torch.randn(8, 16)
        must, _ = truth(keys, q, 1.0)
        got = set(Graph.build(keys).in_range(q, 1.0).tokens.tolist())
        assert len(got & must) >= 0.9 * len(must)

    def test_it_can_be_stopped_and_done_again(self) -> None:
        keys, told = torch.randn(5000, 8), []

        def stop(done: int, of: int) -> None:
            told.append((done, of))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Graph.build(keys, say=stop)
        assert told == [(2048, 5000)]
        told.clear()
        Graph.build(keys, say=lambda done, of: told.append((done, of)))
        assert told == [(2048, 5000), (4096, 5000), (5000, 5000)]

    def test_wrong_knobs_and_keys_are_refused(self) -> None:
        keys = torch.randn(10, 4)
        for knobs in ({"degree": 1}, {"ef_construction": 0}, {"threads": 0}, {"beam": 0}):
            with pytest.raises(InputError):
                Graph.build(keys, **knobs)  # type: ignore[arg-type]
        for wrong in (torch.randn(10), torch.randn(10, 0), torch.full((3, 3), 1e30), torch.full((3, 3), math.nan)):
            with pytest.raises(InputError):
                Graph.build(wrong)

    def test_an_hnswlib_that_keeps_it_otherwise_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Newer(hnswlib.Index):  # type: ignore[misc]
            def __getstate__(self) -> Any:
                (state,) = super().__getstate__()
                return ({**state, "ser_version": 2},)

        monkeypatch.setattr(hnswlib, "Index", Newer)
        with pytest.raises(InputError, match=r"hnswlib 0\.8"):
            Graph.build(torch.randn(10, 4))
