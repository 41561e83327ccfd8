"""When to write behind."""

from dataclasses import dataclass

from alaya_tiers.policies.base import Ids, WriteView


@dataclass(frozen=True, slots=True)
class Watermark:
    """Write the oldest dirty blocks while more than ``limit`` of the host tier is dirty, or somebody waits for room.

    A context that fits below the mark never touches the disk; above it, blocks are clean before their slot is wanted.
    """

    limit: float = 0.5

    def plan(self, view: WriteView) -> Ids:
        if view.wanted:
            return view.dirty
        excess = view.dirty.size + view.writing - int(self.limit * view.capacity)
        return view.dirty[: max(0, excess)]
