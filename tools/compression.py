"""``alaya-tiers bench compression``: what lossless codecs make of keys and values, and whether a disk is slow enough.

Blocks as they are stored, each compressed by itself, by the codecs any Zarr reader knows. It pays when the disk saves
more than one core needs to decode, both at once: min(disk x ratio, decode) against the disk's own speed.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from numcodecs import Blosc, Zstd, blosc
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine, rawdisk
from alaya_tiers.tools.bench import BUSY
from alaya_tiers.tools.corpus import WordTokenizer, stdlib_text
from alaya_tiers.tools.demo import SLOTS, load
from alaya_tiers.tools.machine import Bandwidth, CpuUse
from alaya_tiers.tools.quality import prefilled
from alaya_tiers.tools.quotation import build_model, fill
from alaya_tiers.tools.reporting import JsonFile, one_line_errors, show

BLOCK = 256
CODECS: dict[str, Callable[[], Any]] = {
    "lz4, bitshuffle": lambda: Blosc("lz4", 5, Blosc.BITSHUFFLE),
    "zstd 1, bitshuffle": lambda: Blosc("zstd", 1, Blosc.BITSHUFFLE),
    "zstd 1, byte shuffle": lambda: Blosc("zstd", 1, Blosc.SHUFFLE),
    "zstd 1": lambda: Zstd(1),
}

Numbers = npt.NDArray[Any]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Compressed:
    """One codec on one kind of data. ratio: plain over compressed. encode, decode: bytes of plain data a second."""

    data: str
    part: str
    block_bytes: int
    codec: str
    ratio: float
    encode: float
    decode: float

    def gain(self, disk: float) -> float:
        """How many times as fast reading is, with one core that decodes while the disk reads."""
        return min(disk * self.ratio, self.decode) / disk


@dataclass(frozen=True, slots=True)
class Found:
    """All that was measured."""

    machine: dict[str, Any]
    disk: Bandwidth
    rows: tuple[Compressed, ...]
    cpu_of_others: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [asdict(row) | {"gain": row.gain(self.disk.best)} for row in self.rows]
        facts = {"benchmark": "compression", "machine": self.machine, "cpu_of_others": self.cpu_of_others}
        return facts | {"disk": self.disk.as_dict(), "rows": rows}


def blocks_of(k: Tensor, v: Tensor) -> dict[str, Numbers]:
    """Blocks of keys, of values, and as they are stored, [blocks, BLOCK, dim] each. k, v: [1, heads, tokens, dim]."""
    whole = k.shape[2] // BLOCK * BLOCK
    k, v = (x[0, :, :whole].reshape(-1, BLOCK, x.shape[3]) for x in (k, v))
    parts = {"keys": k, "values": v, "rows of key and value": torch.cat([k, v], 2)}
    return {
        name: (part.view(torch.int16) if part.dtype == torch.bfloat16 else part).contiguous().numpy()
        for name, part in parts.items()
    }


@torch.no_grad()
def trained(folder: str, tokens: int) -> list[dict[str, Numbers]]:
    """Of each layer of a model that reads its unseen text. Raises ConfigError."""
    tokenizer, model = load(folder)
    try:
        text = (Path(folder) / "unseen.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} has no unseen.txt to read: {error}") from error
    ids = torch.tensor(tokenizer(text).input_ids[:tokens])
    layers: list[Any] = prefilled(model, ids).layers
    return [blocks_of(layer.keys, layer.values) for layer in layers]


@torch.no_grad()
def quoting(tokens: int) -> list[dict[str, Numbers]]:
    """Of each layer of the computed model that reads Python's standard library."""
    text = stdlib_text()
    tokenizer, cache = WordTokenizer.fit(text), DynamicCache()
    fill(build_model(tokenizer.vocabulary_size, slots=SLOTS), cache, tokenizer.encode(text)[:tokens])
    layers: list[Any] = cache.layers
    return [blocks_of(layer.keys, layer.values) for layer in layers]


def measure(data: str, part: str, blocks: Numbers, rounds: int) -> Iterator[Compressed]:
    """All codecs on these blocks, on one thread."""
    blosc.use_threads = False
    for name, make in CODECS.items():
        codec, out = make(), np.empty_like(blocks[0])
        encode, packed = _best(partial(_encoded, codec, blocks), rounds)
        decode, _ = _best(partial(_decoded, codec, packed, out), rounds)
        codec.decode(packed[-1], out)
        assert (out == blocks[-1]).all(), f"{name} is not lossless"
        ratio = blocks.nbytes / sum(len(one) for one in packed)
        yield Compressed(data, part, blocks[0].nbytes, name, ratio, blocks.nbytes / encode, blocks.nbytes / decode)


def _encoded(codec: Any, blocks: Numbers) -> list[bytes]:
    return [codec.encode(block) for block in blocks]


def _decoded(codec: Any, packed: list[bytes], out: Numbers) -> None:
    for one in packed:
        codec.decode(one, out)


def _best(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Seconds of the fastest round, and what it gave."""
    best, result = float("inf"), None
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return best, result


def run(model: str, tokens: int, rounds: int, directory: str | None, say: Say) -> Found:
    """Measure everything. Raises ConfigError, OSError."""
    began, rows = CpuUse.now(), list[Compressed]()
    parent = directory or os.environ.get("ALAYA_TIERS_DIR")
    with tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent) as folder:
        say("disk")
        with rawdisk.disk_file(Path(folder), 256 << 20) as file:
            disk = rawdisk.disk_bandwidth(file, file.nbytes)
    for data, layers in ((Path(model).name, trained(model, tokens)), ("computed model", quoting(tokens))):
        for part in layers[0]:
            say(f"{data}, {part}")
            rows += measure(data, part, np.concatenate([layer[part] for layer in layers]), rounds)
    return Found(machine.describe(), disk, tuple(rows), CpuUse.now().others_since(began))


def table(found: Found) -> Table:
    """What was found, for people."""
    made = Table(title="lossless compression of blocks of keys and values", title_justify="left")
    for name in ("data", "part", "block", "codec", "ratio", "encodes GB/s", "decodes GB/s", "reading, x plain"):
        made.add_column(name, justify="right")
    for row in found.rows:
        rates = (f"{rate / 1e9:.2f}" for rate in (row.encode, row.decode))
        gain = f"{row.gain(found.disk.best):.2f}"
        made.add_row(row.data, row.part, format_bytes(row.block_bytes), row.codec, f"{row.ratio:.2f}", *rates, gain)
    busy = f"others took {found.cpu_of_others:.0%} of the cores."
    made.caption = f"One core; the disk reads {found.disk.best / 1e9:.2f} GB/s. {found.machine['cpu']}; {busy}"
    made.caption += " Repeat on a quiet machine." * (found.cpu_of_others > BUSY)
    made.caption_justify = "left"
    return made


def command(
    model: Annotated[str, typer.Option(help="A model that was trained, with an unseen.txt beside it.")],
    tokens: Annotated[int, typer.Option(help="Tokens read.")] = 4096,
    rounds: Annotated[int, typer.Option(help="How often; the fastest counts.")] = 5,
    directory: Annotated[str | None, typer.Option("--dir", help="A directory on the disk to measure.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What lossless codecs make of keys and values. Example: alaya-tiers bench compression --model tests/data/recall"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        if tokens < BLOCK or rounds < 1:
            raise ConfigError(f"--tokens is at least {BLOCK}, --rounds at least 1")
        with errors.status("model") as status:
            found = run(model, tokens, rounds, directory, status.update)
    show([table(found)], found.as_dict(), json_file)
