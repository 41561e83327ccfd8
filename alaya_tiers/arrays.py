"""Arrays of stored segments, written anew: in their place, where other readers were misled, or into another store."""

import errno
import os
from collections.abc import Iterable

import numpy as np

from alaya_tiers import digest
from alaya_tiers.blocks import PAGE, round_up
from alaya_tiers.digest import Digests
from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.manifest import LayerBlocks, Manifest, Segment
from alaya_tiers.seams import Disk, read_up_to, write_all, write_new
from alaya_tiers.tiers.files import digests_behind, translate
from alaya_tiers.tiers.zarr_format import array_json, group_json, shard_index

PIECE = 1 << 20


def stride_of(layer: LayerBlocks) -> int:
    """Bytes from one block to the next in a shard."""
    return round_up(layer.shape.nbytes, PAGE)


def write_array(
    disk: Disk, source: str, target: str, folder: str, segments: Iterable[Segment], manifest: Manifest
) -> list[str]:
    """The array in ``folder``: the blocks these segments have in it, its index, its metadata; the files, durable.

    source, target: stores, perhaps the same one: the old shard is replaced in one step then. Raises StoreError.
    """
    users = [
        (segment, layer, np.flatnonzero(layer.where == place), manifest.identities[manifest.root(segment.name)])
        for segment in segments
        for layer in segment.layers.values()
        for place, name in enumerate(layer.files)
        if name == folder
    ]
    layer, whole = users[0][1], users[0][3].segment_tokens
    shape, blocks = layer.shape, whole // layer.block_tokens
    runs = np.unique(np.concatenate([mine for _, _, mine, _ in users]))
    tokens = max(min(s.tokens.size, (int(mine.max(initial=-1)) + 1) * layer.block_tokens) for s, _, mine, _ in users)
    offsets = np.full((layer.kv_heads, blocks), -1, np.int64)
    offsets[:, runs] = (np.arange(layer.kv_heads)[:, None] * blocks + runs) * stride_of(layer)
    shard = os.path.join(folder, "c", "0", "0", "0")
    where, partial = os.path.join(target, shard), os.path.join(target, f"{shard}.partial")
    try:
        disk.remove(partial)
        given = disk.open(os.path.join(source, shard), create=False, direct=False)
        try:
            taken = disk.open(partial, create=True, direct=False)
            try:
                pages = np.zeros((offsets.size, digest.pages_in(shape.nbytes)), np.uint64)
                for offset in offsets[offsets >= 0].tolist():
                    end = offset + shape.nbytes
                    copied = [
                        _copy(disk, given, taken, at, min(PIECE, end - at), shard) for at in range(offset, end, PIECE)
                    ]
                    pages[offset // stride_of(layer)] = np.concatenate(copied)
                behind = digests_behind(pages) + shard_index(offsets, shape.nbytes)
                write_all(disk, taken, behind, offsets.size * stride_of(layer))
            finally:
                disk.close(taken)
        finally:
            disk.close(given)
        _in_place(disk, partial, where)
    except OSError as error:
        raise translate(error, where, "write") from error
    stream, segment, number = _numbers(folder)
    ours = {"alaya_tiers": {"layer": number, "stream": stream, "segment": segment}}
    metadata = os.path.join(target, folder, "zarr.json")
    return [where, replaced(disk, metadata, array_json(shape, tokens, whole, ours)), _group(disk, target, folder)]


def replaced(disk: Disk, path: str, data: bytes) -> str:
    """Put a small file in place of what there was, in one step and durably; its path. Raises StoreError."""
    try:
        write_new(disk, f"{path}.partial", [(0, data)])
        _in_place(disk, f"{path}.partial", path)
    except OSError as error:
        raise translate(error, path, "write") from error
    return path


def _group(disk: Disk, root: str, folder: str) -> str:
    """The metadata of the group an array is in."""
    return replaced(disk, os.path.join(root, os.path.dirname(folder), "zarr.json"), group_json({}))


def _in_place(disk: Disk, partial: str, path: str) -> None:
    disk.sync(partial)
    disk.rename(partial, path)
    disk.sync(os.path.dirname(path))


def _copy(disk: Disk, given: int, taken: int, offset: int, nbytes: int, path: str) -> Digests:
    """A piece of a block; the digests of its pages."""
    data = read_up_to(disk, given, offset, nbytes)
    if len(data) < nbytes:
        raise StoreCorrupt(errno.EIO, "the file ends before the block does", path)
    write_all(disk, taken, data, offset)
    return digest.pages_of(data)


def _numbers(folder: str) -> tuple[int, int, int]:
    """Stream, segment and layer of an array, as its folder says: session-X/s<stream>-<segment>/layer_<n>."""
    _, group, layer = folder.split("/")
    stream, segment = group.removeprefix("s").split("-")[:2]
    return int(stream), int(segment), int(layer.removeprefix("layer_"))
