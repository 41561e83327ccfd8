"""The bytes of our Zarr v3 directory that are not KV: metadata and shard indexes.

    <root>/zarr.json                                   group; attributes["alaya_tiers"]: format, model
    <root>/<session>/zarr.json                         group; attributes: contexts (which segments, how many tokens)
    <root>/<session>/s<stream>-<segment>/layer_<n>/    array [kv_heads, tokens, k_dim + v_dim]: row = key, then value
                                        zarr.json      written when the segment is full, or by flush()
                                        c/0/0/0        one shard: inner chunks [1, block_tokens, k_dim + v_dim]

Shards are uncompressed; inner chunks start at multiples of a page so that O_DIRECT can read them in place, which the
shard index allows. zarr-python 3.1 has no bfloat16: such arrays are uint16 with attribute ``dtype = "bfloat16"``.
Array metadata is made by zarr itself, in memory; our own writer puts it, the extents and the index on disk.
"""

import json
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from alaya_tiers.blocks import BlockShape

FORMAT = 3
"""Version of the directory's layout; a higher one is refused."""

MISSING = np.uint64(2**64 - 1)
"""Shard index entry of a chunk that is not there (Zarr v3 sharding codec)."""

_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "uint16",
    torch.float64: "float64",
}
_NAN = {"uint16": 0x7FC0}
"""A bfloat16 NaN: should a reader ever meet the fill value, it cannot pass for a number."""


def storable(dtype: torch.dtype) -> bool:
    """Whether KV of this dtype can be written."""
    return dtype in _DTYPES


def array_json(shape: BlockShape, tokens: int, segment_tokens: int, attributes: dict[str, Any]) -> bytes:
    """zarr.json of a segment's array: [kv_heads, tokens, width], one shard of ``segment_tokens``."""
    g, dtype = shape.geometry, _DTYPES[shape.geometry.dtype]
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=(g.kv_heads, tokens, g.width),
        shards=(g.kv_heads, segment_tokens, g.width),
        chunks=(1, shape.tokens, g.width),
        dtype=dtype,
        compressors=None,
        filters=None,
        fill_value=_NAN.get(dtype, float("nan")),
        attributes={"k_dim": g.k_dim, "v_dim": g.v_dim, "dtype": str(g.dtype).removeprefix("torch."), **attributes},
    )
    return _metadata(store)


def group_json(attributes: dict[str, Any]) -> bytes:
    """zarr.json of a group. Written by ourselves, on one line: a manifest has megabytes, which zarr indents."""
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}).encode()


def attributes_of(metadata: bytes) -> dict[str, Any]:
    """The attributes in a zarr.json; ValueError when it is not one of Zarr v3."""
    data = json.loads(metadata)
    if not isinstance(data, dict) or data.get("zarr_format") != 3 or not isinstance(data.get("attributes", {}), dict):
        raise ValueError("not the metadata of a Zarr v3 group")
    return dict(data.get("attributes", {}))


def shard_index(offsets: npt.NDArray[np.int64], nbytes: int) -> bytes:
    """The index at a shard's end. offsets: of every inner chunk in C order, -1 where there is none."""
    entries = np.full((offsets.size, 2), MISSING, "<u8")
    here = offsets.ravel() >= 0
    entries[here, 0], entries[here, 1] = offsets.ravel()[here], nbytes
    raw = entries.tobytes()
    return raw + int(google_crc32c.value(raw)).to_bytes(4, "little")


def shard_index_bytes(blocks: int) -> int:
    """How long the index of a shard of so many inner chunks is."""
    return 16 * blocks + 4


def shard_offsets(raw: bytes | bytearray, count: int, nbytes: int) -> npt.NDArray[np.int64] | None:
    """What such an index says, -1 where there is no chunk; None if it is damaged."""
    if len(raw) != shard_index_bytes(count) or int(google_crc32c.value(bytes(raw[:-4]))) != int.from_bytes(
        raw[-4:], "little"
    ):
        return None
    entries = np.frombuffer(bytes(raw[:-4]), "<u8").reshape(count, 2)
    missing = (entries == MISSING).all(1)
    if not (missing | (entries[:, 1] == nbytes)).all():
        return None
    return np.where(missing, -1, entries[:, 0].astype(np.int64))


def _metadata(store: MemoryStore) -> bytes:
    buffer = sync(store.get("zarr.json", default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()
