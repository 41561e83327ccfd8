"""A session's keys, counted on samples of its queries."""

from collections.abc import Iterator

from torch import Tensor

from alaya_tiers.cache import Session
from alaya_tiers.needs import Needs, Samples, counted


def count_needs(session: Session, samples: Samples) -> Needs:
    """What each head of a session of one row needs, as the samples say; all keys are read twice.

    Raises InputError where the samples are not of these layers, StoreError.
    """
    layers, s = session.layers, session.engine.settings
    shapes = {n: (state.shape.geometry.kv_heads, state.shape.geometry.k_dim) for n, state in layers.items()}
    samples.fit(shapes)
    length, counts = session.length(min(layers)), {}
    inner = range(s.sink_tokens, max(s.sink_tokens, length - s.recent_tokens))
    for number, q, scale in zip(sorted(layers), samples.queries, samples.scale, strict=True):

        def keys(number: int = number) -> Iterator[tuple[int, Tensor]]:
            for lo in range(0, length, s.segment_tokens):
                yield lo, session.read(number, lo, min(length, lo + s.segment_tokens))[0][0]

        counts[number] = counted(q, keys, scale, samples.softcap, inner)
    return Needs(length, samples.queries[0].shape[1], counts)


def prime(session: Session, needs: Needs, distance: float) -> None:
    """Have the first step planned as these needs say. distance: how far below the best score a key matters."""
    session.needs = needs
    for number, state in session.layers.items():
        found = needs.found(number, distance)
        if found is not None and found.size == state.history.found.size:
            state.history.prime(found * min(1.0, state.length / needs.tokens))
