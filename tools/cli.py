"""The `alaya-tiers` command: options in, reports out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub.utils.logging as hub_logging
import torch
import transformers.utils.logging as transformers_logging
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import AlayaError
from alaya_tiers.live import TIERS, Screen
from alaya_tiers.stats import Stats
from alaya_tiers.tools import (
    bench,
    build,
    carry,
    choice,
    compression,
    disk,
    fsck,
    gpu,
    heads,
    indexes,
    inspect,
    larger,
    many,
    offload,
    overhead,
    plan,
    probe,
    quality,
    record,
    show,
    simulate,
    stored,
    timeline,
    train,
    ttft,
    tune,
    validate,
)
from alaya_tiers.tools import demo as demos

CANCELLED, FAILED, DIFFERS = 130, 2, 1
"""Exit codes, beside 0."""

BAR_WIDTH = 30
WIDEST = 100


class Commands(TyperGroup):
    """All commands: an error of ours is one line on stderr, not a traceback; Ctrl-C is no error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlayaError as error:
            line = Text.assemble(("error: ", "bold red"), " ".join(str(error).split()))
            Console(stderr=True, soft_wrap=True).print(line)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt:
            Console(stderr=True).print("stopped")
            raise typer.Exit(CANCELLED) from None


app = typer.Typer(name="alaya-tiers", cls=Commands, no_args_is_help=True, add_completion=False)
# Commands with subcommands of their own go here.
bench.app.command("offload")(offload.command)
bench.app.command("larger")(larger.command)
bench.app.command("overhead")(overhead.command)
bench.app.command("attention")(heads.command)
bench.app.command("choice")(choice.command)
bench.app.command("contexts")(many.command)
bench.app.command("compression")(compression.command)
bench.app.command("gpu")(gpu.command)
bench.app.command("io")(disk.command)
bench.app.command("index")(indexes.command)
bench.app.command("quality")(quality.command)
bench.app.command("timeline")(timeline.command)
bench.app.command("ttft")(ttft.command)
app.command("train")(train.command)
app.add_typer(bench.app, name="bench", epilog="Example: [bold]alaya-tiers bench decode --quick[/bold]")
app.command("plan", epilog=plan.EPILOG)(plan.command)
app.command("record", epilog=record.EPILOG)(record.command)
app.command("inspect", epilog=inspect.EPILOG)(inspect.command)
app.command("tune", epilog=tune.EPILOG)(tune.command)
app.command("validate", epilog=validate.EPILOG)(validate.command)
app.command("profile", epilog=probe.EPILOG)(probe.command)
app.command("simulate", epilog=simulate.EPILOG)(simulate.command)
app.command("ls", epilog="Example: [bold]alaya-tiers ls contexts/[/bold]")(stored.ls)
app.command("show", epilog="Example: [bold]alaya-tiers show contexts/ 3bb75c19[/bold]")(show.show)
app.command("export", epilog="Example: [bold]alaya-tiers export contexts/ 3bb75c19 book.st[/bold]")(carry.export)
app.command("import", epilog="Example: [bold]alaya-tiers import contexts/ book.st[/bold]")(carry.import_)
app.command("index", epilog="Example: [bold]alaya-tiers index contexts/ 3bb75c19[/bold]")(build.command)
app.command("verify", epilog="Example: [bold]alaya-tiers verify contexts/ --salvage saved/[/bold]")(fsck.verify)
app.command("gc", epilog="Example: [bold]alaya-tiers gc contexts/ --dry-run[/bold]")(fsck.gc)


def show_version(wanted: bool) -> None:
    if wanted:
        print(version("alaya-tiers"))
        raise typer.Exit


@app.callback(epilog="Example: [bold]alaya-tiers demo[/bold]")
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A KV cache in three tiers (device, host, SSD) with hard byte budgets, for transformers."""


DEMO_EXAMPLES = """
Examples:

