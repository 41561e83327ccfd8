"""`alaya-tiers index`: the index of a stored context, made now instead of in the idle time of whoever opens it."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.seams import SystemDisk
from alaya_tiers.snapshot import Snapshot
from alaya_tiers.tools.carry import Name, named
from alaya_tiers.tools.fsck import progress
from alaya_tiers.tools.stored import Directory


def command(
    path: Directory,
    context: Name,
    bits: Annotated[int, typer.Option(help="Of each number of a key: 4, or 8 in twice the bytes.")] = 4,
) -> None:
    """Makes the index of a stored context, for sessions of mode="sparse" with this index_bits.

    It is kept beside the context, segment by segment: stopped or killed at any point, the same command goes on after
    the last whole one. Nothing needs it: what has no index is attended exactly, and indexed in idle time. Takes memory
    for all codes (4 bits: an eighth of 16-bit keys and values). Nobody else may have the store open for writing.
    """
    snapshot = Snapshot(path, None, SystemDisk())
    try:
        name = named(snapshot.manifest, context)
        identity = snapshot.manifest.identities[snapshot.manifest.root(name)]
    finally:
        snapshot.close()
    settings = Settings(
        mode="sparse", index_bits=bits, index_budget=None, block_tokens=identity.block_tokens,
        segment_tokens=identity.segment_tokens,
    )  # fmt: skip
    engine, began = Engine(settings, str(path)), time.perf_counter()
    try:
        contexts = Contexts(engine)
        with progress("indexing") as say:
            contexts.index(name, say)
        made = 0.0 if engine.partitions is None else engine.partitions.seconds
        nbytes = sum(_size(contexts.shelf.index_path(one)) for one in contexts.manifest.chain(name))
        tokens = contexts.manifest.contexts[name].tokens
    finally:
        engine.close()
    spent = f"{time.perf_counter() - began:.1f} s, {made:.1f} of them making codes"
    print(f"{tokens:,} tokens of context {name[:12]}: {format_bytes(nbytes)} of index, {spent}.")


def _size(path: str) -> int:
    return os.path.getsize(path) if Path(path).exists() else 0
