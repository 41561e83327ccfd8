"""Belady's optimum: what no policy can beat, because it knows the future. A limit, no policy."""

from array import array
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from alaya_tiers.policies import EvictionView
from alaya_tiers.tools.traces import Request

Ids = npt.NDArray[np.int64]

NEVER = np.iinfo(np.int32).max


class Future:
    """For each request, the number of the next request that asks for each of its blocks, 4 bytes each; ``times``, when
    each request comes, in seconds."""

    def __init__(self, requests: Iterable[Request]) -> None:
        numbers: dict[int, int] = {}
        self.times = array("d")
        self._next: list[npt.NDArray[np.int32]] = []
        for request in requests:
            self.times.append(request.time)
            keys = request.blocks.tolist()
            self._next.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32))
        soonest = np.full(len(numbers), NEVER, np.int32)
        for at in range(len(self._next) - 1, -1, -1):
            blocks = self._next[at]
            self._next[at] = soonest[blocks]
            soonest[blocks] = at

    def after(self, number: int) -> npt.NDArray[np.int32]:
        """Next uses of the blocks of request ``number``, NEVER for none; int32 [blocks]."""
        return self._next[number]


class Belady:
    """What is asked for last leaves first; among what is asked for together, the end of a prefix.

    The optimum for one tier and one server, also where a hit needs all blocks before it: those are asked for with it,
    so never later. With several tiers, servers or slack it is a good guess.
    Source: Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
    """

    def __init__(self, next_use: Callable[[Ids], Ids]) -> None:
        self._next_use = next_use

    def victims(self, view: EvictionView, n: int) -> Ids:
        return view.ids[np.lexsort((-view.start, -self._next_use(view.ids)))[:n]]
