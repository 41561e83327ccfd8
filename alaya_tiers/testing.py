"""What every memory tier and eviction policy must do, as test classes: subclass with a way to make one.

Indexes: testing_index.py. A simulated world to run it all in: testing_world.py. Needs no test framework; the classes
work under pytest.
"""

import random

import numpy as np

from alaya_tiers.blocks import PAGE
from alaya_tiers.policies import EvictionPolicy, EvictionView
from alaya_tiers.tiers.base import Accountant, MemoryTier


class MemoryTierTests:
    """What every memory tier does. A subclass says how to make one of ``slots`` slots of ``slot_bytes``."""

    slots, slot_bytes = 37, PAGE

    def make(self, accountant: Accountant, budget: int) -> MemoryTier:
        """A tier of ``budget`` bytes, charged to ``accountant`` under its own name."""
        raise NotImplementedError

    def _made(self, spare: int = 0) -> tuple[MemoryTier, Accountant]:
        budget = self.slots * self.slot_bytes + spare
        accountant = Accountant({"device": budget, "host": budget})
        return self.make(accountant, budget), accountant

    def test_capacity_is_what_the_budget_holds(self) -> None:
        tier, accountant = self._made(spare=self.slot_bytes - 1)
        assert (tier.capacity, tier.free, tier.slot_bytes) == (self.slots, self.slots, self.slot_bytes)
        assert accountant.used[tier.name] <= self.slots * self.slot_bytes
        tier.close()

    def test_take_is_all_or_nothing(self) -> None:
        tier, _ = self._made()
        slots = tier.take(self.slots - 1)
        assert slots is not None
        assert len(set(slots.tolist())) == slots.size == self.slots - 1
        assert tier.take(2) is None
        assert tier.free == 1
        assert [a is not None and a.size for a in (tier.take(0), tier.take(1), tier.take(0))] == [0, 1, 0]
        tier.give(slots)
        assert tier.free == self.slots - 1
        tier.close()

    def test_a_double_give_is_refused(self) -> None:
        tier, _ = self._made()
        slots = tier.take(3)
        assert slots is not None
        tier.give(slots[:1])
        for wrong in (slots[:1], slots):
            try:
                tier.give(wrong)
            except AssertionError:
                continue
            raise AssertionError("a slot was given back twice and nobody noticed")
        tier.give(slots[1:])
        assert tier.free == self.slots
        tier.close()

    def test_random_takes_and_gives_stay_in_the_budget(self) -> None:
        rng, (tier, accountant) = random.Random(0), self._made()
        held: list[int] = []
        where: dict[int, int] = {}
        for _ in range(1000):
            n = rng.randint(0, self.slots)
            if rng.random() < 0.5:
                slots = tier.take(n)
                assert (slots is None) == (n > self.slots - len(held))
                new = [] if slots is None else slots.tolist()
                assert not set(new) & set(held)
                held += new
                for slot, address in zip(new, tier.addresses(np.array(new, np.int32)).tolist(), strict=True):
                    assert where.setdefault(slot, address) == address, "a slot moved"
                    assert address % PAGE == 0
                assert not where or (np.diff(np.sort(list(where.values()))) >= self.slot_bytes).all(), "slots overlap"
            else:
                rng.shuffle(held)
                tier.give(np.array(held[:n], np.int32))
                held = held[n:]
            assert tier.free == self.slots - len(held)
            assert accountant.peak[tier.name] <= self.slots * self.slot_bytes
        tier.close()
        assert accountant.used[tier.name] == 0


class EvictionPolicyTests:
    """What every eviction policy does. A subclass says how to make one."""

    def make(self) -> EvictionPolicy:
        raise NotImplementedError

    def test_victims_are_distinct_candidates_and_the_same_for_the_same_view(self) -> None:
        rng, policy = np.random.default_rng(0), self.make()
        for size in [0, 1, 2, 3, *range(5, 200, 7)]:
            ids = rng.permutation(1000)[:size].astype(np.int64)
            layers, now = 5, 50
            columns = (rng.integers(layers, size=size, dtype=np.int32), rng.integers(9, size=size) * 16)
            view = EvictionView(ids, *columns, rng.integers(now + 1, size=size), int(rng.integers(layers)), now, layers)
            before = [a.copy() for a in (view.ids, view.layer, view.start, view.used)]
            for n in {0, 1, size // 2, size, size + 5}:
                victims = policy.victims(view, n)
                assert victims.size == min(n, size), "too few victims, or too many"
                assert set(victims.tolist()) <= set(ids.tolist())
                assert len(set(victims.tolist())) == victims.size
                assert (self.make().victims(view, n) == victims).all(), "not a function of the view"
                assert (policy.victims(view, size)[:n] == victims).all(), "whom it needs first depends on how many"
            after = (view.ids, view.layer, view.start, view.used)
            assert all((a == b).all() for a, b in zip(before, after, strict=True)), "the view was changed"
