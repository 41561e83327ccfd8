"""What the query of one layer finds among the keys of the next: what that may want, before its own query is known.

Layers add to one stream, so that queries of neighbours look for related things. Only codes in memory are looked at: the
mean keys of all cold blocks, then the keys of the few blocks whose means score best.
"""

import math

import numpy as np

from alaya_tiers.blocks import PAGE
from alaya_tiers.index.codes import Reach, boundable, mean_scores, scan
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.listed import Asked
from alaya_tiers.partitions import Partitions
from alaya_tiers.picks import pageable

BLOCKS = 16
"""Blocks of each kv head whose keys are looked at."""

KEYS = 64
"""Keys of each kv head that are named at most."""


def foreseen(asked: Asked, after: Layer, row: Row, partitions: Partitions) -> Ids:
    """Names of pages of a row of the next layer, ascending; none where it cannot be asked the same. See pages.Pages.

    asked: of the layer before. May take a millisecond or two at a million tokens; no lock is held meanwhile.
    """
    nothing, g, settings = np.empty(0, np.int64), after.shape.geometry, after.engine.settings
    size = after.shape.tokens
    low, high = -(-settings.sink_tokens // size), (after.length - settings.recent_tokens) // size
    layout = partitions.layout_of(after.number)
    same = asked.q.shape[0] == g.kv_heads and asked.q.shape[2] == layout.k_dim
    if high <= low or not same or not boundable(asked.q):
        return nothing
    ids = after.ids(row.first[low:high])
    ids = ids[:, pageable(after, ids.ravel()).reshape(ids.shape).any(0)]
    known = partitions.here(ids)
    if not known.codes.size:
        return nothing
    ids = ids[:, known.coded]
    scores = mean_scores(asked.q, known.codes, layout).numpy()
    best = np.argsort(-scores, axis=1, kind="stable")[:, :BLOCKS]
    full = np.full(best.shape[1], size, np.int32)
    found = scan(
        asked.q, np.take_along_axis(known.codes, best, 1), np.zeros_like(full), full, layout,
        Reach(-math.log(settings.alpha), KEYS, settings.index_sure or None), asked.scale, asked.softcap,
    ).tokens  # fmt: skip
    names, pages = [nothing], after.engine.pages
    assert pages is not None
    for head, tokens in enumerate(found):
        blocks = ids[head, best[head, tokens // layout.rows]]
        names.append(blocks * pages.per + tokens % layout.rows * g.row_bytes // PAGE)
    return np.unique(np.concatenate(names))
