"""Benchmarks: ``alaya-tiers bench decode``.

Every competitor decodes the same tokens over the same synthetic context with the same model, one after the other in one
process; the machine's own limits (reading memory, reading the disk) are measured in between, in the same run. Ratios
are what counts, and they are of the fastest steps: on a shared machine times double from one minute to the next.
"""

import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine, rawdisk, reporting
from alaya_tiers.tools.baselines import (
    COMPETITORS,
    IN_PLACE,
    QUICK,
    RAM,
    REFERENCE,
    SPARSE,
    Case,
    Competitor,
    Context,
    Measured,
    Pace,
    Shape,
    build_model,
    contexts_of,
    decode,
    measure,
)
from alaya_tiers.tools.machine import Bandwidth, CpuUse
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show

CONTEXTS = "8K,32K,128K"

SPEED_FLOOR, SPEED_FROM = 5.0, 32 << 10
"""Our exact decode against the reference, for contexts from this many tokens on; below, the linear layers decide."""

LIMIT_FLOOR = 0.3
"""Our exact attention: share of the speed of reading the KV once."""

BUSY = 0.1
"""Share of the cores that others may take before the verdicts say nothing any more."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What to measure. Raises ConfigError.

    directory: where the store and the file to measure the disk with go; both are removed. memory_bytes, disk_bytes: how
    much is read to find the machine's limits.
    """

    shape: Shape = field(default_factory=Shape)
    contexts: tuple[int, ...] = (8 << 10, 32 << 10, 128 << 10)
    pace: Pace = field(default_factory=Pace)
    directory: str | None = None
    memory_bytes: int = 1 << 30
    disk_bytes: int = 1 << 30
    sparse: bool = False
    sharpness: float = 3.0

    def __post_init__(self) -> None:
        if not self.contexts or min(*self.contexts, self.pace.steps, self.pace.least) < 1:
            raise ConfigError("context lengths and steps must be positive")
        if not 0 < self.sharpness < 100:
            raise ConfigError(f"sharpness is a standard deviation of scores, above 0, not {self.sharpness}")

    @property
    def room(self) -> int:
        """Positions the longest run needs: the context, the warm-up and the steps."""
        return max(self.contexts) + self.pace.steps + 1

    @property
    def rounds(self) -> int:
        """How often ``run`` says something."""
        return 1 + len(self.contexts) * len(self.competitors)

    @property
    def competitors(self) -> tuple[Competitor, ...]:
        """Whom to compare."""
        return COMPETITORS + (SPARSE if self.sparse else ())


@dataclass(slots=True)
class Row:
    """All competitors at one context length."""

    tokens: int
    kv_bytes: int
    measured: list[Measured] = field(default_factory=list)

    def of(self, name: str) -> Measured | None:
        """A competitor that ran."""
        return next((m for m in self.measured if m.name == name and m.skipped is None), None)

    def speed_up(self, name: str, over: str) -> float | None:
        """How many times as fast the best step of one competitor is as another's."""
        one, other = self.of(name), self.of(over)
        return other.best / one.best if one and other else None


