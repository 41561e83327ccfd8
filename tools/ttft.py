"""``alaya-tiers bench ttft``: the first token from a stored context, against loading it whole and against prefill.

A context is imported into a database once. Then every way starts from nothing, the page cache emptied of its files:
open the store, make a session, decode one token. Loading whole is what libraries do that only offload KV: read
everything into a DynamicCache, then decode with sdpa; here from files of nothing but keys and values, as they will lie
in memory, read by one call for each layer, so that no format is in the way.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf.db import DB
from alaya_tiers.parts import Chunk
from alaya_tiers.tools import machine, rawdisk, reporting
from alaya_tiers.tools.baselines import FILL_TOKENS, QUICK, VOCABULARY, Context, Shape, build_model, contexts_of
from alaya_tiers.tools.machine import Bandwidth, CpuUse
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show
from alaya_tiers.tools.spans import FORWARD, READ, SESSION, STEP, Span, Split, Timeline, draw_splits, split_table

Say = Callable[[str], None]

WAYS = ("sparse", "exact", "load whole")
CONTEXTS = "8K,32K,128K"
PREFILL = 2048
"""Tokens of a prefill, from which that of a longer context is extrapolated: at least in proportion."""


@dataclass(slots=True)
class Way:
    """One way to the first token. Seconds of each round and what they were, and bytes read from the store in one."""

    name: str
    seconds: list[float] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    read_bytes: int = 0

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)

    @property
    def split(self) -> Split:
        """Of the round in the middle."""
        return sorted(self.splits, key=lambda split: split.total)[len(self.splits) // 2]


@dataclass(slots=True)
class Row:
    """One context length. index_bytes: of the files beside the KV. limit: seconds to read the KV at disk speed."""

    tokens: int
    kv_bytes: int
    index_bytes: int
    limit: float
    prefill: float
    ways: list[Way]


@dataclass(slots=True)
class Found:
    """All that was measured."""

    shape: Shape
    sharpness: float
    machine: dict[str, Any]
    disk: Bandwidth | None = None
    cpu_of_others: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        facts = {"benchmark": "ttft", "machine": self.machine, "cpu_of_others": self.cpu_of_others}
        disk = None if self.disk is None else self.disk.as_dict()
        shape = asdict(self.shape) | {"sharpness": self.sharpness}
        return facts | {"shape": shape, "disk": disk, "rows": [asdict(row) for row in self.rows]}


@torch.no_grad()
def run(
    shape: Shape, contexts: tuple[int, ...], rounds: int, sharpness: float, directory: str | None, say: Say
) -> Found:
    """Measure everything. Raises ConfigError, StoreError, OSError."""
    began, found = CpuUse.now(), Found(shape, sharpness, machine.describe())
    model, context = build_model(shape, max(contexts) + 2, sharpness), Context(shape)
    model.set_attn_implementation("alaya")
    parent = directory or os.environ.get("ALAYA_TIERS_DIR")
    with tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent) as folder:
        with rawdisk.disk_file(Path(folder), 64 << 20) as disk:
            found.disk = rawdisk.disk_bandwidth(disk, disk.nbytes)
        say("prefill")
        prefill = _prefill(model, min(PREFILL, *contexts))
        for tokens in contexts:
            say(f"{tokens:,} tokens: importing")
            path = Path(folder) / str(tokens)
            ids = torch.arange(tokens + 1)[None] % VOCABULARY
            with DB(path, model=model, mode="sparse", index_budget=None) as db:
                db.import_context(ids[:, :tokens], _chunks(context, tokens))
            _write_whole(context, path, tokens)
            index = sum(file.stat().st_size for file in path.glob("segments/*/index"))
            ways = [Way(name) for name in WAYS]
            for number in range(rounds):
                for way in ways:
                    say(f"{tokens:,} tokens: {way.name}, {number + 1} of {rounds}")
                    rawdisk.empty_cache([*path.rglob("*"), *path.parent.glob(f"{path.name}-whole-*")])
                    _round(way, path, model, ids)
            kv = tokens * shape.token_bytes
            found.rows.append(Row(tokens, kv, index, kv / found.disk.best, prefill * tokens, ways))
    found.cpu_of_others = CpuUse.now().others_since(began)
    return found


def _prefill(model: Any, tokens: int) -> float:
    """Seconds a token of a prompt takes without any stored context."""
    began = time.perf_counter()
    model(input_ids=torch.arange(tokens)[None] % VOCABULARY, past_key_values=DynamicCache(config=model.config))
    return (time.perf_counter() - began) / tokens


def _chunks(context: Context, tokens: int) -> Iterator[Chunk]:
    shape = context.shape
    for start in range(0, tokens, FILL_TOKENS):
        n = min(FILL_TOKENS, tokens - start)
        chunk = []
        for layer in range(shape.layers):
            kv = torch.empty(2, 1, shape.kv_heads, n, shape.head_dim, dtype=context.dtype)
            context.write(kv, layer, start)
            chunk.append((kv[0], kv[1]))
        yield chunk


def _round(way: Way, path: Path, model: Any, ids: Tensor) -> None:
    """From an open process and a closed store to the first token."""
    timeline, began = Timeline(), time.perf_counter()
    with timeline.watching():
        if way.name == WAYS[-1]:
            end = _load_whole(way, path, model, ids, timeline)
        else:
            end = _from_store(way, path, model, ids, timeline)
    way.splits.append(timeline.split(Span(STEP, FORWARD, began, end)))
    way.seconds.append(way.splits[-1].total)


def _from_store(way: Way, path: Path, model: Any, ids: Tensor, timeline: Timeline) -> float:
    """Open it, make a session, decode a token; when that was done."""
    kv = (ids.shape[1] - 1) * 2 * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    settings: dict[str, Any] = {"mode": "sparse", "index_budget": None} if way.name == "sparse" else {}
    budget = max(64 << 20, kv * model.config.num_hidden_layers // 4)
    opened = partial(DB, path, model=model, device_budget=64 << 20, host_budget=budget, **settings)
    with timeline.note(SESSION, opened) as db:
        session, rest = timeline.note(SESSION, db.create_session, ids)
        model(input_ids=rest, past_key_values=session)
        end = time.perf_counter()
        way.read_bytes = session.stats().read_bytes
    return end


def _write_whole(context: Context, path: Path, tokens: int) -> None:
    """Keys and values of each layer, in a file of their own."""
    shape = context.shape
    for layer in range(shape.layers):
        kv = torch.empty(2, 1, shape.kv_heads, tokens, shape.head_dim, dtype=context.dtype)
        context.write(kv, layer, 0)
        kv.view(torch.uint8).numpy().tofile(_whole(path, layer))


def _load_whole(way: Way, path: Path, model: Any, ids: Tensor, timeline: Timeline) -> float:
    """All keys and values from these files into a DynamicCache, and a token from them; when that was done."""
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (2, 1, config.num_key_value_heads, ids.shape[1] - 1, config.head_dim)
    way.read_bytes = 0
    for layer in range(config.num_hidden_layers):
        data = timeline.note(READ, np.fromfile, _whole(path, layer), np.uint8)
        way.read_bytes += data.nbytes
        k, v = torch.from_numpy(data).view(model.dtype).view(shape)
        cache.update(k, v, layer)
    model.set_attn_implementation("sdpa")
    model(input_ids=ids[:, -1:], past_key_values=cache)
    end = time.perf_counter()
    model.set_attn_implementation("alaya")
    return end


def _whole(path: Path, layer: int) -> Path:
    """Beside the store, which takes no strange files."""
    return path.with_name(f"{path.name}-whole-{layer}")


def table(found: Found) -> Table:
    """What was found, for people."""
    made = Table(title="the first token from a stored context", title_justify="left")
    for name in ("tokens", "way", "ms", "x load whole", "x prefill", "x reading at disk speed", "KV read", "index"):
        made.add_column(name, justify="right")
    for row in found.rows:
        whole = row.ways[-1].median
        for way in row.ways:
            ratios = (whole / way.median, row.prefill / way.median, row.limit / way.median)
            index = format_bytes(row.index_bytes) if way.name == "sparse" else "-"
            made.add_row(
                f"{row.tokens:,}", way.name, f"{way.median * 1e3:.0f}", *(f"{x:.2f}" for x in ratios),
                f"{format_bytes(way.read_bytes)} of {format_bytes(row.kv_bytes)}", index,
            )  # fmt: skip
    s, m = found.shape, found.machine
    speed = 0.0 if found.disk is None else found.disk.best / 1e6
    made.caption_justify = "left"
    made.caption = (
        f"{s.layers} layers, {s.heads}/{s.kv_heads} heads x {s.head_dim}, {s.dtype}, scores' standard deviation "
        f"{found.sharpness:g}; prefill extrapolated in proportion from {PREFILL:,} tokens. Disk {speed:.0f} MB/s. "
        f"{m['cpu']}, {m['cores']} cores; others took {found.cpu_of_others:.0%} of the cores."
    )
    return made


def splits(found: Found) -> list[tuple[str, Split]]:
    """Where the time of each way goes, in the round in the middle."""
    return [(f"{row.tokens:,}, {way.name}", way.split) for row in found.rows for way in row.ways]


def plot(found: Found, path: Path) -> None:
    """Seconds to the first token over context length, and what those of the longest are. Needs matplotlib."""
    pyplot = reporting.pyplot()
    figure, (axes, bars) = pyplot.subplots(1, 2, figsize=(13, 4.5))
    tokens = [row.tokens for row in found.rows]
    for way, name in enumerate(WAYS):
        axes.loglog(tokens, [row.ways[way].median for row in found.rows], marker="o", label=name)
    axes.loglog(tokens, [row.limit for row in found.rows], linestyle="--", label="reading the KV once")
    axes.loglog(tokens, [row.prefill for row in found.rows], linestyle=":", label="prefill, in proportion")
    axes.set(xlabel="tokens of context", ylabel="s to the first token")
    axes.legend()
    draw_splits(bars, [(way.name, way.split) for way in found.rows[-1].ways])
    bars.set(title=f"{tokens[-1]:,} tokens")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def command(
    contexts: Annotated[
        str | None, typer.Option(help=f"Context lengths. default: {CONTEXTS}; {QUICK} with --quick")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each way runs.")] = 3,
    sharpness: Annotated[float, typer.Option(help="Standard deviation of scores; 6 is a sharp head.")] = 6.0,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    layers: int = 8,
    hidden: int = 512,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 64,
    directory: Annotated[str | None, typer.Option("--dir", help="A directory on the disk to measure.")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    quick: Annotated[bool, typer.Option(help="Shows that it runs, measures nothing.")] = False,
) -> None:
    """First token from a stored context, against loading it whole. Example: alaya-tiers bench ttft --contexts 32K"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        lengths = contexts_of(contexts, CONTEXTS, quick=quick)
        if min(*lengths, rounds) < 1 or not 0 < sharpness < 100:
            raise ConfigError("--contexts, --rounds and --sharpness must be positive")
        shape = Shape(layers, hidden, heads, kv_heads, head_dim, dtype)
        with errors.status("disk and model") as status:
            found = run(shape, lengths, 1 if quick else rounds, sharpness, directory, status.update)
        if plot_file is not None:
            plot(found, plot_file)
    show([table(found), split_table("to the first token, ms", splits(found))], found.as_dict(), json_file)