[bold]alaya-tiers demo[/bold]  (the standard library's source, a few minutes at most)

[bold]alaya-tiers demo --text book.txt --tokens 30000 --host-budget 8MiB[/bold]

[bold]alaya-tiers demo --model ./my-llama --prompt "Once upon a time" --json[/bold]
"""


@app.command(epilog=DEMO_EXAMPLES)
def demo(
    tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens to read. [dim]default: {demos.TOKENS}[/dim]", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file to read instead of Python's standard library.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A real model instead of the computed one: folder or hub id.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Continue this after the text, instead of its passages.", show_default=False)
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Passages to continue.")] = 8,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")] = 12,
    host_budget: Annotated[
        str | None, typer.Option(help="Bytes of the host tier. [dim]default: 1/8 of the KV[/dim]", show_default=False)
    ] = None,
    device_budget: Annotated[
        str | None, typer.Option(help="Bytes of the device tier. [dim]default: 1/16 of it[/dim]", show_default=False)
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(help="Folder for the SSD tier, kept. [dim]default: a temporary one[/dim]", show_default=False),
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read at a time.")] = 512,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch. [dim]default: torch decides[/dim]", show_default=False)
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option(
            "--compare/--no-compare",
            help=f"Have DynamicCache answer too. [dim]default: up to {demos.COMPARED_TOKENS} tokens[/dim]",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Answer by sparse attention: to keys with this share of the largest weight, e.g. 0.001.",
            show_default=False,
        ),
    ] = None,
    windowed: Annotated[
        bool, typer.Option("--windowed", help="Read in linear time, as only the computed model can be: 1M tokens.")
    ] = False,
    live: Annotated[bool, typer.Option("--live", help="Show tiers, queues and times while it works.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Reads a text into a cache much larger than its memory, quotes from all over it, and checks every token.

    Exits with 1 if a token differs from DynamicCache's, with 2 if something is in the way.
    """
    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    options = demos.Options(
        tokens=tokens,
        text=text,
        model=model,
        prompt=prompt,
        questions=questions,
        answer_tokens=answer_tokens,
        host_budget=host_budget,
        device_budget=device_budget,
        path=path,
        chunk=chunk,
        compare=compare,
        alpha=alpha,
        windowed=windowed,
    )
    with progress(live=live) as watcher:
        report = demos.run(options, watcher)
    if as_json:
        print(json.dumps(as_dict(report), indent=2))
    else:
        console = Console()
        console.width = min(console.width, WIDEST)
        console.print(rendered(report))
    if report.differs:
        raise typer.Exit(DIFFERS)


def quiet_libraries() -> None:
    """The report is what there is to read."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


class Bars(demos.Watcher):
    """Progress bars on a terminal, a line per stage elsewhere. latest: what was seen last of the cache."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._task = bars, TaskID(0)
        self.latest: Stats | None = None

    def stage(self, name: str, total: int) -> None:
        if not self._bars.console.is_terminal:
            self._bars.console.print(name)
        if self._bars.tasks:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=total, facts="")

    def advance(self, done: int, stats: Stats | None) -> None:
        self.latest = stats or self.latest
        task = self._bars.tasks[0]
        rate = f"{done / task.elapsed:,.0f}/s" if task.elapsed else ""
        tiers = stats.tiers.items() if stats else ()
        self._bars.update(
            self._task,
            completed=done,
            facts="  ".join([rate, *(f"[{TIERS[n]}]{n}[/] {format_bytes(t.used)}" for n, t in tiers)]),
        )