@dataclass(slots=True)
class Report:
    """All that was measured, as data."""

    bench: Bench
    machine: dict[str, Any]
    memory: Bandwidth
    model_bytes: int
    model_seconds: list[float]
    cpu_of_others: float = 0.0
    """Share of all cores that others took during the run: the more, the less the numbers say."""
    rows: list[Row] = field(default_factory=list)

    def limit(self, row: Row) -> float:
        """Seconds to read a row's KV once at the best memory bandwidth seen in this run."""
        return row.kv_bytes / self.memory.best

    def attention_share(self, row: Row) -> float | None:
        """Our attention in RAM: share of the limit."""
        ours = row.of(RAM)
        return self.limit(row) / min(ours.attention) if ours and ours.attention else None

    def floors(self, row: Row) -> dict[str, Any]:
        """What the design asks for: value, floor, and whether it is reached (None: not asked for here, or not run)."""
        speed, share = row.speed_up(RAM, REFERENCE), self.attention_share(row)
        fast = None if speed is None or row.tokens < SPEED_FROM else speed >= SPEED_FLOOR
        return {
            "speed_up": {"value": speed, "floor": SPEED_FLOOR, "passed": fast},
            "attention_share": {
                "value": share, "floor": LIMIT_FLOOR, "passed": None if share is None else share >= LIMIT_FLOOR,
            },
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "benchmark": "decode",
            "machine": self.machine,
            "cpu_of_others": self.cpu_of_others,
            "settings": asdict(self.bench),
            "memory": self.memory.as_dict(),
            "model": {"bytes": self.model_bytes, "seconds_without_context": self.model_seconds},
            "token_kv_bytes": self.bench.shape.token_bytes,
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        competitors = [
            m.as_dict()
            | {
                "speed_up": row.speed_up(m.name, REFERENCE),
                "speed_up_over_in_place": row.speed_up(m.name, IN_PLACE),
                "share_of_limit": None if m.skipped else self.limit(row) / m.best,
            }
            for m in row.measured
        ]
        facts = {"tokens": row.tokens, "kv_bytes": row.kv_bytes, "limit_seconds": self.limit(row)}
        return facts | {"competitors": competitors, "floors": self.floors(row)}


@torch.no_grad()
def run(bench: Bench, say: Say = lambda text: None, competitors: Sequence[Competitor] = ()) -> Report:
    """Measure everything. say: told what comes next. Raises ConfigError, StoreError, OSError."""
    competitors = competitors or bench.competitors
    say("memory, disk and model alone")
    began, memory = CpuUse.now(), _memory(bench)
    model, context = build_model(bench.shape, bench.room, bench.sharpness), Context(bench.shape)
    alone, _, _ = decode(model, DynamicCache(config=model.config), bench.pace)
    report = Report(bench, machine.describe(), memory, sum(p.nbytes for p in model.parameters()), alone[1:])
    with ExitStack() as stack:
        parent = bench.directory or os.environ.get("ALAYA_TIERS_DIR")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent)))
        disk = None
        if any(c.ssd for c in competitors):
            disk = stack.enter_context(rawdisk.disk_file(directory, bench.disk_bytes))
        for tokens in bench.contexts:
            case = Case(bench.shape, model.config, tokens, tokens + bench.pace.steps + 1, directory, bench.sharpness)
            row = Row(tokens, case.kv_bytes)
            report.rows.append(row)
            for competitor in competitors:
                say(f"{tokens:,} tokens: {competitor.name}")
                row.measured.append(measure(competitor, case, model, context, bench.pace, disk))
                gc.collect()
            _compare(row)
            report.memory = report.memory.merged(_memory(bench))
    report.cpu_of_others = CpuUse.now().others_since(began)
    return report


def _memory(bench: Bench) -> Bandwidth:
    return machine.memory_bandwidth(machine.memory_buffer(bench.memory_bytes))


def _compare(row: Row) -> None:
    """How far each competitor's logits are from those of the first that ran, over the steps both did."""
    ran = [m for m in row.measured if m.skipped is None]
    for m in ran:
        n = min(len(m.logits), len(ran[0].logits))
        reference = ran[0].logits[:n]
        m.differs = float((m.logits[:n] - reference).abs().max() / reference.abs().max())


def tables(report: Report) -> list[Table]:
    """What was found, for people."""
    return [_machine_table(report), *(_row_table(report, row) for row in report.rows), _floor_table(report)]


def _machine_table(report: Report) -> Table:
    shape, m, memory = report.bench.shape, report.machine, report.memory
    sizes = f"{shape.layers} layers, hidden {shape.hidden}, {shape.heads}/{shape.kv_heads} heads x {shape.head_dim}"
    alone = min(report.model_seconds) * 1e3
    table = Table(title="exact decode", show_header=False, title_justify="left")
    table.add_row("machine", f"{m['cpu']}, {m['cores']} cores, {format_bytes(m['ram_bytes'])}")
    table.add_row("others", f"took {report.cpu_of_others:.0%} of the cores during the run")
    table.add_row("software", f"torch {m['torch']}, {m['threads']} threads, transformers {m['transformers']}")
    table.add_row("memory", f"{memory.best / 1e9:.1f} GB/s read by {memory.method}, the best of this run")
    weights = f"{format_bytes(report.model_bytes)} of weights, {alone:.1f} ms a step without context"
    table.add_row("model", f"{sizes}, {shape.dtype}: {weights}")
    table.add_row("KV", f"{format_bytes(shape.token_bytes)} a token")
    return table


def _row_table(report: Report, row: Row) -> Table:
    limit = report.limit(row)
    once = f"{limit * 1e3:.1f} ms to read it once from memory"
    table = Table(title=f"{row.tokens:,} tokens, {format_bytes(row.kv_bytes)} of KV, {once}", title_justify="left")
    table.add_column("cache")
    ratios = (f"x {REFERENCE}", f"x {IN_PLACE}", "of limit")
    for name in ("best ms", "median", "p90", "steps", *ratios, "peak RSS", "logits differ"):
        table.add_column(name, justify="right")
    for m in row.measured:
        if m.skipped is not None:
            continue
        ms = (f"{t * 1e3:.1f}" for t in (m.best, m.median, m.p90))
        faster = (row.speed_up(m.name, REFERENCE), row.speed_up(m.name, IN_PLACE), limit / m.best)
        shown = ("-" if x is None else f"{x:.2f}" for x in faster)
        table.add_row(m.name, *ms, str(len(m.steps)), *shown, format_bytes(m.peak_rss), f"{m.differs:.0e}")
        if m.attention:
            ms = (f"{t * 1e3:.1f}" for t in (min(m.attention), statistics.median(m.attention)))
            share = f"{limit / min(m.attention):.2f}"
            table.add_row("  its attention alone", *ms, "", str(len(m.attention)), "", "", share)
    notes = [f"{m.name} skipped: {m.skipped}" for m in row.measured if m.skipped is not None]
    notes += [_ssd_text(m.name, m.ssd) for m in row.measured if m.ssd is not None]
    table.caption, table.caption_justify = "\n".join(notes) or None, "left"
    return table


