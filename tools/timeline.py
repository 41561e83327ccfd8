"""``alaya-tiers bench timeline``: where the time of a decode step goes, and what the disk does meanwhile, to look at.

A model decodes over a context that is larger than the host budget. Every wait of the forward, every scan of codes,
every attention, and every job of the SSD's threads becomes a span (``spans.py``).
"""

import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.tools import machine, reporting
from alaya_tiers.tools.baselines import VOCABULARY, Context, Shape, build_model, parse_contexts
from alaya_tiers.tools.machine import CpuUse
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show
from alaya_tiers.tools.spans import COLORS, FORWARD, STEP, Span, Split, Timeline


@dataclass(frozen=True, slots=True)
class Found:
    """What was seen: every step's split; the spans, from the first step's start on."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    steps: list[Split]
    spans: list[Span]
    cpu_of_others: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"benchmark": "timeline"} | asdict(self)


@torch.no_grad()
def run(
    shape: Shape, tokens: int, times: float, steps: int, mode: str, sharpness: float, directory: str | None,
    prefetch: str | None,
) -> Found:  # fmt: skip
    """Decode ``steps`` tokens over ``tokens`` of context, of which a ``times``-th fits the host budget. StoreError."""
    began, timeline, ends = CpuUse.now(), Timeline(), list[Span]()
    model: Any = build_model(shape, tokens + steps + 8, sharpness)
    model.set_attn_implementation("alaya")
    run_bytes = 256 * shape.layer_token_bytes
    budgets = {"host_budget": max(4 * run_bytes, int(tokens * shape.token_bytes / times))}
    budgets["device_budget"] = 4 * shape.layers * run_bytes
    settings: dict[str, Any] = {"mode": mode, **({} if prefetch is None else {"prefetch": prefetch}), **budgets}
    parent = directory or os.environ.get("ALAYA_TIERS_DIR")
    with (
        tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent) as folder,
        AlayaCache(config=model.config, path=folder, index_budget=None, **settings) as cache,
    ):
        Context(shape).fill(cache, tokens)
        cache.build_index()
        for _ in range(3):
            model(input_ids=torch.tensor([[1]]), past_key_values=cache)
        with timeline.watching():
            for number in range(steps):
                start = time.perf_counter()
                model(input_ids=torch.tensor([[number % VOCABULARY]]), past_key_values=cache)
                ends.append(Span(STEP, FORWARD, start, time.perf_counter()))
    first = ends[0].start
    moved = [Span(s.what, s.lane, s.start - first, s.end - first) for s in [*ends, *timeline.spans]]
    facts = settings | {"tokens": tokens, "shape": asdict(shape), "sharpness": sharpness}
    others = CpuUse.now().others_since(began)
    return Found(machine.describe(), facts, [timeline.split(step) for step in ends], moved, others)


def table(found: Found) -> Table:
    """The median step, for people."""
    made = Table(title="a decode step, ms", title_justify="left")
    names = ("total", "model", "attention", "index", "waited", "hidden")
    for name in ("", *names):
        made.add_column(name, justify="right")
    for label, of in (("median", statistics.median), ("most", max)):
        made.add_row(label, *(f"{of(getattr(s, name) for s in found.steps) * 1e3:.1f}" for name in names))
    host = format_bytes(found.settings["host_budget"])
    read = sum(s.hidden for s in found.steps)
    share = read / (read + sum(s.waited for s in found.steps) or 1.0)
    made.caption_justify = "left"
    made.caption = (
        f"{found.settings['tokens']:,} tokens, {found.settings['mode']}, host budget {host}. Of the time something was "
        f"read or waited for, {share:.0%} was hidden. Others took {found.cpu_of_others:.0%} of the cores."
    )
    return made


def plot(found: Found, path: Path, shown: int = 4) -> None:
    """The last steps, lane by lane. Needs matplotlib."""
    pyplot = reporting.pyplot()
    start = [s for s in found.spans if s.what == STEP][-shown:][0].start
    spans = [s for s in found.spans if s.end > start]
    lanes = [FORWARD, *sorted({s.lane for s in spans} - {FORWARD})]
    figure, axes = pyplot.subplots(figsize=(14, 1.5 + 0.5 * len(lanes)))
    for what, color in COLORS.items():  # what is drawn later lies on top
        for number, lane in enumerate(lanes):
            bars = [
                ((s.start - start) * 1e3, (s.end - s.start) * 1e3) for s in spans if (s.what, s.lane) == (what, lane)
            ]
            height = 0.9 if what == STEP else 0.7
            axes.broken_barh(bars, (number - height / 2, height), facecolors=color, edgecolor="white", linewidth=0.3)
        axes.plot([], [], color=color, linewidth=6, label=what)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set(xlabel="ms")
    axes.legend(ncols=len(COLORS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def command(
    context: Annotated[str, typer.Option(help="Tokens of context.")] = "32K",
    times: Annotated[float, typer.Option(help="How many times the host budget the KV is.")] = 8.0,
    steps: Annotated[int, typer.Option(help="Steps to look at.")] = 20,
    mode: Annotated[str, typer.Option(help="exact or sparse.")] = "sparse",
    prefetch: Annotated[str | None, typer.Option(help="A policy of reading ahead.", show_default=False)] = None,
    sharpness: Annotated[float, typer.Option(help="Standard deviation of scores; 6 is a sharp head.")] = 6.0,
    layers: int = 8,
    hidden: int = 512,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 64,
    directory: Annotated[str | None, typer.Option("--dir", help="A directory on the disk to measure.")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Where the time of a decode step goes while the disk is read. Example: bench timeline --plot timeline.png"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        lengths = parse_contexts(context)
        if len(lengths) != 1 or min(lengths[0], steps) < 1 or times <= 0:
            raise ConfigError("--context is one length; --context, --steps and --times are positive")
        shape = Shape(layers, hidden, heads, kv_heads, head_dim, "fp32")
        with errors.status("decoding"):
            found = run(shape, lengths[0], times, steps, mode, sharpness, directory, prefetch)
        if plot_file is not None:
            plot(found, plot_file)
    show([table(found)], found.as_dict(), json_file)
