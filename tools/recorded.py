"""Traces that a cache recorded (``alaya_tiers/recorder.py``), read as a stream of events and checked line by line."""

import binascii
import gzip
import lzma
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alaya_tiers.blocks import Geometry
from alaya_tiers.config import Settings
from alaya_tiers.errors import TraceError
from alaya_tiers.recorder import VERSION
from alaya_tiers.tools.events import (
    Asked,
    Built,
    Cut,
    Event,
    Fork,
    Found,
    Layer,
    Look,
    Mark,
    Own,
    Positions,
    Put,
    Read,
    Skip,
    Skipped,
)
from alaya_tiers.tools.shapes import Shape, from_config
from alaya_tiers.tools.traces import loads

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded run. settings: it ran with; shape: of its model, None where unknown. events: anew each time. made:
    what happened, where that is described rather than in a file."""

    path: Path
    settings: Settings
    shape: Shape | None
    version: str
    made: Callable[[Skip], Iterator[Event]] | None = None

    def events(self, skip: Skip | None = None) -> Iterator[Event]:
        """Everything that happened, in order. skip: steps to pass over, without looking at what they read.

        Raises TraceError when it meets what is wrong.
        """
        skip = skip or Skip()
        return _events(self.path, skip) if self.made is None else self.made(skip)


def is_recording(path: Path) -> bool:
    """Whether a file begins as a recorded trace does. Raises TraceError."""
    with _lines(path) as lines:
        return next(lines, "").lstrip().startswith('{"alaya_tiers_trace"')


def open_recording(path: Path) -> Recording:
    """The recording in a file; of its events nothing is read. Raises TraceError."""
    with _lines(path) as lines:
        line = next(lines, "")
    try:
        first = loads(line)
        if not isinstance(first, dict) or "alaya_tiers_trace" not in first:
            raise ValueError('the first line of a recorded trace is {"alaya_tiers_trace": ...}')
        if first["alaya_tiers_trace"] != VERSION:
            raise ValueError(f"version {first['alaya_tiers_trace']!r} of the format; this program reads {VERSION}")
        settings = Settings.from_dict(first["settings"])
        model = first.get("model")
        shape = from_config("recorded model", model) if isinstance(model, dict) and "hidden_size" in model else None
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(str(path), 1, str(error) if line else "the file is empty") from error
    except NotImplementedError:  # a kind of model whose cost is not known: attention alone is simulated
        shape = None
    return Recording(path, settings, shape, str(first.get("version")))


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[str]]:
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            yield iter(lines)
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise TraceError(str(path), None, f"cannot be read to its end ({error})") from error


SINGLE, PASSED = '{"put": [', ('{"found": [', '{"look": [', '{"read": [', '{"put": [')


class _Passed:
    """Lines of whole steps, counted but not read: a step begins where the first layer gets a token again."""

    def __init__(self, steps: int) -> None:
        self.steps, self._most, self._counts = 0, steps, dict[str, int]()

    def takes(self, line: str) -> bool:
        """Whether the line is of one of the steps that are passed over."""
        if not line.startswith(PASSED) or not line.endswith("\n"):
            return False
        if line.startswith(SINGLE):
            x, _, rest = line[len(SINGLE) :].partition(",")
            if not rest.startswith(" 1, 1]"):
                return False
            first = next(iter(self._counts), x)
            if x == first:
                if self.steps == self._most:
                    return False
                self.steps += 1
            self._counts[x] = self._counts.get(x, 0) + 1
        return True

    def puts(self) -> Iterator[tuple[int, int]]:
        """What the layers got."""
        return ((int(x), n) for x, n in self._counts.items())


@dataclass(slots=True)
class _State:
    """What lines before said: for checks."""

    known: dict[int, int] = field(default_factory=dict)  # x -> kv heads, 0 where not known yet
    heads: dict[int, int] = field(default_factory=dict)  # layer -> kv heads
    pending: dict[int, list[Found]] = field(default_factory=dict)
    looks: dict[int, list[Look]] = field(default_factory=dict)
    time: float = 0.0
    reads: int = 0


def _events(path: Path, skip: Skip) -> Iterator[Event]:
    state, number = _State(), 1
    with _lines(path) as lines:
        next(lines, None)
        numbered = enumerate(lines, 2)
        for number, line in numbered:
            if skip.steps and line.startswith(SINGLE):
                passed = _Passed(skip.steps)
                skip.steps = 0
                while line and passed.takes(line):
                    number, line = next(numbered, (number, ""))
                if passed.steps:
                    yield Skipped(passed.steps, tuple(passed.puts()))
                if not line:
                    break
            try:
                if not line.endswith("\n"):
                    raise ValueError("the line is cut off: was the run stopped? Remove it to use what is before")
                event = _event(loads(line), state)
            except (ValueError, KeyError, TypeError, IndexError, binascii.Error) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise TraceError(str(path), number, what) from error
            if event is not None:
                yield event
    if not state.reads:
        raise TraceError(str(path), number, "no attention was recorded")


def _event(record: Any, state: _State) -> Event | None:
    if not isinstance(record, dict) or not record:
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    kind = next(iter(record))
    if kind not in READERS:
        raise ValueError(f"unknown event {kind!r}; known are {', '.join(READERS)}")
    if "t" in record:
        time = _real(record["t"], "t")
        if time < state.time - 1.0:  # threads may write in another order than they began
            raise ValueError(f"it comes {state.time - time:g} s before a line above: lines are out of order")
        state.time = max(state.time, time)
    return READERS[kind](record, state)


def _real(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return float(value)


def _ints(value: Any, name: str, count: int | None = None) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"{name} must be a list of integers of at least 0, got {value!r:.60}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name} must be {count} integers, got {len(value)}")
    return value


def _known(x: int, state: _State) -> int:
    if x not in state.known:
        raise ValueError(f"layer {x} was never made: lines are missing above")
    return x


def _layer(record: dict[str, Any], state: _State) -> Layer:
    number, heads, k_dim, v_dim = _ints([record[n] for n in ("shape", "kv_heads", "k_dim", "v_dim")], "shape", 4)
    if min(heads, k_dim, v_dim) < 1 or record["dtype"] not in DTYPES:
        raise ValueError(f"no layer has {heads} kv heads of {k_dim} and {v_dim} {record['dtype']!r}")
    state.heads[number] = heads
    return Layer(number, Geometry(heads, k_dim, v_dim, DTYPES[record["dtype"]]))


def _own(record: dict[str, Any], state: _State) -> Own:
    own = Own(*_ints(record["own"], "own", 5))
    if own.layer not in state.heads:
        raise ValueError(f"the shape of layer {own.layer} is not known: lines are missing above")
    state.known[own.x] = state.heads[own.layer]
    return own


def _fork(record: dict[str, Any], state: _State) -> Fork:
    fork = Fork(*_ints(record["fork"], "fork", 2))
    state.known[fork.x] = state.known[_known(fork.y, state)]
    return fork


def _put(record: dict[str, Any], state: _State) -> Put:
    x, tokens, rows = _ints(record["put"], "put", 3)
    return Put(_known(x, state), tokens, rows, state.time)


def _cut(record: dict[str, Any], state: _State) -> Cut:
    x, tokens = _ints(record["cut"], "cut", 2)
    return Cut(_known(x, state), tokens)


def _gone(record: dict[str, Any], state: _State) -> Cut | None:
    (x,) = _ints([record["gone"]], "gone", 1)
    return Cut(x, 0) if state.known.pop(x, None) is not None else None


def _built(record: dict[str, Any], state: _State) -> Built:
    return Built(_known(_ints(record["built"], "built", 1)[0], state))


def _heads(values: Any, name: str, x: int, state: _State) -> tuple[int, ...]:
    heads = tuple(_ints(values, name))
    if (most := state.known.get(x, 0)) and any(head >= most for head in heads):
        raise ValueError(f"the layer has {most} kv heads, not head {max(heads)}")
    return heads


def _positions(record: dict[str, Any], heads: int, tokens: int) -> tuple[Positions, ...]:
    """Many, as ``recorder`` packs them."""
    counts = tuple(_ints(record["n"], "n"))
    if record["bytes"] not in (2, 4) or not isinstance(record["gaps"], str) or len(counts) != heads:
        raise ValueError("bytes, gaps and n do not say where the keys are")
    steps = np.frombuffer(b64decode(record["gaps"], validate=True), f"<u{record['bytes']}").astype(np.int64)
    first = _ints(record["first"], "first", sum(n > 0 for n in counts))
    if steps.size != sum(counts):
        raise ValueError(f"there are gaps of {steps.size} keys, and {sum(counts)} were found")
    at, begin, positions = 0, iter(first), []
    for n in counts:
        some = np.cumsum(steps[at : at + n]) + (next(begin) if n else 0)
        if n and (some[-1] >= tokens or (np.diff(some) <= 0).any()):
            raise ValueError(f"a head found keys out of order, or beyond the {tokens} tokens it saw")
        positions.append(some)
        at += n
    return tuple(positions)


def _best(record: dict[str, Any], heads: int) -> tuple[Positions, ...]:
    """Few, as they are."""
    best = record["best"]
    if not isinstance(best, list) or len(best) != heads:
        raise ValueError(f"best must be a list for each of {heads} heads, got {best!r:.60}")
    return tuple(np.array(_ints(some, "best"), np.int64) for some in best)


def _look(record: dict[str, Any], state: _State) -> None:
    x = _known(_ints(record["look"], "look", 1)[0], state)
    heads = _heads(record["heads"], "heads", x, state)
    positions = _positions(record, len(heads), 1 << 62)
    state.looks.setdefault(x, []).append(Look(heads, _best(record, len(heads)), positions))


def _found(record: dict[str, Any], state: _State) -> None:
    x, _, queries, window, tokens = _ints(record["found"], "found", 5)
    heads, flat = (_heads(record[name], name, x, state) for name in ("heads", "flat"))
    positions = _positions(record, len(heads), tokens)
    looks = tuple(state.looks.pop(x, ()))
    if not looks and "looked" in record:
        looked, known = _heads(record["looked"], "looked", x, state), dict(zip(heads, positions, strict=True))
        nothing = np.empty(0, np.int64)
        looks = (Look(looked, _best(record, len(looked)), tuple(known.get(head, nothing) for head in looked)),)
    looks = looks or (Look(heads, (), positions),)
    mass = _real(record["mass"], "mass")
    state.pending.setdefault(x, []).append(Found(x, queries, window, tokens, heads, flat, positions, mass, looks))


def _read(record: dict[str, Any], state: _State) -> Read:
    x, queries, tokens, heads = _ints(record["read"], "read", 4)
    state.reads += 1
    found = tuple(state.pending.pop(_known(x, state), ()))
    return Read(x, queries, tokens, heads, state.time, _real(record["s"], "s"), found)


def _mark(record: dict[str, Any], state: _State) -> Mark:
    return Mark(str(record["mark"]), state.time)


def _asked(record: dict[str, Any], state: _State) -> Asked:
    tokens, reused = _ints(record["request"], "request", 2)
    return Asked(tokens, reused, tuple(_ints(record["blocks"], "blocks")), state.time)


READERS: dict[str, Callable[[dict[str, Any], _State], Event | None]] = {
    "shape": _layer, "own": _own, "fork": _fork, "put": _put, "cut": _cut, "gone": _gone, "built": _built,
    "look": _look, "found": _found, "read": _read, "mark": _mark, "request": _asked,
}  # fmt: skip
