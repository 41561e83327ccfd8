"""A load that is described rather than recorded: a TOML file, read and checked, and the requests it makes.

``docs/simulating.md`` explains the file. The same file and seed make the same requests, on any machine.
"""

import heapq
import math
import random
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools.traces import SESSION_BITS, Request, Trace

PREFIXES = 1 << 20
"""Keys below this, before they are shifted, are of shared prefixes; those of conversations come after."""

PROCESSES = ("poisson", "gamma", "even")


@dataclass(frozen=True, slots=True)
class Spread:
    """A number from chance: ``{median, sigma}`` is lognormal, ``{mean}`` exponential, ``{least, most}`` uniform; the
    other two are cut to least and most where these are given."""

    kind: str
    a: float
    b: float
    least: float = 0.0
    most: float = math.inf

    def draw(self, chance: random.Random) -> float:
        """One value."""
        match self.kind:
            case "fixed":
                return self.a
            case "uniform":
                return chance.uniform(self.a, self.b)
            case "exponential":
                value = chance.expovariate(1 / self.a)
            case _:
                value = self.a * math.exp(self.b * chance.gauss(0, 1))
        return min(max(value, self.least), self.most)

    def whole(self, chance: random.Random, least: int = 1) -> int:
        """One value, as tokens or turns."""
        return max(least, round(self.draw(chance)))


@dataclass(frozen=True, slots=True)
class Category:
    """Conversations of one kind. tool: share of the pauses that are a tool's; shared: tokens of the prefix, of which
    there are ``prefixes`` different ones."""

    name: str
    weight: float
    prompt: Spread
    output: Spread
    turns: Spread
    grow: Spread
    pause: Spread
    tool: float
    shared: int
    prefixes: int


@dataclass(frozen=True, slots=True)
class Steps:
    """Decoding over one context in sparse mode. found: keys of each kv head (the size of a DIPR set). drift: share of
    them that is new at each step. run: keys lie in runs of about so many neighbours. chunk: tokens put in at a time."""

    context: int
    steps: int
    found: Spread
    drift: float
    run: float
    layers: int | None
    chunk: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a file describes: requests, or steps."""

    path: Path
    requests: int | None
    seconds: float | None
    block_tokens: int
    process: str
    rate: float
    cv: float
    categories: tuple[Category, ...]
    steps: Steps | None

    def trace(self, seed: int) -> Trace:
        """Its requests. Raises ConfigError where it describes steps only."""
        if not self.categories:
            raise ConfigError(f"{self.path} describes steps, not requests: it has no [[category]]")
        return Trace(self.block_tokens, lambda: _requests(self, seed))


# ---------------------------------------------------------------------- reading
class _Table:
    """A table of the file, with the way to it for errors; ``end`` complains about names that nobody asked for."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be a table, got {values!r}")
        self.where, self.values, self.asked = where, values, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def _value(self, name: str, default: Any) -> Any:
        self.asked.add(name)
        if name not in self.values and default is None:
            raise ConfigError(f"{self.where}: {name} is missing")
        return self.values.get(name, default)

    def number(self, name: str, default: float | None = None, least: float = 0.0, most: float = math.inf) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ConfigError(f"{self.where}: {name} must be a number{_limits(least, most)}, got {value!r}")
        if value == math.inf:
            raise ConfigError(f"{self.where}: {name} must be finite")
        return float(value)

    def whole(self, name: str, default: int | None = None, least: int = 1, most: float = 1 << 31) -> int:
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(f"{self.where}: {name} must be an integer{_limits(least, most)}, got {value!r}")
        return value

    def word(self, name: str, default: str, known: tuple[str, ...] = ()) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or not value or (known and value not in known):
            raise ConfigError(f"{self.where}: {name} must be {' or '.join(known) or 'a name'}, got {value!r}")
        return value

    def spread(self, name: str, default: float | None = None) -> Spread:
        value = self._value(name, default)
        if not isinstance(value, dict):
            return Spread("fixed", self.number(name, default), 0.0)
        table = _Table(f"{self.where}: {name}", value)
        least, most = table.number("least", 0.0), table.number("most", 1e18)
        if least > most:
            raise ConfigError(f"{table.where}: least {least:g} is above most {most:g}")
        if "median" in value:
            found = Spread("lognormal", table.number("median", least=1e-9), table.number("sigma", 1.0), least, most)
        elif "mean" in value:
            found = Spread("exponential", table.number("mean", least=1e-9), 0.0, least, most)
        elif {"least", "most"} <= set(value):
            found = Spread("uniform", least, most)
        else:
            raise ConfigError(f"{table.where}: give a number, median and sigma, mean, or least and most")
        table.end()
        return found

    def table(self, name: str) -> "_Table":
        return _Table(f"{self.where}: {name}", self._value(name, {}))

    def end(self) -> None:
        if unknown := sorted(set(self.values) - self.asked):
            raise ConfigError(
                f"{self.where}: nothing is called {unknown[0]!r}; there are {', '.join(sorted(self.asked))}"
            )


