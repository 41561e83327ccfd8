"""Where cold blocks are attended: some brought to the device, the others where they lie, both at once.

The CPU reads what stays at the speed of its memory; what is brought needs the bus first. Neither waits for the other,
so a step takes as long as the slower of the two, and the best split is where both are done at the same time.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ways:
    """What the machine does. bus: bytes a second to the device; device, host: bytes of K and V attended a second there,
    for one query of each head; start: seconds until the first byte is on the device, and the result is back.
    """

    bus: float
    device: float
    host: float
    start: float = 30e-6

    def brought(self, nbytes: float) -> float:
        """Seconds to bring and attend so much: the device attends what has come while more comes."""
        return self.start + nbytes / min(self.bus, self.device) if nbytes else 0.0

    def left(self, nbytes: float) -> float:
        """Seconds to attend so much where it lies."""
        return nbytes / self.host

    def seconds(self, bring: int, blocks: int, nbytes: float) -> float:
        """Seconds of a step over ``blocks`` of ``nbytes`` each, of which so many are brought."""
        return max(self.brought(bring * nbytes), self.left((blocks - bring) * nbytes))

    def bring(self, blocks: int, nbytes: float, room: int) -> int:
        """How many of ``blocks``, ``nbytes`` each, to bring, at most ``room``, so that the step is over soonest."""
        rate = min(self.bus, self.device)
        even = (blocks * nbytes / self.host - self.start) / (nbytes / rate + nbytes / self.host)
        most = min(blocks, room)
        choices = {min(max(0, n), most) for n in (0, math.floor(even), math.ceil(even))}
        return min(choices, key=lambda n: (self.seconds(n, blocks, nbytes), n))
