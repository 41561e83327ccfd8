"""What every part of `alaya-tiers bench gpu` is given: the model's sizes, the device, a clock, and its time."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alaya_tiers.devices import device_at
from alaya_tiers.devices.base import Device
from alaya_tiers.devices.simulated import Simulated
from alaya_tiers.tools.baselines import Shape


class OutOfTime(Exception):
    """The time given is used up; what is left out is said."""


class NotHere(Exception):
    """A part cannot be measured on this machine; why is said."""


@dataclass(slots=True)
class Bench:
    """Where and how long. seconds: for everything; begun: when; deadline: when the present part must be over."""

    shape: Shape
    contexts: tuple[int, ...]
    device: str
    seconds: float
    directory: Path
    say: Callable[[str], None]
    begun: float = field(default_factory=time.perf_counter)
    deadline: float = float("inf")
    bus_rate: float | None = None
    """Bytes a second to the device, once that was measured."""

    @property
    def place(self) -> torch.device:
        """Where the model is."""
        return torch.device("cuda" if self.device == "cuda" else "cpu")

    @property
    def left(self) -> float:
        """Seconds of all that is left."""
        return self.seconds - (time.perf_counter() - self.begun)

    def on(self) -> Device:
        """A new device of the kind that is measured."""
        return Simulated(0, eagerness=0.9) if self.device == "simulated" else device_at(self.place)

    def grant(self, share: float) -> None:
        """The next part may take this share of what is left."""
        self.deadline = time.perf_counter() + max(0.0, share * self.left)

    def check_time(self) -> None:
        """Raises OutOfTime."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime

    def settle(self) -> None:
        """What the GPU was told has happened."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Give back what the last part held."""
        gc.collect()
        if self.place.type == "cuda":
            torch.cuda.empty_cache()

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds that work takes, to its end on the GPU."""
        self.settle()
        began = time.perf_counter()
        work()
        self.settle()
        return time.perf_counter() - began
