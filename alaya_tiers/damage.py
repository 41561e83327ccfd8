"""What damage does to what is stored: which tokens can still be used, whose they are, what is left without them."""

from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np

from alaya_tiers.config import OnCorrupt
from alaya_tiers.manifest import Context, Manifest, Segment

ADVICE: dict[OnCorrupt, str] = {
    "raise": "make the session with on_corrupt='recompute', or drop what is damaged: alaya-tiers verify --repair",
    "recompute": "call create_session() again: it reuses what is before the damage, and store() mends the rest",
    "drop": "call create_session() again: it forgets what is damaged",
}
"""What whoever met damage should do, by the setting ``on_corrupt``."""


class Place(NamedTuple):
    """One run of blocks on disk. folder: that of its array, inside the store. run: its number in the segment."""

    folder: str
    run: int


def usable(segment: Segment, damaged: AbstractSet[Place]) -> int:
    """How many first tokens of a segment are in no damaged block."""
    left = int(segment.tokens.size)
    for layer in segment.layers.values():
        for number, folder in enumerate(layer.files):
            bad = [run for run in np.flatnonzero(layer.where == number).tolist() if Place(folder, run) in damaged]
            left = min([left, *(run * layer.block_tokens for run in bad)])
    return left


def needing(manifest: Manifest, names: Collection[str]) -> tuple[str, ...]:
    """The contexts that need any of these segments."""
    wanted = set(names)
    return tuple(c for c in manifest.contexts if not wanted.isdisjoint(manifest.chain(c)))


def shortened(manifest: Manifest, damaged: Collection[str]) -> Manifest:
    """The next generation, in which contexts that need damaged segments end before the first of them, or are gone."""
    bad, contexts = set(damaged), dict[str, Context]()
    for context in manifest.contexts.values():
        whole = list[str]()
        for name in manifest.chain(context.id):
            if name in bad:
                break
            whole.append(name)
        if whole:
            last = manifest.segments[whole[-1]]
            left = Context(whole[-1], last.start + last.tokens, context.created)
            contexts.setdefault(left.id, manifest.contexts.get(left.id, left))
    return manifest.only(contexts)
