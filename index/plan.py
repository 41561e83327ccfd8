"""The plan of a layer's next decode step: look for the keys that matter, or read all of them."""

from dataclasses import dataclass

LIST_COST, SCAN_COST = 3.0, 0.3
"""Of a token picked singly, and of a token's code, against a token read in order. Measured: docs/benchmarks.md."""

LONGEST_PAUSE = 63
"""Steps in a row that a layer reads everything without asking whether it still must."""


@dataclass(slots=True)
class History:
    """What a layer's queries needed lately: the plan of its next step.

    Where so many keys are within reach that reading all of them in order is faster than picking those, the layer
    attends exactly, and is asked again after ``pause`` steps, each time twice as many.
    """

    pause: int = 0
    left: int = 0

    def skips(self) -> bool:
        """Whether this step does not even look."""
        if not self.left:
            return False
        self.left -= 1
        return True

    def judge(self, found: int, tokens: int) -> bool:
        """Whether reading all is the faster way, with so many found among so many."""
        full = found * LIST_COST + tokens * SCAN_COST > tokens
        self.pause = min(LONGEST_PAUSE, 2 * self.pause + 1) if full else 0
        self.left = self.pause
        return found * LIST_COST > tokens
