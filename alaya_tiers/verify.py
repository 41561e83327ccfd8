"""Everything that is stored, read and compared with its digests."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from alaya_tiers import digest
from alaya_tiers.blocks import PAGE, BlockShape, round_up
from alaya_tiers.coded import problem_of
from alaya_tiers.commit import GENERATIONS, SEGMENTS, is_plain, load_needs, load_segment, needs_path
from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.manifest import MOST_BYTES, Context, LayerBlocks, Manifest, Segment
from alaya_tiers.seams import Disk, read_up_to
from alaya_tiers.tiers.files import digests_bytes
from alaya_tiers.tiers.zarr_format import array_json, group_json, shard_offsets, storable

PIECE = 1 << 20
"""Bytes read at a time, whatever a record says the size of a block is."""

Kind = Literal["format", "manifest", "record", "blocks", "shard", "metadata", "index", "leftover"]
FATAL = ("record", "blocks")
"""Kinds of damage that take tokens away."""


class Damage(NamedTuple):
    """What is wrong.

    contexts: ids of those that need it. path: the file. kind: "format" (what the store says it is), "manifest",
    "record" (of a segment), "blocks" (keys and values), "shard" and "metadata" (we can read it, other Zarr readers
    cannot), "index" (codes, made again when needed; what heads need), "leftover" (belongs to nothing). segment: its
    name, where it belongs to one. run: for blocks, which run of the segment.
    """

    contexts: tuple[str, ...]
    path: str
    problem: str
    kind: Kind = "blocks"
    segment: str | None = None
    run: int | None = None


class Flaw(NamedTuple):
    """The same inside a segment."""

    path: str
    problem: str
    kind: Kind = "blocks"
    run: int | None = None


def verify(disk: Disk, root: str, manifest: Manifest, say: Callable[[int, int], None]) -> Iterator[Damage]:
    """All damage to what a manifest names. say: told how many segments are done, of how many."""
    yield from _groups(disk, root, manifest)
    needed: dict[str, list[str]] = {}
    for context in manifest.contexts:
        for name in manifest.chain(context):
            needed.setdefault(name, []).append(context)
    for done, name in enumerate(manifest.segments):
        contexts = tuple(needed.get(name, ()))
        try:
            segment = load_segment(disk, root, manifest, name)
        except StoreCorrupt as error:
            yield Damage(contexts, str(error.filename), str(error.strerror), "record", name)
        else:
            tokens = manifest.identities[manifest.root(name)].segment_tokens
            for flaw in flaws(disk, root, segment, tokens):
                yield Damage(contexts, flaw.path, flaw.problem, flaw.kind, name, flaw.run)
            path = f"{root}/{SEGMENTS}/{name}/index"
            if problem := problem_of(disk, path, manifest.segments[name].digest):
                yield Damage(contexts, path, problem, "index", name)
        if name in manifest.contexts:
            yield from _needs(disk, root, manifest.contexts[name])
        say(done + 1, len(manifest.segments))


def flaws(disk: Disk, root: str, segment: Segment, tokens: int, *, blocks_only: bool = False) -> Iterator[Flaw]:
    """All damage to the arrays of a segment. tokens: of a whole one."""
    for number, layer in segment.layers.items():
        try:
            shape = layer.shape
        except ValueError as error:
            yield Flaw(root, str(error), "record")
            continue
        blocks, odd = divmod(tokens, layer.block_tokens)
        fits = not odd and 0 < layer.kv_heads * blocks <= MOST_BYTES // 16 and layer.where.size <= blocks
        if not fits or not storable(shape.geometry.dtype):
            yield Flaw(root, "a record speaks of blocks that no segment like it has", "record")
            continue
        for place, folder in enumerate(layer.files):
            path = f"{root}/{folder}/c/0/0/0"
            here = np.flatnonzero(layer.where == place).tolist()
            if not is_plain(disk, root, f"{folder}/c/0/0/0"):
                yield Flaw(path, "a link leads out of the store and was not followed", "blocks", min(here, default=0))
                continue
            try:
                yield from _file(disk, path, layer, shape, place, blocks, blocks_only=blocks_only)
            except OSError as error:
                yield Flaw(path, f"cannot be read: {error.strerror}", "blocks", min(here, default=0))
            if not blocks_only:
                yield from _metadata(disk, f"{root}/{folder}/zarr.json", segment, layer, place, shape, tokens, number)


def _needs(disk: Disk, root: str, context: Context) -> Iterator[Damage]:
    """What is wrong with the needs of a context: nothing, if there are none."""
    try:
        load_needs(disk, root, context)
    except (OSError, ValueError) as error:
        yield Damage((context.id,), needs_path(root, context.id), f"not used: {error}", "index", context.id)


def is_group(data: bytes) -> bool:
    """Whether this is the metadata of a Zarr group, whatever its attributes are."""
    try:
        found, wanted = json.loads(data), json.loads(group_json({}))
        return isinstance(found, dict) and found | {"attributes": {}} == wanted | {"attributes": {}}
    except (ValueError, RecursionError):
        return False


def _groups(disk: Disk, root: str, manifest: Manifest) -> Iterator[Damage]:
    """Metadata that leads other Zarr readers to the arrays."""
    folders = [GENERATIONS, SEGMENTS] if manifest.generation else []
    folders += [f"{GENERATIONS}/{manifest.generation}"] if manifest.generation else []
    for folder in folders + sorted({name.split("/")[0] for name in manifest.files}):
        path = f"{root}/{folder}/zarr.json"
        try:
            sound = is_group(disk.fetch(path, MOST_BYTES))
        except OSError:
            sound = False
        if not sound:
            yield Damage((), path, "the group's metadata is missing or damaged", "metadata")


def _file(
    disk: Disk, path: str, layer: LayerBlocks, shape: BlockShape, number: int, blocks: int, *, blocks_only: bool
) -> Iterator[Flaw]:
    """One shard: its blocks, and that its index leads any Zarr reader to them."""
    stride = round_up(shape.nbytes, PAGE)
    offsets = (np.arange(layer.kv_heads)[:, None] * blocks + np.arange(blocks)) * stride
    handle = disk.open(path, create=False, direct=False)
    try:
        for run in np.flatnonzero(layer.where == number).tolist():
            for head in range(layer.kv_heads):
                if _digest(disk, handle, int(offsets[head, run]), shape.nbytes) != int(layer.digests[head, run]):
                    yield Flaw(path, f"block {run} of head {head} is missing or damaged", "blocks", run)
        if blocks_only:
            return
        rows = (offsets.size, digest.pages_in(shape.nbytes))
        told, size = digests_bytes(rows), offsets.size * 16 + 4
        tail = read_up_to(disk, handle, offsets.size * stride, told + size + 1)
    finally:
        disk.close(handle)
    runs = np.flatnonzero(layer.where == number)
    index = shard_offsets(tail[-size:], offsets.size, shape.nbytes) if len(tail) in (size, told + size) else None
    if index is None or not (index.reshape(offsets.shape)[:, runs] == offsets[:, runs]).all():
        yield Flaw(path, "the shard's index is damaged: other Zarr readers do not find all blocks", "shard")
    elif len(tail) > size:  # stores made before there were digests of pages have none
        pages = np.frombuffer(tail, "<u8", rows[0] * rows[1]).reshape(*offsets.shape, -1)[:, runs]
        if (digest.of_pages(pages.reshape(-1, rows[1])) != layer.digests[:, runs].ravel()).any():
            yield Flaw(path, "digests of pages are damaged: cold blocks are read whole", "shard")


def _metadata(
    disk: Disk,
    path: str,
    segment: Segment,
    layer: LayerBlocks,
    place: int,
    shape: BlockShape,
    tokens: int,
    number: int,
) -> Iterator[Flaw]:
    """That other Zarr readers see an array with all tokens."""
    last = int(np.flatnonzero(layer.where == place).max(initial=-1))
    least = min(segment.tokens.size, (last + 1) * layer.block_tokens)
    try:
        found: Any = json.loads(disk.fetch(path, MOST_BYTES))
        length = found["shape"][1]
        ours = found["attributes"]["alaya_tiers"]
        wanted = json.loads(_whole_array(shape, tokens))
        wanted["shape"][1], wanted["attributes"]["alaya_tiers"] = length, ours
        fits = found == wanted and least <= length <= tokens and ours["layer"] == number
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        fits = False
    if not fits:
        yield Flaw(path, "the array's metadata is missing or damaged", "metadata")


@functools.lru_cache(256)
def _whole_array(shape: BlockShape, tokens: int) -> bytes:
    """The metadata of an array of a whole segment; zarr takes its time to make one."""
    return array_json(shape, tokens, tokens, {})


def _digest(disk: Disk, handle: int, offset: int, nbytes: int) -> int | None:
    """The digest of a block; None if the file ends before it does."""
    pages = []
    for at in range(0, nbytes, PIECE):
        part = read_up_to(disk, handle, offset + at, min(PIECE, nbytes - at))
        if len(part) < min(PIECE, nbytes - at):
            return None
        pages.append(digest.pages_of(part))
    return int(digest.of_pages(np.concatenate(pages)[None])[0])
