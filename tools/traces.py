"""Request traces, read as a stream: chat requests of one service, or sessions of coding agents.

``mooncake``: a JSON object a line, with timestamp (ms), input_length, output_length, hash_ids of 512-token blocks that
mean the same everywhere in the file. ``agents``: a JSON file a session, or a tar archive of many, with requests of t (s
since the session began), in, out, stop and hash_ids that mean something within the session only; requests of a subagent
lie in an entry of their own and count from its time.
"""

import gzip
import heapq
import itertools
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alaya_tiers.errors import ConfigError, TraceError

FORMATS = ("auto", "mooncake", "agents")
MOONCAKE_BLOCK = 512
SESSION_BITS = 32
"""A block's key is its id plus the number of its file or session, shifted by so many bits."""

LONG, SHORT, AGENT, SUBAGENT = "long", "short", "agent", "subagent"
"""Categories of requests: prompts of chat by their length, those of agents by who asks."""

LONG_TOKENS = 16_384

Keys = npt.NDArray[np.int64]


class Request(NamedTuple):
    """One prompt. time: seconds since the trace began; blocks: keys of its prefix blocks, in order, all different;
    pause: it ends in a call of a tool, so that the same context comes back. category: for shares of the tiers."""

    time: float
    tokens: int
    output: int
    blocks: Keys
    pause: bool = False
    category: str = ""


class Trace(NamedTuple):
    """block_tokens: tokens of a prefix block. requests: anew at each call, in order of time, read while it is used."""

    block_tokens: int
    requests: Callable[[], Iterator[Request]]


def open_trace(paths: list[Path], form: str = "auto", session_gap: float = 300.0, seed: int = 0) -> Trace:
    """The requests of files, merged by time.

    session_gap: mean seconds between the starts of two sessions of agents (exponentially distributed, by ``seed``).
    Raises TraceError or ConfigError, at once for what the first request shows, otherwise when it is met.
    """
    if form not in FORMATS:
        raise ConfigError(f"unknown format {form!r}; known are {', '.join(FORMATS)}")
    if not 0 < session_gap < float("inf"):
        raise ConfigError(f"the gap between sessions must be above 0 seconds, got {session_gap!r}")
    kinds = {form if form != "auto" else detect(path) for path in paths}
    if len(kinds) != 1:
        raise ConfigError("give traces of one format: " + ", ".join(sorted(kinds)) + " came together")
    if kinds == {"mooncake"}:
        files = [(path, i << SESSION_BITS) for i, path in enumerate(paths)]
        trace = Trace(
            MOONCAKE_BLOCK,
            lambda: heapq.merge(*itertools.starmap(_mooncake, files), key=lambda request: request.time),
        )
    else:
        size = next(_sessions(paths), (0, None))[0]
        trace = Trace(size, lambda: _staggered(_sessions(paths), size, session_gap, random.Random(seed)))
    if next(trace.requests(), None) is None:
        raise TraceError(", ".join(map(str, paths)), None, "there is no request in it")
    return trace


def detect(path: Path) -> str:
    """The format, by the file's name. Raises ConfigError."""
    kinds = {".jsonl": "mooncake", ".json": "agents", ".tar": "agents", ".tgz": "agents", ".txz": "agents"}
    for suffix in reversed(path.suffixes):
        if suffix in kinds:
            return kinds[suffix]
    raise ConfigError(f"cannot tell the format of {path} by its name; give --format mooncake or agents")


# ---------------------------------------------------------------------- one request
def _number(value: object, name: str, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least {least:g}, got {value!r}")
    return value


def _count(value: object, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def _ids(value: object, tokens: int, block: int) -> npt.NDArray[np.int32]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("hash_ids must be a list of integers, from 0 to 2**31 - 1")
    if value and not (min(value) >= 0 and max(value) < 1 << 31):
        raise ValueError("hash_ids must be a list of integers, from 0 to 2**31 - 1")
    if (len(value) - 1) * block >= tokens:
        raise ValueError(f"{len(value)} blocks of {block} tokens are more than the prompt of {tokens} tokens has")
    if len(set(value)) != len(value):
        raise ValueError("hash_ids names a block twice: a prompt has each of its prefixes once")
    return np.array(value, np.int32)


def _fields(record: object, *names: str) -> list[Any]:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"{', '.join(missing)} is missing")
    return [record[name] for name in names]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, UnicodeDecodeError) as error:
        raise TraceError(str(path), None, f"cannot be read to its end ({error})") from error


