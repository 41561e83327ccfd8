"""Decoding in a simulation of requests: sequences share steps, so each one's tokens come at the pace of all."""

import heapq
from array import array
from dataclasses import dataclass, field

from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.shapes import Shape


@dataclass(slots=True)
class Decoding:
    """Sequences that are being continued, over all servers, evenly.

    A step reads the weights once, and of the KV of all sequences the share ``attend``. That KV takes the device tier
    first, then the host, then the ssd, and is read from where it is: the step takes as long as the slowest of them,
    weights and device together. Prompts do not slow it down, as where other machines compute them (which is also how
    the chat trace was made). All sequences get a token each step, so one count of steps says how far each is.
    """

    machine: Machine
    shape: Shape
    attend: float = 1.0
    tpot: "array[float]" = field(default_factory=lambda: array("d"))
    """Seconds of a token of each sequence that got more than one, in order of their ends."""
    tokens: int = 0
    _clock: float = 0.0
    _steps: float = 0.0
    _kv: float = 0.0
    _running: list[tuple[float, float, float, int]] = field(default_factory=list)  # last step, kv bytes, began, tokens

    @property
    def running(self) -> int:
        """Sequences now."""
        return len(self._running)

    @property
    def step_seconds(self) -> float:
        """Of one token for every sequence that runs now."""
        m, kv = self.machine, self._kv
        weights = (self.shape.weights + self.shape.hidden * self.shape.vocab) * self.shape.number_bytes
        device = min(kv, m.device_memory)
        host = min(kv - device, m.host_memory)
        ssd = kv - device - host
        inside = m.step + weights / m.device_read + self.attend * device / m.device_read / m.servers
        return max(inside, self.attend * host / m.pcie, self.attend * ssd / m.ssd_read)

    def begin(self, now: float, context: int, output: int) -> None:
        """The first token is there, over so many tokens of context; the others follow."""
        self.advance(now)
        self.tokens += output
        if (rest := output - 1) > 0:
            nbytes = (context + output / 2) * self.shape.token_bytes  # it grows while it runs
            self._kv += nbytes
            heapq.heappush(self._running, (self._steps + rest, nbytes, now, rest))

    def advance(self, until: float) -> float:
        """Everything up to then; when the last sequence ended, or 0."""
        ended = 0.0
        while self._running:
            last, nbytes, began, tokens = self._running[0]
            seconds = self.step_seconds
            at = self._clock + (last - self._steps) * seconds
            if at > until:
                self._steps += (until - self._clock) / seconds
                break
            heapq.heappop(self._running)
            self._clock, self._steps = at, last
            self._kv = self._kv - nbytes if self._running else 0.0
            self.tpot.append((at - began) / tokens)
            ended = at
        self._clock = max(self._clock, until if until < float("inf") else ended)
        return ended