def _limits(least: float, most: float) -> str:
    return f" of at least {least:g}" if most > 1e9 else f" from {least:g} to {most:g}"


def read(path: Path) -> Load:
    """The load a file describes. Raises ConfigError with the place in the file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read a load from {path}: {error}") from error
    top = _Table(str(path), values)
    kinds = top._value("category", [])
    if not isinstance(kinds, list):
        raise ConfigError(f"{path}: write [[category]] with two brackets: there can be several")
    steps = _steps(top.table("steps")) if "steps" in top else None
    arrivals = top.table("arrivals")
    process = arrivals.word("process", "poisson", PROCESSES)
    found = Load(
        path,
        top.whole("requests") if "requests" in top else None,
        top.number("seconds", least=1e-9) if "seconds" in top else None,
        top.whole("block_tokens", 256),
        process,
        arrivals.number("rate", 1.0, least=1e-9),
        arrivals.number("cv", 1.0, least=0.01, most=100) if process == "gamma" else 1.0,
        tuple(_category(_Table(f"{path}: category {i}", one)) for i, one in enumerate(kinds, 1)),
        steps,
    )
    arrivals.end()
    top.end()
    if not kinds and steps is None:
        raise ConfigError(f"{path} describes no load: it has neither [[category]] nor [steps]")
    if kinds and (found.requests is None) == (found.seconds is None):
        raise ConfigError(f"{path}: say how long the load is by either requests or seconds")
    names = [category.name for category in found.categories]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: two categories have the same name")
    if sum(category.prefixes for category in found.categories) > PREFIXES:
        raise ConfigError(f"{path}: there are at most {PREFIXES:,} prefixes")
    return found


def _category(table: _Table) -> Category:
    shared = table.table("shared")
    found = Category(
        table.word("name", "all"),
        table.number("weight", 1.0, least=1e-9),
        table.spread("prompt"),
        table.spread("output", 256),
        table.spread("turns", 1),
        table.spread("grow", 100),
        table.spread("pause", 30),
        table.number("tool", 0.0, most=1.0),
        shared.whole("tokens", 0, least=0),
        shared.whole("prefixes", 1),
    )
    shared.end()
    table.end()
    return found


def _steps(table: _Table) -> Steps:
    found = Steps(
        table.whole("context"),
        table.whole("steps", 64),
        table.spread("found"),
        table.number("drift", 0.1, most=1.0),
        table.number("run", 4.0, least=1.0),
        table.whole("layers") if "layers" in table else None,
        table.whole("chunk", 4096),
    )
    table.end()
    return found


# ---------------------------------------------------------------------- requests
def _gaps(load: Load, chance: random.Random) -> Callable[[], float]:
    match load.process:
        case "even":
            return lambda: 1 / load.rate
        case "gamma":
            shape = 1 / load.cv**2
            return lambda: chance.gammavariate(shape, 1 / (load.rate * shape))
        case _:
            return lambda: chance.expovariate(load.rate)


def _requests(load: Load, seed: int) -> Iterator[Request]:
    """Conversations that start one after the other and overlap; only those that run are in memory."""
    chance = random.Random(f"{seed} arrivals")
    gap, start, made, at = _gaps(load, chance), 0.0, 0, 0
    running: list[tuple[float, int, Iterator[Request], Request]] = []
    weights = [category.weight for category in load.categories]
    first = np.cumsum([0, *(category.prefixes for category in load.categories)]).tolist()
    while True:
        while running and running[0][0] <= start:
            request = _next(running)
            if (load.seconds is not None and request.time > load.seconds) or made == load.requests:
                return
            made += 1
            yield request
        if load.seconds is not None and start > load.seconds and not running:
            return
        which = chance.choices(range(len(weights)), weights)[0]
        conversation = _conversation(load, which, first[which], at, start, random.Random(f"{seed} {at}"))
        opening = next(conversation)
        heapq.heappush(running, (opening.time, at, conversation, opening))
        at, start = at + 1, start + gap()


def _next(running: list[tuple[float, int, Iterator[Request], Request]]) -> Request:
    _, at, conversation, request = running[0]
    if (following := next(conversation, None)) is None:
        heapq.heappop(running)
    else:
        heapq.heapreplace(running, (following.time, at, conversation, following))
    return request


def _conversation(
    load: Load, which: int, first: int, at: int, start: float, chance: random.Random
) -> Iterator[Request]:
    kind, size = load.categories[which], load.block_tokens
    shared = (first + chance.randrange(kind.prefixes)) << SESSION_BITS
    common = kind.shared // size
    tokens, turns, time = kind.shared + kind.prompt.whole(chance), kind.turns.whole(chance), start
    own = (PREFIXES + at) << SESSION_BITS
    for turn in range(turns):
        blocks = np.arange(tokens // size, dtype=np.int64)
        blocks += np.where(blocks < common, shared, own)
        output, last = kind.output.whole(chance), turn + 1 == turns
        yield Request(time, tokens, output, blocks, not last and chance.random() < kind.tool, kind.name)
        tokens += output + kind.grow.whole(chance, 0)
        time += kind.pause.draw(chance)