def loads(line: str) -> Any:
    """What a line of JSON says. Raises ValueError that says so where it is none."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"this is no JSON: {error}") from error


# ---------------------------------------------------------------------- mooncake
def _mooncake(path: Path, base: int) -> Iterator[Request]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    last, number = 0.0, 0
    with _readable(path), openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                names = ("timestamp", "input_length", "output_length", "hash_ids")
                time, tokens, output, ids = _fields(loads(line), *names)
                time, tokens = _number(time, "timestamp", 0) / 1000, _count(tokens, "input_length", 1)
                if time < last:
                    raise ValueError(f"it comes {last - time:g} s before the line above; sort by timestamp")
                keys = _ids(ids, tokens, MOONCAKE_BLOCK).astype(np.int64) + base
                category = LONG if tokens > LONG_TOKENS else SHORT
                request = Request(time, tokens, _count(output, "output_length", 0), keys, False, category)
            except ValueError as error:
                raise TraceError(str(path), number, str(error)) from error
            last = time
            yield request
    if not number:
        raise TraceError(str(path), None, "there is no request in it")


# ---------------------------------------------------------------------- agents
def _sessions(paths: Iterable[Path]) -> Iterator[tuple[int, list[Request]]]:
    """Tokens of a block, and the requests of each session in order; keys are ids within the session."""
    for path in paths:
        with _readable(path):
            if not any(suffix in (".tar", ".tgz", ".txz") for suffix in path.suffixes):
                yield _session(str(path), path.read_bytes())
                continue
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(".json"):
                        file: IO[bytes] | None = archive.extractfile(member)
                        assert file is not None, "a member that is a file has no content"
                        yield _session(f"{path}:{member.name}", file.read())


def _session(name: str, text: bytes) -> tuple[int, list[Request]]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceError(name, error.lineno, str(error)) from error
    except UnicodeDecodeError as error:
        raise TraceError(name, None, str(error)) from error
    where = "the session"
    try:
        size, entries = _fields(record, "block_size", "requests")
        size = _count(size, "block_size", 1)
        if not isinstance(entries, list):
            raise ValueError("requests must be a list")
        found: list[Request] = []
        last = 0.0
        for number, entry in enumerate(entries, 1):
            where = f"request {number}"
            began = _number(_fields(entry, "t")[0], "t", 0)
            if began < last:
                raise ValueError(f"it comes {last - began:g} s before the one above; sort by t")
            last = began
            nested = entry.get("type") == "subagent"
            group = _fields(entry, "requests")[0] if nested else [entry]
            if not isinstance(group, list):
                raise ValueError("requests must be a list")
            for one in group:
                time, tokens, output, ids = _fields(one, "t", "in", "out", "hash_ids")
                time = _number(time, "t", 0) + (began if nested else 0.0)
                if tokens:  # a request that failed is recorded with none
                    tokens = _count(tokens, "in", 1)
                    keys: Any = _ids(ids, tokens, size)
                    category = SUBAGENT if nested else AGENT
                    answered = _count(output, "out", 0)
                    found.append(Request(time, tokens, answered, keys, one.get("stop") == "tool_use", category))
    except ValueError as error:
        raise TraceError(name, None, f"{where}: {error}") from error
    return size, sorted(found, key=lambda request: request.time)


def _staggered(
    sessions: Iterator[tuple[int, list[Request]]], size: int, gap: float, chance: random.Random
) -> Iterator[Request]:
    """Sessions that start one after the other and overlap; a session is read when it starts."""
    running: list[tuple[float, int, int, float, list[Request]]] = []  # next time, session, next index, start, requests
    start = 0.0
    for number, (block, requests) in enumerate(sessions):
        if block != size:
            raise ConfigError(
                f"session {number + 1} has blocks of {block} tokens, the first has {size}; simulate apart"
            )
        while running and running[0][0] < start:
            yield _next(running)
        if requests:
            heapq.heappush(running, (start + requests[0].time, number, 0, start, requests))
        start += chance.expovariate(1 / gap)
    while running:
        yield _next(running)


def _next(running: list[tuple[float, int, int, float, list[Request]]]) -> Request:
    time, number, index, start, requests = running[0]
    if index + 1 < len(requests):
        heapq.heapreplace(running, (start + requests[index + 1].time, number, index + 1, start, requests))
    else:
        heapq.heappop(running)
    request = requests[index]
    return request._replace(time=time, blocks=request.blocks.astype(np.int64) + (number << SESSION_BITS))
