"""A trace made longer: the same requests again and again, never quite the same, for runs of millions."""

import random
from collections.abc import Iterator

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools.traces import SESSION_BITS, Request, Trace

COPY = 1 << 20
"""Files or sessions of one copy: keys of the next begin after so many."""

JITTER = 0.5
"""Gaps between requests become shorter or longer by up to this share."""


def repeated(trace: Trace, times: int, seed: int = 0) -> Trace:
    """``times`` copies one after the other; each asks for blocks of its own, at times that ``seed`` varies a little.

    Only one request is in memory at a time. Raises ConfigError.
    """
    most = 1 << (63 - SESSION_BITS - COPY.bit_length() + 1)
    if not 1 <= times <= most:
        raise ConfigError(f"a trace can be repeated from 1 to {most:,} times, not {times!r}")
    return trace if times == 1 else Trace(trace.block_tokens, lambda: _copies(trace, times, random.Random(seed)))


def _copies(trace: Trace, times: int, chance: random.Random) -> Iterator[Request]:
    now = 0.0
    for copy in range(times):
        last, keys = 0.0, copy * COPY << SESSION_BITS
        for request in trace.requests():
            now += (request.time - last) * chance.uniform(1 - JITTER, 1 + JITTER)
            last = request.time
            yield request._replace(time=now, blocks=request.blocks + keys)
