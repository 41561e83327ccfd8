"""Steps of decoding that are described rather than recorded: which keys each head finds, drifting from step to step."""

from collections.abc import Iterator
from random import Random

import numpy as np
import numpy.typing as npt
import torch

from alaya_tiers.blocks import Geometry
from alaya_tiers.config import Settings
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools.events import Built, Event, Found, Layer, Look, Mark, Own, Positions, Put, Read, Skip, Skipped
from alaya_tiers.tools.load import Load, Steps
from alaya_tiers.tools.recorded import Recording
from alaya_tiers.tools.shapes import Shape

NUMBERS = {2: torch.bfloat16, 4: torch.float32}


class Head:
    """The keys of one head: runs of neighbours, of which some move at each step."""

    def __init__(self, steps: Steps, tokens: int, chance: Random) -> None:
        self._steps = steps
        self._rng: np.random.Generator = np.random.Generator(np.random.PCG64(chance.getrandbits(63)))
        self._size = min(steps.found.whole(chance, 0), max(0, tokens // 2))
        self.age = 1
        self._runs = self._new(-(-self._size // max(1, round(steps.run))), tokens)

    def _new(self, n: int, tokens: int) -> npt.NDArray[np.int64]:
        return self._rng.integers(0, max(1, tokens), n)

    def found(self, tokens: int) -> Positions:
        """What it finds now, ascending, after it drifted for ``age`` steps."""
        moved = self._rng.random(self._runs.size) < 1 - (1 - self._steps.drift) ** self.age
        self._runs[moved], self.age = self._new(int(moved.sum()), tokens), 1
        width = np.arange(max(1, round(self._steps.run)))
        positions = np.unique((self._runs[:, None] + width).ravel())
        return positions[positions < tokens][: self._size]


def recording(load: Load, shape: Shape, settings: Settings, seed: int) -> Recording:
    """A run to replay. Raises ConfigError where the load describes requests only."""
    steps = load.steps
    if steps is None:
        raise ConfigError(f"{load.path} describes requests, not steps: it has no [steps]")
    return Recording(load.path, settings, shape, "described", lambda skip: _events(steps, shape, settings, seed, skip))


def _events(steps: Steps, shape: Shape, settings: Settings, seed: int, skip: Skip) -> Iterator[Event]:
    layers, heads = steps.layers or shape.layers, shape.kv_heads
    geometry = Geometry(heads, shape.head_dim, shape.head_dim, NUMBERS[shape.number_bytes])
    for layer in range(layers):
        yield Layer(layer, geometry)
        yield Own(layer, 0, layer, 0, 0)
    yield Mark("prompt", 0.0)
    for begin in range(0, steps.context, steps.chunk):
        for layer in range(layers):
            yield Put(layer, min(steps.chunk, steps.context - begin), 1, 0.0)
    if settings.mode == "sparse":
        for layer in range(layers):
            yield Built(layer)
    yield Mark("decode", 0.0)
    finders = [
        [Head(steps, steps.context, Random(f"{seed} {layer} {head}")) for head in range(heads)]
        for layer in range(layers)
    ]
    window = settings.sink_tokens + settings.recent_tokens
    step = -1
    while (step := step + 1) < steps.steps:
        if passed := min(skip.steps, steps.steps - step):
            skip.steps, step = 0, step + passed
            for head in (head for row in finders for head in row):
                head.age += passed
            yield Skipped(passed, tuple((layer, passed) for layer in range(layers)))
            if step == steps.steps:
                return
        tokens = steps.context + step + 1
        for layer in range(layers):
            yield Put(layer, 1, 1, 0.0)
            found: tuple[Found, ...] = ()
            if settings.mode == "sparse":
                positions = tuple(head.found(tokens - 1) for head in finders[layer])
                looked = Look(every := tuple(range(heads)), (), positions)
                found = (Found(layer, 1, window, tokens, every, (), positions, 1.0, (looked,)),)
            yield Read(layer, 1, tokens, shape.heads, 0.0, 0.0, found)
