"""``alaya-tiers bench ttft``: the first token from a stored context, against loading it whole and against prefill.

A context is imported into a database once. Every way to its first token begins with the page cache emptied of its
files, most with nothing else: open the store, make a session, decode. One begins in a process that serves: the store is
open and has the codes of the context in memory, but none of its keys and values. Loading whole is what libraries do
that only offload KV: read everything into a DynamicCache, then decode with sdpa; here from files of nothing but keys
and values, as they will lie in memory, read by one call for each layer, so that no format is in the way.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine, opening, rawdisk, reporting
from alaya_tiers.tools.baselines import QUICK, Shape, contexts_of
from alaya_tiers.tools.machine import Bandwidth, CpuUse
from alaya_tiers.tools.opening import COLD, OPEN, WAYS, WHOLE, Stored, Way
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show
from alaya_tiers.tools.spans import Split, draw_splits, split_table
from alaya_tiers.tools.subjects import Subject, independent, quotation

Say = Callable[[str], None]

CONTEXTS, QUOTATIONS = "8K,32K,128K", "32K,128K,1M"
PREFILL = 2048
"""Tokens of a prefill, from which that of a longer context is extrapolated: at least in proportion."""


@dataclass(slots=True)
class Row:
    """One context length. index_bytes: of the files beside the KV. limit: seconds to read the KV at disk speed."""

    tokens: int
    kv_bytes: int
    index_bytes: int
    limit: float
    prefill: float
    ways: list[Way]

    def of(self, name: str) -> Way:
        """The way of this name."""
        return next(way for way in self.ways if way.name == name)


@dataclass(slots=True)
class Found:
    """All that was measured. workload: in words; settings: what else describes it."""

    workload: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    disk: Bandwidth | None = None
    cpu_of_others: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def growth(self) -> dict[str, float]:
        """By way: how many times as long the longest context takes as the shortest."""
        return {way: self.rows[-1].of(way).median / self.rows[0].of(way).median for way in WAYS}

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        disk = None if self.disk is None else self.disk.as_dict()
        return {"benchmark": "ttft"} | asdict(self) | {"disk": disk, "growth": self.growth}


@torch.no_grad()
def run(
    subjects: Callable[[int], Subject], contexts: tuple[int, ...], found: Found, rounds: int, directory: str | None,
    say: Say,
) -> None:  # fmt: skip
    """Measure everything, into ``found``. subjects: by tokens of context, with two questions a round.

    Raises ConfigError, StoreError, OSError.
    """
    began, parent = CpuUse.now(), directory or os.environ.get("ALAYA_TIERS_DIR")
    with tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent) as folder:
        with rawdisk.disk_file(Path(folder), 64 << 20) as disk:
            found.disk = rawdisk.disk_bandwidth(disk, disk.nbytes)
        for tokens in contexts:
            say(f"{tokens:,} tokens: making them")
            subject = subjects(tokens)
            prefill = _prefill(subject) * tokens
            stored = Stored(subject, Path(folder) / str(tokens))
            subject.model.set_attn_implementation("alaya")
            stored.write(lambda done, of: say(f"{of:,} tokens: importing, {done:,}"))
            ways = [Way(name) for name in WAYS]
            for number in range(rounds):
                for way in ways:
                    say(f"{tokens:,} tokens: {way.name}, {number + 1} of {rounds}")
                    opening.ask(way, stored, *subject.questions[2 * number : 2 * number + 2])
            limit = subject.kv_bytes / found.disk.best
            found.rows.append(Row(tokens, subject.kv_bytes, stored.index_bytes, limit, prefill, ways))
            stored.remove()
    found.cpu_of_others = CpuUse.now().others_since(began)


def _prefill(subject: Subject) -> float:
    """Seconds a token of a prompt takes without any stored context."""
    ids, model = subject.ids[:, :PREFILL], subject.model
    began = time.perf_counter()
    model(input_ids=ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    return (time.perf_counter() - began) / ids.shape[1]


def table(found: Found) -> Table:
    """What was found, for people."""
    made = Table(title=f"the first token from a stored context: {found.workload}", title_justify="left")
    names = ("tokens", "way", "ms", "x load whole", "x prefill", "x reading at disk speed", "KV read", "index")
    checked = found.rows[0].ways[0].right is not None
    for name in (*names, *(["right"] if checked else [])):
        made.add_column(name, justify="right")
    for row in found.rows:
        whole = row.of(WHOLE).median
        for way in row.ways:
            ratios = (whole / way.median, row.prefill / way.median, row.limit / way.median)
            index = format_bytes(row.index_bytes) if way.name in (OPEN, COLD) else "-"
            right = [f"{way.right} of {len(way.seconds)}"] if checked else []
            made.add_row(
                f"{row.tokens:,}", way.name, f"{way.median * 1e3:.0f}", *(f"{x:.2f}" for x in ratios),
                f"{format_bytes(way.read_bytes)} of {format_bytes(row.kv_bytes)}", index, *right,
            )  # fmt: skip
    m, speed = found.machine, 0.0 if found.disk is None else found.disk.best / 1e6
    grown = ""
    if len(found.rows) > 1:
        ends = f"{found.rows[0].tokens:,} to {found.rows[-1].tokens:,} tokens"
        grown = f"From {ends}: {', '.join(f'{way} x{times:.1f}' for way, times in found.growth.items())}. "
    made.caption_justify = "left"
    made.caption = (
        f"{grown}Prefill extrapolated in proportion from {PREFILL:,} tokens. Disk {speed:.0f} MB/s. "
        f"{m['cpu']}, {m['cores']} cores; others took {found.cpu_of_others:.0%} of the cores."
    )
    return made


def splits(found: Found, ways: tuple[str, ...] = WAYS) -> list[tuple[str, Split]]:
    """Where the time of each way goes, in the round in the middle."""
    return [(f"{row.tokens:,}, {name}", row.of(name).split) for row in found.rows for name in ways]


def plot(found: Found, path: Path) -> None:
    """Seconds to the first token over context length, and what those of sparse sessions are. Needs matplotlib."""
    pyplot = reporting.pyplot()
    figure, (axes, bars) = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    tokens = [row.tokens for row in found.rows]
    for name in WAYS:
        axes.loglog(tokens, [row.of(name).median for row in found.rows], marker="o", label=name)
    axes.loglog(tokens, [row.limit for row in found.rows], linestyle="--", label="reading the KV once")
    axes.loglog(tokens, [row.prefill for row in found.rows], linestyle=":", label="prefill, in proportion")
    axes.set(xlabel="tokens of context", ylabel="s to the first token")
    axes.legend()
    draw_splits(bars, splits(found, (OPEN, COLD)))
    figure.savefig(path)
    pyplot.close(figure)


def command(
    contexts: Annotated[
        str | None,
        typer.Option(help=f"Context lengths. default: {CONTEXTS}; {QUOTATIONS} with --quotation; {QUICK} with --quick"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each way runs.")] = 3,
    quotation_: Annotated[
        bool,
        typer.Option("--quotation", help="Real text and a model that continues quotations: answers are checked."),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="A text, with --quotation. default: the standard library", show_default=False),
    ] = None,
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
        lengths = contexts_of(contexts, QUOTATIONS if quotation_ else CONTEXTS, quick=quick)
        if min(*lengths, rounds) < 1 or not 0 < sharpness < 100:
            raise ConfigError("--contexts, --rounds and --sharpness must be positive")
        if text is not None and not quotation_:
            raise ConfigError("--text is read with --quotation")
        rounds = 1 if quick else rounds
        if quotation_:
            found = Found("quotations", {"text": None if text is None else text.name}, machine.describe())
            make = partial(quotation, count=2 * rounds, text=text)
        else:
            shape = Shape(layers, hidden, heads, kv_heads, head_dim, dtype)
            words = f"{layers} layers, {heads}/{kv_heads} heads x {head_dim}, {dtype}, scores' deviation {sharpness:g}"
            found = Found(f"independent keys, {words}", asdict(shape) | {"sharpness": sharpness}, machine.describe())
            make = partial(independent, shape, sharpness, count=2 * rounds)
        with errors.status("disk and model") as status:
            run(make, lengths, found, rounds, directory, status.update)
        if plot_file is not None:
            plot(found, plot_file)
    show([table(found), split_table("to the first token, ms", splits(found))], found.as_dict(), json_file)
