"""What a store knows of its contexts, as values and as JSON. Nothing read is believed before it is checked.

    Manifest      one generation: which contexts there are, of which segments, in which files; digests of records
    Segment       the record of one segment: its token ids and, for each layer, where its blocks are and their digests

Records never change. A manifest is replaced by the next generation.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alaya_tiers.blocks import BlockShape, Geometry
from alaya_tiers.identity import Identity, Tokens, segment_name

MOST_BYTES = 256 << 20
"""A manifest or record larger than this is refused."""

_MOST = 1 << 40
"""Above any count of tokens or bytes of a file there can be."""

_MOST_TOKENS = 1 << 24
"""The same of a segment."""

_NAME = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"session-[0-9a-f]{8}/s\d{4,12}-\d{5,12}(-\d{1,9})?/layer_\d{3,6}")


@dataclass(frozen=True, slots=True)
class LayerBlocks:
    """The blocks of one layer of a segment.

    files: folders of the arrays the blocks are in, relative to the store. where: for each run of blocks the number of
    its file, int64 [runs]. digests: of each block (``alaya_tiers.digest``), uint64 [kv_heads, runs]. A run is at the
    place in its file that its number in the segment says.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    block_tokens: int
    files: tuple[str, ...]
    where: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]

    @property
    def shape(self) -> BlockShape:
        """Of its blocks; ValueError where the dtype is none."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no dtype {self.dtype!r} for keys and values")
        return BlockShape(Geometry(self.kv_heads, self.k_dim, self.v_dim, dtype), self.block_tokens)


@dataclass(frozen=True, slots=True)
class Segment:
    """The record of a segment. before: the name of the one before, or the root. start: its first token's position."""

    before: str
    start: int
    tokens: Tokens
    layers: Mapping[int, LayerBlocks]

    @property
    def name(self) -> str:
        """What the tokens and all before them hash to."""
        return segment_name(self.before, self.tokens)

    @property
    def nbytes(self) -> int:
        """What it takes in memory, about."""
        return int(self.tokens.nbytes + sum(b.where.nbytes + b.digests.nbytes for b in self.layers.values()))

    @property
    def files(self) -> tuple[str, ...]:
        """All folders of arrays it is in."""
        return tuple(sorted({name for layer in self.layers.values() for name in layer.files}))

    def to_json(self) -> dict[str, Any]:
        """As JSON values; arrays as base64 of little-endian numbers."""
        layers = {
            str(n): {f: getattr(layer, f) for f in ("kv_heads", "k_dim", "v_dim", "dtype", "block_tokens")}
            | {"files": list(layer.files), "where": layer.where.tolist(), "digests": _packed(layer.digests, "<u8")}
            for n, layer in self.layers.items()
        }
        return {"before": self.before, "start": self.start, "tokens": _packed(self.tokens, "<i8"), "layers": layers}

    @classmethod
    def from_json(cls, data: Any, name: str, entry: "Entry") -> "Segment":
        """A record, checked against what the manifest says of it; ValueError when it is not the one that is meant."""
        tokens = _unpacked(_of(data, "tokens", str), "<i8", entry.tokens).astype(np.int64)
        layers = {_number(n): _layer(v, entry.tokens) for n, v in _of(data, "layers", dict).items()}
        made = cls(_text(data, "before", _NAME), _count(data, "start"), tokens, layers)
        if not layers or (made.name, made.before, made.start) != (name, entry.before, entry.start):
            raise ValueError("the record is that of another segment")
        if made.files != entry.files:
            raise ValueError("the record names other files than the manifest")
        return made

    @classmethod
    def unlisted(cls, data: Any, name: str) -> "tuple[Entry, Segment]":
        """A record that no manifest speaks of, and what one would say of it, without a digest.

        ValueError if it is not the one of its name.
        """
        layers = _of(data, "layers", dict)
        files = {f for layer in layers.values() for f in _of(layer, "files", list) if isinstance(f, str)}
        tokens = len(_of(data, "tokens", str)) * 3 // 4 // 8
        entry = Entry(_text(data, "before", _NAME), _count(data, "start"), tokens, "", tuple(sorted(files)))
        return entry, cls.from_json(data, name, entry)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the manifest says of a segment. tokens: how many. digest: sha256 of its record's file."""

    before: str
    start: int
    tokens: int
    digest: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """A stored context: its last segment's name is its id. created: seconds since 1970.

    needs: sha256 of the file that says what its heads need (``alaya_tiers.needs``), "" without one.
    """

    id: str
    tokens: int
    created: float
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One generation. identities by root, segments by name, contexts by id; files: bytes by folder of an array.

    ordered: whether the segments are listed so that those which follow the same one are in the order of ``Siblings``.
    """

    generation: int = 0
    identities: Mapping[str, Identity] = field(default_factory=dict)
    segments: Mapping[str, Entry] = field(default_factory=dict)
    contexts: Mapping[str, Context] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    ordered: bool = False

    def chain(self, context: str) -> list[str]:
        """The names of a context's segments, in order."""
        names, name = [], context
        while name in self.segments:
            names.append(name)
            name = self.segments[name].before
        return names[::-1]

    def files_of(self, context: str) -> set[str]:
        """The folders of all arrays a context is in."""
        return {folder for name in self.chain(context) for folder in self.segments[name].files}

    def root(self, name: str) -> str:
        """The root a segment hangs on."""
        while name in self.segments:
            name = self.segments[name].before
        return name

    def following(self) -> dict[str, list[str]]:
        """The names of the segments that follow each, or a root."""
        found = dict[str, list[str]]()
        for name, entry in self.segments.items():
            found.setdefault(entry.before, []).append(name)
        return found

    def without(self, *contexts: str) -> "Manifest":
        """The next generation, without some contexts and what only they needed."""
        return self.only({n: c for n, c in self.contexts.items() if n not in contexts})

    def only(self, contexts: Mapping[str, Context]) -> "Manifest":
        """The next generation, with these contexts and what they need; each ends with a segment there is."""
        used = {name for n in contexts for name in self.chain(n)}
        segments = {n: e for n, e in self.segments.items() if n in used}
        roots, files = {self.root(n) for n in contexts}, {f for e in segments.values() for f in e.files}
        return Manifest(
            self.generation + 1,
            {n: i for n, i in self.identities.items() if n in roots},
            segments,
            contexts,
            {n: b for n, b in self.files.items() if n in files},
            self.ordered,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with a digest of themselves."""
        names = list(self.files)
        number = {name: i for i, name in enumerate(names)}
        body = {
            "generation": self.generation,
            "identities": {n: asdict(i) for n, i in self.identities.items()},
            "segments": {n: _entry_json(e, number) for n, e in self.segments.items()},
            "contexts": {
                n: {"tokens": c.tokens, "created": c.created} | ({"needs": c.needs} if c.needs else {})
                for n, c in self.contexts.items()
            },
            "files": [[name, self.files[name]] for name in names],
        }
        if self.ordered:
            place = {name: i for i, name in enumerate(sorted(self.segments))}
            body["order"] = [place[name] for name in self.segments]
        return {"manifest": body, "digest": _digest(body)}

    @classmethod
    def from_json(cls, data: Any) -> "Manifest":
        """A manifest; ValueError where it is damaged or contradicts itself."""
        body = _of(data, "manifest", dict)
        if data.get("digest") != _digest(body):
            raise ValueError("its digest is wrong")
        files = dict(_file(f) for f in _of(body, "files", list))
        names = list(files)
        segments = {_matching(n, _NAME): _entry(e, names) for n, e in _of(body, "segments", dict).items()}
        made = cls(
            _count(body, "generation"),
            {_matching(n, _NAME): identity_from(i) for n, i in _of(body, "identities", dict).items()},
            _in_order(segments, body["order"]) if "order" in body else segments,
            {_matching(n, _NAME): _context(n, c) for n, c in _of(body, "contexts", dict).items()},
            files,
            "order" in body,
        )
        for problem in made._problems():
            raise ValueError(problem)
        return made

    def _problems(self) -> Iterator[str]:
        """Where it contradicts itself. Segments start after the one before, so a chain of them has no circle."""
        for entry in self.segments.values():
            before = self.segments.get(entry.before)
            if before is None and (entry.before not in self.identities or entry.start):
                yield "a segment hangs on nothing"
            if before is not None and (entry.start != before.start + before.tokens or not before.tokens):
                yield "a segment does not begin where the one before ends"
        for context in self.contexts.values():
            last = self.segments.get(context.id)
            if last is None or context.tokens != last.start + last.tokens:
                yield "a context has no segments of its length"


def _packed(array: npt.NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def _unpacked(text: str, dtype: str, count: int) -> npt.NDArray[Any]:
    if len(text) > 4 * (count * 8 // 3 + 2):
        raise ValueError("an array is longer than it says")
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("an array is not base64") from error
    if len(raw) != count * np.dtype(dtype).itemsize:
        raise ValueError("an array has another length than it says")
    return np.frombuffer(raw, dtype)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _of(data: Any, name: str, kind: type) -> Any:
    value = data.get(name) if isinstance(data, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{name} is not a {kind.__name__}")
    return value


def _matching(value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r} is not a name")
    return value


def _text(data: Any, name: str, pattern: re.Pattern[str]) -> str:
    return _matching(_of(data, name, str), pattern)


def _count(data: Any, name: str, least: int = 0, most: int = _MOST) -> int:
    value = _of(data, name, int)
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}")
    return int(value)


def _number(text: str) -> int:
    if not re.fullmatch(r"0|[1-9]\d{0,5}", text):
        raise ValueError(f"{text[:80]!r} is not the number of a layer")
    return int(text)


def _in_order(segments: dict[str, Entry], order: Any) -> dict[str, Entry]:
    """The segments in the order that numbers say, each the place of a name among all names sorted."""
    if not isinstance(order, list) or not all(type(i) is int for i in order):
        raise ValueError("order is not a list of numbers")
    if sorted(order) != list(range(len(segments))):
        raise ValueError("order does not name every segment once")
    names = sorted(segments)
    return {names[i]: segments[names[i]] for i in order}


def _file(item: Any) -> tuple[str, int]:
    if not isinstance(item, list) or len(item) != 2 or type(item[1]) is not int or not 0 < item[1] < _MOST:
        raise ValueError("a file is not a name and its bytes")
    return _matching(item[0], _FILE), item[1]


def identity_from(data: Any) -> Identity:
    """Who computed something, as JSON says; ValueError where it makes no sense."""
    return Identity(
        model=_of(data, "model", str),
        weights=_of(data, "weights", str),
        dtype=_of(data, "dtype", str),
        block_tokens=_count(data, "block_tokens", 1, _MOST_TOKENS),
        segment_tokens=_count(data, "segment_tokens", 1, _MOST_TOKENS),
        lossy=_of(data, "lossy", bool),
    )


def _entry_json(entry: Entry, number: Mapping[str, int]) -> dict[str, Any]:
    plain = {name: getattr(entry, name) for name in ("before", "start", "tokens", "digest")}
    return plain | {"files": [number[file] for file in entry.files]}


def _entry(data: Any, names: list[str]) -> Entry:
    files = _of(data, "files", list)
    if not all(type(i) is int and 0 <= i < len(names) for i in files) or not files:
        raise ValueError("a segment is in files that are not listed")
    named = tuple(names[i] for i in files)
    return Entry(
        _text(data, "before", _NAME),
        _count(data, "start"),
        _count(data, "tokens", 1),
        _text(data, "digest", _NAME),
        named,
    )


def _context(name: str, data: Any) -> Context:
    needs = _text(data, "needs", _NAME) if "needs" in data else ""
    return Context(name, _count(data, "tokens", 1), float(_of(data, "created", float)), needs)


def _layer(data: Any, tokens: int) -> LayerBlocks:
    heads, size = _count(data, "kv_heads", 1, 1 << 16), _count(data, "block_tokens", 1, _MOST_TOKENS)
    runs = -(-tokens // size)
    files, where = _of(data, "files", list), _of(data, "where", list)
    if len(where) != runs or not all(type(i) is int and 0 <= i < len(files) for i in where):
        raise ValueError("blocks are in files that are not listed")
    return LayerBlocks(
        heads,
        _count(data, "k_dim", 1, 1 << 20),
        _count(data, "v_dim", 0, 1 << 20),
        _of(data, "dtype", str),
        size,
        tuple(_matching(f, _FILE) for f in files),
        np.array(where, np.int64),
        _unpacked(_of(data, "digests", str), "<u8", heads * runs).astype(np.uint64).reshape(heads, runs),
    )