@contextmanager
def progress(*, live: bool = False) -> Iterator[Bars]:
    """Bars on stderr that are gone when the work is done; with ``live``, above a screen of what the cache does."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[facts]}"),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    watcher, screen = Bars(bars), Screen()
    if not live:
        with bars:
            yield watcher
        return

    def draw() -> RenderableType:
        return Group(bars, *([] if watcher.latest is None else [screen.draw(watcher.latest)]))

    with Live(get_renderable=draw, console=console, refresh_per_second=4, auto_refresh=console.is_terminal):
        yield watcher


def as_dict(report: demos.Report) -> dict[str, Any]:
    """The report as JSON values: its fields and a `summary`; in bytes, seconds and tokens a second.

    summary: questions; exact and identical, how many of them, null if not known; kv_bytes of the text; memory_bytes,
    the most KV that was in memory; ssd_bytes_per_token and hit_rate while answering; the verdict in words.
    """
    summary = {
        "questions": len(report.answers),
        "exact": report.exact,
        "identical": report.identical,
        "kv_bytes": report.plan.kv_bytes,
        "memory_bytes": report.memory_bytes,
        "ssd_bytes_per_token": report.ssd_bytes_per_token,
        "hit_rate": report.hit_rate,
        "verdict": verdict(report),
    }
    stats = {"reading": report.reading.as_dict(), "asking": report.asking.as_dict()}
    return asdict(report) | stats | {"summary": summary}


def verdict(report: demos.Report) -> str:
    """What it means, in one sentence."""
    count = len(report.answers)
    kv, memory = format_bytes(report.plan.kv_bytes), format_bytes(report.memory_bytes)
    parts = [f"{kv} of KV answered from {memory} of memory"]
    if report.exact is not None:
        parts.append(f"{report.exact} of {count} continuations exact")
    if report.identical is None:
        parts.append(f"not compared with DynamicCache ({report.not_compared})")
    elif report.differs:
        parts.append(f"NOT identical to DynamicCache: {report.identical} of {count}")
    else:
        parts.append(f"identical to DynamicCache: {report.identical} of {count}")
    if (sparse := report.asking.sparse) is not None and sparse.steps:
        share, mass = sparse.attended / sparse.visible, sparse.recovered / sparse.steps
        parts.append(f"sparse attention to {share:.1%} of the tokens, {mass:.1%} of the attention mass")
    return "; ".join(parts) + "."


def rendered(report: demos.Report) -> RenderableType:
    """The report for people."""
    bad = report.differs or (report.exact is not None and report.exact < len(report.answers))
    title = Text.assemble((report.model, "bold"), f" read {report.tokens:,} tokens of {report.source}")
    return Group(
        title,
        Text(),
        answer_table(report.answers),
        Text(),
        tier_table(report),
        Text(),
        number_table(report),
        Text(),
        Text(process_line(report), "dim"),
        Text(),
        Text(verdict(report), style="bold red" if bad else "bold green"),
    )


def answer_table(answers: tuple[demos.Answer, ...]) -> Table:
    """Each continuation next to the truth."""
    known = any(answer.truth is not None for answer in answers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("at token", justify="right", no_wrap=True)
    for name in ("after …", "it continued", *(["the text says"] if known else [])):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_column("", no_wrap=True)
    for answer in answers:
        right = answer.exact is not False and answer.identical is not False
        mark = Text("✓", "green") if right else Text("✗", "bold red")
        truth = [Text(one_line(answer.truth or ""), "dim")] if known else []
        tail = Text("…" + one_line(answer.prompt)[-36:], "dim")
        table.add_row(f"{answer.start:,}", tail, Text(one_line(answer.continuation)), *truth, mark)
    return table


def one_line(text: str) -> str:
    """Runs of white space as a space."""
    return " ".join(text.split())


def tier_table(report: demos.Report) -> Table:
    """Where the KV is; all bars to one scale, the KV of the text and its questions."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("tier", "in use, of all KV"):
        table.add_column(name, no_wrap=True)
    for name in ("used", "peak", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = max(report.plan.kv_bytes, *(tier.used for tier in report.asking.tiers.values()))
    for name, tier in report.asking.tiers.items():
        budget = "no limit" if tier.budget is None else format_bytes(tier.budget)
        table.add_row(
            name, bar(tier.used / whole, TIERS[name]), format_bytes(tier.used), format_bytes(tier.peak), budget
        )
    return table


def bar(share: float, style: str) -> Text:
    """A bar in eighths of a character."""
    eighths = round(min(share, 1.0) * BAR_WIDTH * 8)
    filled = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return Text.assemble((filled, style), ("·" * (BAR_WIDTH - len(filled)), "dim"))


def number_table(report: demos.Report) -> Table:
    """The numbers, with those of DynamicCache beside them."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("alaya_tiers", justify="right", no_wrap=True)
    table.add_column("DynamicCache", justify="right", no_wrap=True)
    ours, theirs = speeds(report.speed), speeds(report.dynamic)
    for name in ours:
        table.add_row(name, ours[name], theirs[name])
    table.add_row("KV in memory, at most", format_bytes(report.memory_bytes), format_bytes(report.plan.kv_bytes))
    table.add_row("KV found in memory or read ahead", f"{report.hit_rate:.0%}", "100%")
    table.add_row("read from SSD per new token", format_bytes(report.ssd_bytes_per_token), "0 B")
    table.add_row("written behind while reading", format_bytes(report.reading.written_bytes), "0 B")
    return table


def process_line(report: demos.Report) -> str:
    grown = format_bytes(report.rss_peak_bytes - report.rss_bytes)
    return (
        f"The process took {format_bytes(report.rss_bytes)} with Python, torch and the model, and at most {grown} more "
        f"while it worked: {format_bytes(report.memory_bytes)} of KV, the rest working memory of the forward pass, "
        "which a smaller --chunk makes smaller."
    )


def speeds(speed: demos.Speed | None) -> dict[str, str]:
    if speed is None:
        return dict.fromkeys(("reading the text", "first token after", "then"), "–")
    then = "–" if speed.decode_rate is None else f"{speed.decode_rate:,.1f} tokens/s"
    return {
        "reading the text": f"{speed.prefill_seconds:,.1f} s, {speed.prefill_rate:,.0f} tokens/s",
        "first token after": f"{speed.ttft_seconds:.2f} s",
        "then": then,
    }