def _ssd_text(name: str, s: dict[str, Any]) -> str:
    budgets = f"host {format_bytes(s['host_budget'])} + device {format_bytes(s['device_budget'])}"
    reads = f"{format_bytes(s['read_bytes'])} ({format_bytes(s['least_read_bytes'])} fit no budget)"
    disk = f"{s['disk']['bytes_per_second'] / 1e6:.0f} ({s['disk']['method']})"
    return (
        f"{name}: {budgets}; a token reads {reads} at {s['bytes_per_second'] / 1e6:.0f} MB/s of the disk's {disk}: "
        f"{s['disk_share']:.2f}; hit rate {s['hit_rate']:.2f}, IO hidden {s['io_hidden']:.2f}, waited "
        f"{s['waited_seconds'] * 1e3:.0f} ms; {'O_DIRECT' if s['direct_io'] else 'through the page cache'}"
    )


def _floor_table(report: Report) -> Table:
    table = Table("tokens", "what", "value", "floor", "", title="floors", title_justify="left")
    words = {"speed_up": f"{RAM} against {REFERENCE}", "attention_share": f"attention of {RAM}, share of the limit"}
    for row in report.rows:
        for name, floor in report.floors(row).items():
            value = "not run" if floor["value"] is None else f"{floor['value']:.2f}"
            verdict = {True: "PASS", False: "below", None: "-"}[floor["passed"]]
            table.add_row(f"{row.tokens:,}", words[name], value, f"{floor['floor']:g}", verdict)
    if report.cpu_of_others > BUSY:
        busy = f"Others took {report.cpu_of_others:.0%} of the cores: speeds and limits are too low, unequally."
        table.caption, table.caption_justify = f"{busy} Repeat on a quiet machine.", "left"
    return table


def plot(report: Report, path: Path) -> None:
    """Milliseconds a token over context length, as a picture. Needs matplotlib."""
    pyplot = reporting.pyplot()
    figure, axes = pyplot.subplots()
    for name in (c.name for c in report.bench.competitors):
        points = [(row.tokens, m.median * 1e3) for row in report.rows if (m := row.of(name)) is not None]
        axes.loglog([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    limits = [report.limit(row) * 1e3 for row in report.rows]
    axes.loglog([row.tokens for row in report.rows], limits, linestyle="--", label="reading the KV once")
    axes.set(xlabel="tokens of context", ylabel="ms a token")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


app = typer.Typer(help="Measure what this machine does with long contexts.", no_args_is_help=True)


@app.command("decode")
def decode_command(
    contexts: Annotated[
        str | None, typer.Option(help=f"Context lengths. default: {CONTEXTS}; {QUICK} with --quick")
    ] = None,
    steps: Annotated[int, typer.Option(help="Most steps for each cache; slow ones do fewer, at least 5.")] = 50,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    layers: int = 16,
    hidden: int = 1024,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 64,
    directory: Annotated[str | None, typer.Option("--dir", help="A directory on the disk to measure.")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Also sparse attention: its logits differ.")] = False,
    sharpness: Annotated[float, typer.Option(help="Standard deviation of scores; 6 is a sharp head.")] = 3.0,
    quick: Annotated[bool, typer.Option(help="Two steps each: shows that it runs, measures nothing.")] = False,
) -> None:
    """Decode steps, exact and with --sparse, against DynamicCache and what memory and disk allow."""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        bench = Bench(
            shape=Shape(layers, hidden, heads, kv_heads, head_dim, dtype),
            contexts=contexts_of(contexts, CONTEXTS, quick=quick),
            pace=Pace(min(steps, 2), min(steps, 2), 0.0) if quick else Pace(steps, min(steps, 5)),
            directory=directory,
            sparse=sparse,
            sharpness=sharpness,
            **({"memory_bytes": 8 << 20, "disk_bytes": 8 << 20} if quick else {}),
        )
        with _progress(errors, bench.rounds) as say:
            report = run(bench, say)
        show(tables(report), report.as_dict(), json_file)
        if plot_file is not None:
            plot(report, plot_file)


@contextmanager
def _progress(console: Console, rounds: int) -> Iterator[Say]:
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=rounds, completed=-1)
        yield lambda text: progress.update(task, description=text, advance=1)
