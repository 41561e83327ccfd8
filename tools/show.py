"""`alaya-tiers show`: what a store, or one context in it, holds and where."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from alaya_tiers.arrays import stride_of
from alaya_tiers.config import format_bytes
from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.manifest import Manifest, Segment
from alaya_tiers.seams import SystemDisk
from alaya_tiers.snapshot import Shelf, Snapshot
from alaya_tiers.tools.carry import named
from alaya_tiers.tools.stored import AsJson, Directory, counted

COLOURS = {"shared": "cyan", "own": "green", "unreadable": "red"}


def show(
    path: Directory,
    context: Annotated[
        str | None, typer.Argument(help="A context: its id, or the first characters of it.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Shows what a store holds and where, or one context of it. Reads records, no keys and values; may be in use."""
    shelf = Snapshot(path, None, SystemDisk())
    try:
        chosen = [named(shelf.manifest, context)] if context is not None else list(shelf.manifest.contexts)
        report = described(shelf, chosen)
    finally:
        shelf.close()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    one = report["contexts"][0] if context is not None else None
    Console().print(drawn(report) if one is None else detailed(one))


def described(shelf: Shelf, chosen: list[str]) -> dict[str, Any]:
    """The store and these contexts as JSON values; sizes in bytes.

    bytes: of keys and values, as they lie on disk; index_bytes: of codes; shared: how many contexts use a segment.
    """
    manifest = shelf.manifest
    users: dict[str, int] = {}
    for name in (n for c in manifest.contexts for n in manifest.chain(c)):
        users[name] = users.get(name, 0) + 1
    segments = {n: _segment(shelf, n, users[n]) for n in {n for c in chosen for n in manifest.chain(c)}}
    return {
        "model": shelf.model,
        "generation": manifest.generation,
        "bytes": sum(manifest.files.values()),
        "index_bytes": sum(_index_bytes(shelf, n) for n in manifest.segments),
        "contexts": [_context(manifest, c, segments) for c in chosen],
    }


