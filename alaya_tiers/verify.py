"""Everything that is stored, read and compared with its digests."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from alaya_tiers import digest
from alaya_tiers.blocks import PAGE, Geometry, round_up
from alaya_tiers.commit import load_segment
from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.manifest import MOST_BYTES, LayerBlocks, Manifest, Segment
from alaya_tiers.seams import Disk
from alaya_tiers.tiers.zarr_format import shard_offsets

PIECE = 1 << 20
"""Bytes read at a time, whatever a record says the size of a block is."""


class Damage(NamedTuple):
    """What is wrong. contexts: ids of those that need it. path: the file."""

    contexts: tuple[str, ...]
    path: str
    problem: str


def verify(disk: Disk, root: str, manifest: Manifest, say: Callable[[int, int], None]) -> Iterator[Damage]:
    """All damage to records, blocks, shard indexes and metadata. say: told how many segments are done, of how many."""
    needed: dict[str, list[str]] = {}
    for context in manifest.contexts:
        for name in manifest.chain(context):
            needed.setdefault(name, []).append(context)
    for done, name in enumerate(manifest.segments):
        contexts = tuple(needed.get(name, ()))
        try:
            segment = load_segment(disk, root, manifest, name)
        except StoreCorrupt as error:
            yield Damage(contexts, str(error.filename), str(error.strerror))
        else:
            tokens = manifest.identities[manifest.root(name)].segment_tokens
            for layer in segment.layers.values():
                for path, problem in _layer(disk, root, segment, layer, tokens):
                    yield Damage(contexts, path, problem)
        say(done + 1, len(manifest.segments))


def _layer(disk: Disk, root: str, segment: Segment, layer: LayerBlocks, tokens: int) -> Iterator[tuple[str, str]]:
    dtype = getattr(torch, layer.dtype, None)
    if not isinstance(dtype, torch.dtype):
        yield root, f"there is no dtype {layer.dtype!r}"
        return
    blocks, odd = divmod(tokens, layer.block_tokens)
    if odd or not 0 < layer.kv_heads * blocks <= MOST_BYTES // 16 or layer.where.size > blocks:
        yield root, "a record speaks of blocks that do not fit its segment"
        return
    nbytes = layer.block_tokens * Geometry(layer.kv_heads, layer.k_dim, layer.v_dim, dtype).row_bytes
    for number, folder in enumerate(layer.files):
        path = f"{root}/{folder}/c/0/0/0"
        try:
            yield from ((path, problem) for problem in _file(disk, path, layer, number, tokens, nbytes))
            yield from _metadata(disk, f"{root}/{folder}/zarr.json", segment, layer, number)
        except OSError as error:
            yield path, f"cannot be read: {error.strerror}"


def _file(disk: Disk, path: str, layer: LayerBlocks, number: int, tokens: int, nbytes: int) -> Iterator[str]:
    """One shard: its blocks, and that its index leads any Zarr reader to them."""
    blocks, stride = tokens // layer.block_tokens, round_up(nbytes, PAGE)
    offsets = (np.arange(layer.kv_heads)[:, None] * blocks + np.arange(blocks)) * stride
    handle = disk.open(path, create=False, direct=False)
    try:
        for run in np.flatnonzero(layer.where == number).tolist():
            for head in range(layer.kv_heads):
                if _digest(disk, handle, int(offsets[head, run]), nbytes) != int(layer.digests[head, run]):
                    yield f"block {run} of head {head} is missing or damaged"
        index = shard_offsets(_read(disk, handle, offsets.size * stride, offsets.size * 16 + 4), offsets.size, nbytes)
    finally:
        disk.close(handle)
    here = np.broadcast_to(np.arange(blocks) < 0, offsets.shape).copy()
    here[:, np.flatnonzero(layer.where == number)] = True
    if index is None or not (index.reshape(offsets.shape)[here] == offsets[here]).all():
        yield "the shard's index is damaged: other Zarr readers do not find all blocks"


def _metadata(disk: Disk, path: str, segment: Segment, layer: LayerBlocks, number: int) -> Iterator[tuple[str, str]]:
    """That other Zarr readers see an array with all tokens."""
    last = int(np.flatnonzero(layer.where == number).max(initial=-1))
    tokens = min(segment.tokens.size, (last + 1) * layer.block_tokens)
    try:
        found: Any = json.loads(disk.fetch(path, MOST_BYTES))
        heads, length, width = found["shape"]
        fits = (heads, width) == (layer.kv_heads, layer.k_dim + layer.v_dim) and length >= tokens
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        yield path, "the array's metadata is missing or damaged"


def _digest(disk: Disk, handle: int, offset: int, nbytes: int) -> int | None:
    """The digest of a block; None if the file ends before it does."""
    pages = []
    for at in range(0, nbytes, PIECE):
        part = _read(disk, handle, offset + at, min(PIECE, nbytes - at))
        if len(part) < min(PIECE, nbytes - at):
            return None
        pages.append(digest.pages_of(part))
    return int(digest.of_pages(np.concatenate(pages)[None])[0])


def _read(disk: Disk, handle: int, offset: int, nbytes: int) -> bytearray:
    """Up to ``nbytes``; fewer at the end of the file."""
    data, done = bytearray(nbytes), 0
    while done < nbytes:
        more = disk.read(handle, [memoryview(data)[done:]], offset + done)
        if more <= 0:
            break
        done += more
    return data[:done]
