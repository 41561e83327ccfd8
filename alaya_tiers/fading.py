"""Counts of uses of which older ones count less and less, without touching all counts at every step."""

from typing import Any

import numpy as np
import numpy.typing as npt

HALF_LIFE = 16.0
"""Steps after which a use counts half as much."""

MOST = 60.0
"""Half-lives after which all counts are scaled down, before they grow beyond what a float32 holds."""


class Fading:
    """What a use is worth now, on a scale that grows: twice as much every half-life, so that counts can be added.

    Source: forward decay, Cormode et al., ICDE 2009, section 4.
    """

    def __init__(self) -> None:
        self._epoch = 0

    def worth(self, counts: npt.NDArray[np.floating[Any]], tick: int, half_life: float) -> float:
        """Of a use at ``tick``. half_life: in ticks. All ``counts`` so far are scaled where they must."""
        power = (tick - self._epoch) / half_life
        if power > MOST:
            counts *= 2.0**-power
            self._epoch, power = tick, 0.0
        return float(2.0**power)
