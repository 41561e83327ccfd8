"""What a run asked of the tiers, written down as it happens: lines of JSON that ``alaya-tiers simulate`` replays.

    {"alaya_tiers_trace": 1, ...}                        the first line: when, with which settings, which model
    {"shape": layer, "kv_heads", "k_dim", "v_dim", "dtype"}     before a layer's first use
    {"own": [x, session, layer, tokens, cold]}           x is that layer of that session; cold: tokens on ssd only
    {"fork": [x, y]}                                     x shares all blocks of y
    {"put": [x, tokens, rows], "t": seconds}             new keys and values
    {"cut": [x, tokens]}    {"gone": x}    {"built": [x]}    only so many are left; nobody holds it; its index is made
    {"read": [x, queries, tokens, query heads], "t", "s"}       attention, what it saw, seconds it took
    {"found": [x, row, queries, window, tokens], "heads", "flat", "n", "first", "bytes", "gaps", "mass"}
                                                         comes before the read it belongs to: which kv heads looked,
                                                         which read all, and the positions of the n keys each found:
                                                         the first, and the gaps between the others (base64);
                                                         also "looked", "best": which heads compared what first
    {"look": [x], "heads", "best", "n", "first", "bytes", "gaps"}    before it instead, where some looked several times
    {"mark": name, "t"}    {"request": [tokens, reused], "blocks": [...], "t"}

A step costs it some 20 us a layer: nothing is compressed, nothing is copied that need not be.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import threading
import weakref
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import BlockShape
from alaya_tiers.config import Settings
from alaya_tiers.errors import ConfigError
from alaya_tiers.seams import Clock

VERSION = 1
BLOCK = 64
"""Tokens of a prefix block of a request."""

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Look:
    """One scan of some kv heads: positions of the keys that each compared first, and of those it attended to then."""

    heads: npt.NDArray[np.intp]
    best: list[Positions]
    positions: list[Positions] = field(default_factory=list)


class Looks:
    """Every scan of one attention. run: of each block of the spans that a scan names tokens in; rows: names of a block,
    size: tokens of one. Told nothing where nobody records."""

    def __init__(self, run: npt.NDArray[np.intp], rows: int, size: int, *, recording: bool) -> None:
        self.every: list[Look] = []
        self._run, self._rows, self._size, self._recording = run, rows, size, recording

    def compared(self, heads: npt.NDArray[np.intp], best: list[npt.NDArray[np.int32]]) -> None:
        """A scan begins: the keys that these heads compare first, in any order."""
        if self._recording:
            self.every.append(Look(heads, self.places([np.unique(some) for some in best])))

    def attended(self, tokens: list[npt.NDArray[np.int32]]) -> None:
        """What they attend to then."""
        if self._recording:
            self.every[-1].positions.extend(self.places(tokens))

    def places(self, tokens: list[npt.NDArray[np.int32]]) -> list[Positions]:
        """Where in the context the tokens are."""
        return [self._run[some // self._rows] * self._size + some % self._rows for some in tokens]


class Kept(Protocol):
    """One layer of a session, as far as a recorder knows it."""

    number: int
    length: int
    shape: BlockShape


class Recorded(Protocol):
    """An engine, as far as recording it goes."""

    settings: Settings
    clock: Clock
    recorder: "Recorder | None"


@contextmanager
def recording(engine: Recorded, path: str | os.PathLike[str], model: dict[str, Any] | None) -> "Iterator[Recorder]":
    """Everything that sessions of an engine do inside goes into the file. Raises ConfigError."""
    if engine.recorder is not None:
        raise ConfigError("this cache is being recorded already: one trace at a time")
    facts = {"version": version("alaya-tiers"), "settings": dataclasses.asdict(engine.settings), "model": model}
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below, whatever happens
    except OSError as error:
        raise ConfigError(f"cannot write a trace to {path}: {error}") from error
    try:
        engine.recorder = Recorder(file, engine.clock.monotonic, facts)
        yield engine.recorder
    finally:
        engine.recorder = None
        file.close()


class Recorder:
    """Writes a trace into an open text file. Thread-safe. clock: seconds, for all times. facts: for the first line."""

    def __init__(self, file: IO[str], clock: Callable[[], float], facts: dict[str, Any]) -> None:
        self._file, self._clock, self._began = file, clock, clock()
        self._lock = threading.Lock()
        self._numbers, self._names = itertools.count(), weakref.WeakKeyDictionary[Any, int]()
        self._sessions: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._owned: set[int] = set()
        self._shapes: set[int] = set()
        self._gone: deque[int] = deque()  # filled by the garbage collector, at any moment
        self._write(json.dumps({"alaya_tiers_trace": VERSION} | facts))

    def knows(self, state: Kept) -> bool:
        """Whether a line said already where this layer is from."""
        return self._names.get(state) in self._owned

    # ------------------------------------------------------------------ what the run says
    def mark(self, name: str) -> None:
        """From here on is a phase of this name, for example "decode"."""
        self._write(json.dumps({"mark": name, "t": self._now()}))

    def request(self, ids: npt.NDArray[np.int64], reused: int) -> None:
        """A prompt, and how many of its tokens were stored. ids: [tokens]; only a chain of hashes of them is kept."""
        keys, digest = [], b""
        for start in range(0, ids.size - BLOCK + 1, BLOCK):
            digest = hashlib.blake2b(digest + ids[start : start + BLOCK].tobytes(), digest_size=8).digest()
            keys.append(int.from_bytes(digest, "little") >> 2)
        self._write(json.dumps({"request": [int(ids.size), reused], "blocks": keys, "t": self._now()}))

    def put(self, session: object, state: Kept, tokens: int, rows: int, stored: int) -> None:
        """New tokens are about to be appended to every row. stored: of those before, how many are on ssd only."""
        x = self._name(session, state, stored)
        self._write(f'{{"put": [{x}, {tokens}, {rows}], "t": {self._now():.6f}}}')

    def cut(self, state: Kept, tokens: int) -> None:
        """Only so many tokens are left."""
        if (x := self._names.get(state)) is not None:
            self._write(f'{{"cut": [{x}, {tokens}]}}')

    def forked(self, state: Kept, made: Kept) -> None:
        """One layer shares the blocks of another."""
        if (y := self._names.get(state)) is not None:
            self._write(f'{{"fork": [{self._new(made)}, {y}]}}')

    def built(self, state: Kept) -> None:
        """The index of a layer was completed, reading what was not in memory."""
        if (x := self._names.get(state)) is not None:
            self._write(f'{{"built": [{x}]}}')

    def read(self, session: object, state: Kept, queries: int, heads: int, stored: int, seconds: float) -> None:
        """Attention to all tokens of a layer, or to what ``found`` said before."""
        x = self._name(session, state, stored)
        what = f"[{x}, {queries}, {state.length}, {heads}]"
        self._write(f'{{"read": {what}, "t": {self._now():.6f}, "s": {seconds:.6f}}}')

    def found(
        self,
        state: Kept,
        queries: int,
        tokens: tuple[int, int],
        heads: npt.NDArray[np.intp],
        flat: npt.NDArray[np.intp],
        positions: list[Positions],
        mass: float,
        looks: "list[Look]",
    ) -> None:
        """What sparse attention of a row looked at. tokens: of the window, and all. positions: of each of ``heads``,
        ascending. mass: the mean share of the attention that was not estimated. looks: how it came to that."""
        x = self._names.get(state)
        if x is None:  # its first attention: nothing was appended while this was recorded
            x = self._new(state)
        for look in looks if len(looks) > 1 else ():
            self._write(
                f'{{"look": [{x}], "heads": {look.heads.tolist()}, "best": {_plain(look.best)}, '
                f"{_packed(look.positions)}}}"
            )
        best = f'"looked": {looks[0].heads.tolist()}, "best": {_plain(looks[0].best)}, ' if len(looks) == 1 else ""
        self._write(
            f'{{"found": [{x}, 0, {queries}, {tokens[0]}, {tokens[1]}], "heads": {heads.tolist()}, '
            f'"flat": {flat.tolist()}, {best}{_packed(positions)}, "mass": {mass:.5f}}}'
        )

    # ------------------------------------------------------------------ inside
    def _now(self) -> float:
        return round(self._clock() - self._began, 6)

    def _new(self, state: Kept) -> int:
        x = self._names[state] = next(self._numbers)
        weakref.finalize(state, self._gone.append, x).atexit = False
        return x

    def _name(self, session: object, state: Kept, stored: int) -> int:
        """The number of a layer of a session; when it is new here, a line that says so."""
        x = self._names.get(state)
        if x is None:
            x = self._new(state)
        if x not in self._owned:
            self._owned.add(x)
            owner = self._sessions.setdefault(session, len(self._sessions))
            if state.number not in self._shapes:
                self._shapes.add(state.number)
                g = state.shape.geometry
                dtype = str(g.dtype).removeprefix("torch.")
                shape = {"shape": state.number, "kv_heads": g.kv_heads, "k_dim": g.k_dim, "v_dim": g.v_dim}
                self._write(json.dumps(shape | {"dtype": dtype}))
            self._write(f'{{"own": [{x}, {owner}, {state.number}, {state.length}, {stored}]}}')
        return x

    def _write(self, line: str) -> None:
        with self._lock:
            while self._gone:
                self._file.write(f'{{"gone": {self._gone.popleft()}}}\n')
            self._file.write(line + "\n")


def _plain(positions: list[Positions]) -> list[list[int]]:
    """Few positions, for JSON."""
    return [some.tolist() for some in positions]


def _packed(positions: list[Positions]) -> str:
    """Many positions: how many of each head, the first of each, and the gaps between them in base64."""
    counts = [p.size for p in positions]
    first, gaps, width = [], b"", 2
    if any(counts):
        every = np.concatenate(positions)
        starts = np.cumsum([0, *counts[:-1]])[[n > 0 for n in counts]]
        first = every[starts].tolist()
        steps = np.diff(every, prepend=0)
        steps[starts] = 0
        width = 2 if steps.max() < 1 << 16 else 4
        gaps = steps.astype(np.uint16 if width == 2 else np.uint32).tobytes()
    return f'"n": {counts}, "first": {first}, "bytes": {width}, "gaps": "{b64encode(gaps).decode()}"'
