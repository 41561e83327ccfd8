"""Promises of codes against a dict that says the same."""

import random

import numpy as np

from alaya_tiers.promises import Promise, Promises


def test_they_say_what_a_dict_would() -> None:
    rng = random.Random(3)
    promises, model = Promises[str](), dict[int, tuple[Promise[str], int]]()
    for step in range(300):
        first = np.array(rng.sample(range(0, 4000, 4), rng.randrange(40)), np.int64)
        if rng.random() < 0.6:
            promise, runs = Promise(f"source {step}", rng.randrange(3)), rng.sample(range(99), first.size)
            promises.add(promise, first, np.array(runs, np.int64))
            model |= {block: (promise, run) for block, run in zip(first.tolist(), runs, strict=True)}
        else:
            promises.forget(first)
            model = {block: known for block, known in model.items() if block not in first}
        asked = np.array(rng.sample(range(0, 6000, 4), 300), np.int64)
        assert promises.holds(asked).tolist() == [block in model for block in asked.tolist()]
        wanted = dict[Promise[str], list[tuple[int, int]]]()
        for block in asked.tolist():
            if block in model:
                wanted.setdefault(model[block][0], []).append((model[block][1], block))
        found = promises.of(asked)
        assert len(found) == len(wanted)
        for promise, some in found:
            some, runs_of_some = promises.still(some, promise)
            assert list(zip(runs_of_some.tolist(), some.tolist(), strict=True)) == sorted(wanted[promise])
            same = [model.get(block, (None,))[0] == promise for block in asked.tolist()]
            assert promises.holds(asked, promise).tolist() == same
    assert len(promises._made) == len({promise for promise, _ in model.values()}) > 0
    promises.forget(np.arange(10_000))
    assert not promises
    assert promises.of(np.arange(10_000)) == []


def test_what_is_promised_twice_is_one_promise() -> None:
    """Two sequences of one stored context: the same codes for different blocks."""
    promises, promise = Promises[str](), Promise("source", 1)
    promises.add(promise, np.array([8, 0]), np.array([1, 0]))
    promises.add(Promise("source", 1), np.array([16, 24]), np.array([0, 2]))
    promises.add(Promise("another", 1), np.array([32]), np.array([0]))
    promises.forget(np.array([8]))
    first, runs = promises.still(np.array([24, 8, 0, 16, 32]), promise)
    assert list(zip(first.tolist(), runs.tolist(), strict=True)) == [(0, 0), (16, 0), (24, 2)]
