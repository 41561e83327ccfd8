"""Reading ahead: not at all, or the next blocks in order."""

from dataclasses import dataclass

from alaya_tiers.policies.base import Ids, PrefetchView


@dataclass(frozen=True, slots=True)
class NoPrefetch:
    """Read only what attention asks for: the baseline."""

    def plan(self, view: PrefetchView) -> Ids:
        return view.upcoming[:0]


@dataclass(frozen=True, slots=True)
class NextInOrder:
    """The next blocks in the order of the scan; never wrong in exact mode, where every block is used."""

    def plan(self, view: PrefetchView) -> Ids:
        return view.upcoming[: view.room]
