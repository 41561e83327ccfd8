"""``alaya-tiers record``: a run of the demo's questions, written down as a trace that can be replayed and looked at."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import transformers.utils.logging as transformers_logging
import typer
from rich.console import Console
from rich.status import Status

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.stats import Stats
from alaya_tiers.tools import demo
from alaya_tiers.tools.demo import Options, Watcher
from alaya_tiers.tools.reporting import out_file, results

MODES = ("exact", "sparse")


@dataclass(frozen=True, slots=True)
class Done:
    """What was recorded. tokens: read; answered: new ones. trace_bytes: of the file. hit_rate, ssd_bytes: of a token
    answered. seconds: of one, median of the questions."""

    path: Path
    tokens: int
    answered: int
    trace_bytes: int
    hit_rate: float
    ssd_bytes: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"path": str(self.path)}


def run(options: Options, path: Path, watcher: Watcher, **settings: Any) -> Done:
    """Reads a text and answers, recorded: phases "prefill" and "decode". Raises AlayaError."""
    watcher.stage("preparing", 1)
    subject = demo.prepare(options)
    geometries = demo.full_attention(subject.model, subject.ids[: options.chunk])
    budgets = demo.plan(geometries, len(subject.ids), options)
    given = {
        "device_budget": budgets.device_budget,
        "host_budget": budgets.host_budget,
        "block_tokens": budgets.block_tokens,
    } | settings
    with AlayaCache.for_model(subject.model, path=options.path, **given) as cache, cache.record(path) as recorder:
        recorder.mark("prefill")
        demo.prefill(subject, cache, options, watcher)
        cache.build_index()
        before = cache.stats()
        recorder.mark("decode")
        replies = demo.answer_all(subject, cache, options.answer_tokens, watcher)
        after = cache.stats()
    touched = after.touched.total - before.touched.total
    answered = sum(len(reply.tokens) for reply in replies)
    each = [reply.other_seconds / max(1, len(reply.tokens) - 1) for reply in replies if len(reply.tokens) > 1]
    return Done(
        path, len(subject.ids), answered, path.stat().st_size,
        1 - (after.touched.waited - before.touched.waited) / max(1, touched),
        (after.read_bytes - before.read_bytes) / max(1, answered), statistics.median(each) if each else 0.0,
    )  # fmt: skip


class Shown(Watcher):
    """The stage, beside a spinner."""

    def __init__(self, status: Status) -> None:
        self._status, self._stage, self._total = status, "", 0

    def stage(self, name: str, total: int) -> None:
        self._stage, self._total = name, total
        self.advance(0, None)

    def advance(self, done: int, stats: Stats | None) -> None:
        self._status.update(f"{self._stage}: {done:,} of {self._total:,}")


EPILOG = "Example: [bold]alaya-tiers record -o trace.jsonl --tokens 8000 --mode sparse[/bold]"


def command(
    output: Annotated[Path, out_file("The trace to write.")] = Path("trace.jsonl"),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 16_384,
    text: Annotated[Path | None, typer.Option(help="A text file instead of Python's standard library.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A real model instead of the computed one: folder or hub id.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Passages to continue.")] = 8,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")] = 12,
    mode: Annotated[str, typer.Option(help=f"One of {', '.join(MODES)}.")] = "sparse",
    alpha: Annotated[float, typer.Option(help="Of sparse mode.")] = 0.001,
    bits: Annotated[int, typer.Option(help="Of each number of a coded key, in sparse mode: 4 or 8.")] = 8,
    host_budget: Annotated[str | None, typer.Option(help="[dim]default: 1/8 of the KV[/dim]")] = None,
    device_budget: Annotated[str | None, typer.Option(help="[dim]default: 1/16 of the KV[/dim]")] = None,
    block_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a block. [dim]default: fits the budgets[/dim]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Runs the demo's questions and records what attention asked of the tiers: a trace for simulate, tune and inspect.

    For a run of your own: [bold]with cache.record("trace.jsonl"):[/bold] around it.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    options = Options(
        tokens=tokens, text=text, model=model, questions=questions, answer_tokens=answer_tokens, compare=False,
        host_budget=host_budget, device_budget=device_budget, windowed=model is None,
    )  # fmt: skip
    settings: dict[str, Any] = {"mode": mode, "alpha": alpha, "index_bits": bits}
    if mode == "sparse":
        settings["recent_tokens"] = 128
    if block_tokens is not None:
        settings["block_tokens"] = block_tokens
    with Console(stderr=True).status("") as status:
        done = run(options, output, Shown(status), **settings)
    if as_json:
        print(json.dumps(done.as_dict(), indent=2))
        return
    out = results()
    out.print(f"{output}: {format_bytes(done.trace_bytes)}, {done.tokens:,} tokens read, {done.answered} answered")
    out.print(
        f"a token: {done.seconds * 1e3:.1f} ms, {done.hit_rate:.1%} of the KV in memory or read ahead, "
        f"{format_bytes(done.ssd_bytes)} from SSD"
    )