def _context(manifest: Manifest, name: str, segments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    identity, context = manifest.identities[manifest.root(name)], manifest.contexts[name]
    mine = [segments[n] for n in manifest.chain(name)]
    return {
        "id": name,
        "tokens": context.tokens,
        "created": datetime.fromtimestamp(context.created, UTC).isoformat(timespec="seconds"),
        "identity": asdict(identity),
        "layers": next((s["layers"] for s in mine if s["layers"]), []),
        "tail_tokens": context.tokens % identity.segment_tokens,
        "shared_tokens": sum(s["tokens"] for s in mine if s["shared"] > 1),
        "bytes": sum(s["bytes"] for s in mine),
        "index_bytes": sum(s["index_bytes"] for s in mine),
        "segments": mine,
    }


def _segment(shelf: Shelf, name: str, users: int) -> dict[str, Any]:
    entry = shelf.manifest.segments[name]
    try:
        record = shelf.record(name)
        layers, keys, values, nbytes = _layers(record)
    except StoreCorrupt:
        layers, keys, values, nbytes = [], 0, 0, 0
    return {
        "name": name,
        "start": entry.start,
        "tokens": entry.tokens,
        "shared": users,
        "readable": bool(layers),
        "layers": layers,
        "key_bytes": keys,
        "value_bytes": values,
        "bytes": nbytes,
        "index_bytes": _index_bytes(shelf, name),
        "files": list(entry.files),
    }


def _layers(record: Segment) -> tuple[list[dict[str, Any]], int, int, int]:
    """What each layer is, and bytes of keys, of values, and on disk with the padding of blocks."""
    found, keys, values, nbytes = [], 0, 0, 0
    for number, layer in sorted(record.layers.items()):
        names = ("kv_heads", "k_dim", "v_dim", "dtype", "block_tokens")
        found.append({"layer": number} | {name: getattr(layer, name) for name in names})
        rows = layer.kv_heads * record.tokens.size
        size = stride_of(layer) * layer.kv_heads * layer.where.size
        item = layer.shape.geometry.dtype.itemsize
        keys, values, nbytes = keys + rows * layer.k_dim * item, values + rows * layer.v_dim * item, nbytes + size
    return found, keys, values, nbytes


def _index_bytes(shelf: Shelf, name: str) -> int:
    path = Path(shelf.index_path(name))
    return path.lstat().st_size if path.is_file() and not path.is_symlink() else 0


def drawn(report: dict[str, Any]) -> RenderableType:
    """All contexts: a bar of segments each, to one scale."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("context", no_wrap=True)
    table.add_column("segments", ratio=1)
    for name in ("tokens", "K and V", "index"):
        table.add_column(name, justify="right", no_wrap=True)
    longest = max((len(c["segments"]) for c in report["contexts"]), default=1)
    for one in report["contexts"]:
        sizes = (format_bytes(one["bytes"]), format_bytes(one["index_bytes"]) if one["index_bytes"] else "–")
        table.add_row(one["id"][:12], bar(one, longest), f"{one['tokens']:,}", *sizes)
    kind = f" of a {report['model']['model_type']} model" if "model_type" in (report["model"] or {}) else ""
    total = f"{counted(len(report['contexts']))}{kind}, generation {report['generation']}, "
    total += f"{format_bytes(report['bytes'])} of keys and values, {format_bytes(report['index_bytes'])} of index."
    return Group(table, legend(), Text(total)) if report["contexts"] else Text(total)


def bar(one: dict[str, Any], longest: int) -> Text:
    """A character a segment, or one for several where there are too many."""
    text, step = Text(), -(-longest // 48)
    segments = one["segments"]
    for at in range(0, len(segments), step):
        group = segments[at : at + step]
        kind = "unreadable" if not all(s["readable"] for s in group) else _kind(group[-1])
        partial = at + step >= len(segments) and one["tail_tokens"]
        text.append("▌" if partial else "█", COLOURS[kind])
    return text


def legend() -> Text:
    return Text.assemble(
        *((part, style) for name, style in COLOURS.items() for part, style in (("█", style), (f" {name}  ", "dim"))),
        ("▌ not full", "dim"),
    )


def _kind(segment: dict[str, Any]) -> str:
    return "shared" if segment["shared"] > 1 else "own"


def detailed(one: dict[str, Any]) -> RenderableType:
    """One context: its segments, and what each takes."""
    identity, layers = one["identity"], one["layers"]
    kinds = {(n["kv_heads"], n["k_dim"], n["v_dim"], n["dtype"], n["block_tokens"]) for n in layers}
    what = "; ".join(
        f"{h} kv heads, keys of {k} and values of {v} {d}, blocks of {b}" for h, k, v, d, b in sorted(kinds)
    )
    lines = [
        Text.assemble((one["id"], "bold")),
        Text(f"{one['tokens']:,} tokens, stored {one['created'][:16]}, {'lossy' if identity['lossy'] else 'exact'}"),
        Text(f"{len(layers)} layers: {what}"),
        Text(f"{one['shared_tokens']:,} tokens shared with other contexts, {one['tail_tokens']:,} in a tail not full"),
        Text(f"{format_bytes(one['bytes'])} of keys and values on disk, {format_bytes(one['index_bytes'])} of index"),
        Text.assemble(bar(one, len(one["segments"])), "  ", legend()),
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("segment", "tokens", "", "keys", "values", "index", "files in"):
        table.add_column(name, no_wrap=name != "files in", justify="right" if name in ("keys", "values") else "left")
    for s in one["segments"]:
        end = f"{s['start']:,} … {s['start'] + s['tokens']:,}"
        whose = f"shared by {s['shared']}" if s["shared"] > 1 else "own"
        index = format_bytes(s["index_bytes"]) if s["index_bytes"] else "–"
        where = ", ".join(sorted({name.rpartition("/")[0] for name in s["files"]}))
        sizes = (format_bytes(s["key_bytes"]), format_bytes(s["value_bytes"]), index)
        table.add_row(s["name"][:12], end, Text(whose if s["readable"] else "unreadable", _style(s)), *sizes, where)
    return Group(*lines, Text(), table)


def _style(segment: dict[str, Any]) -> str:
    return COLOURS["unreadable" if not segment["readable"] else _kind(segment)]
