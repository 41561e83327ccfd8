"""What a session on a stored prefix would read for its first token, weighed against computing the prefix again."""

import numpy as np

from alaya_tiers.cache import Session
from alaya_tiers.policies.reuse import Reuse, ReusePolicy, ReuseView


def weigh(session: Session, policy: ReusePolicy, tokens: int, prefill: float | None) -> Reuse:
    """Whether what ``session`` holds is worth having. Nothing is read.

    tokens: of all rows together. prefill: measured seconds of a token, None where nothing was measured.
    """
    view = ReuseView(tokens, cold_bytes(session), session.engine.settings.ssd_rate, prefill)
    return policy.decide(view)


def cold_bytes(session: Session) -> int:
    """Bytes that must come from ssd before the first token: all blocks not in memory; in sparse mode their codes.

    Which blocks a sparse step will ask for beside its window is known when it has looked; as a rule few.
    """
    engine, cold = session.engine, 0
    for state in session.layers.values():
        ids = np.unique(np.concatenate([state.ids(row.first).ravel() for row in state.rows]))
        with engine.mover.lock:
            book = engine.mover.ledger
            ids = ids[~book.readable(ids)]
            uncoded = int(np.count_nonzero(book.code[ids] < 0))
        if engine.partitions is not None:
            cold += uncoded * engine.partitions.layout_of(state.number, state.shape).nbytes
        else:
            cold += ids.size * state.shape.nbytes
    return cold
