"""``alaya-tiers validate``: what the simulation predicts, beside what the engine does on this machine.

Each workload is recorded once, with everything in memory. From that trace and the machine's profile every other
configuration is predicted, then run. Configurations are marked: those the model was mended on, and those held out.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.recorder import Recorder
from alaya_tiers.stats import Stats
from alaya_tiers.tools import machine, profile
from alaya_tiers.tools.baselines import VOCABULARY, Context, Shape, build_model
from alaya_tiers.tools.machine import CpuUse
from alaya_tiers.tools.phases import Phase
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.recorded import Recording, open_recording
from alaya_tiers.tools.replay import replayed
from alaya_tiers.tools.reporting import results

FLOOR = 0.25
WARM = 4
BUSY = 0.1

SHAPE = Shape(layers=4, hidden=512, heads=8, kv_heads=4)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """A context that is put in, or computed, and tokens decoded over it. chunk: of a prompt; 0 = KV is put in."""

    name: str
    mode: str
    tokens: int
    steps: int = 24
    chunk: int = 0
    sharpness: float = 6.0

    @property
    def kv_bytes(self) -> int:
        """Of the context."""
        return self.tokens * SHAPE.token_bytes

    def small(self, tokens: int) -> "Workload":
        """The same with fewer tokens."""
        return Workload(self.name, self.mode, tokens, 8, min(self.chunk, 128), self.sharpness)


EXACT = Workload("exact decode", "exact", 16 << 10)
SPARSE = Workload("sparse decode", "sparse", 32 << 10)
PROMPT = Workload("prompt, exact", "exact", 4 << 10, 12, 512)


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration. host: share of the KV that the host budget is. fitted: the model was mended looking at it."""

    workload: Workload
    host: float
    block_tokens: int = 256
    eviction: str = "scan"
    prefetch: str = "next"
    fitted: bool = False
    pages: float = 0.0
    guess: str = "none"

    @property
    def name(self) -> str:
        """Short, for tables."""
        ahead = f"pages, {self.guess}" if self.pages else self.prefetch
        return f"{self.host:g} of KV, {self.block_tokens}, {self.eviction}, {ahead}"

    def settings(self, workload: Workload) -> dict[str, Any]:
        """Of a cache."""
        block = self.block_tokens * SHAPE.layer_token_bytes
        return {
            "mode": workload.mode,
            "device_budget": 3 * SHAPE.layers * block if self.host < 1 else 2 * workload.kv_bytes,
            "host_budget": max(2 * block, int(self.host * workload.kv_bytes)),
            "block_tokens": self.block_tokens,
            "eviction": self.eviction,
            "prefetch": self.prefetch,
            "index_budget": None,
            "page_share": self.pages,
            "guess": self.guess,
        }


CASES = (
    Case(EXACT, 1.0, fitted=True),
    Case(EXACT, 0.25, fitted=True),
    Case(EXACT, 0.5, 256, "lru", "none", fitted=True),
    Case(SPARSE, 1.0, fitted=True),
    Case(SPARSE, 0.25, 256, "lru", fitted=True),
    Case(PROMPT, 0.25, fitted=True),
    Case(EXACT, 0.5),
    Case(EXACT, 0.125, 128),
    Case(EXACT, 0.5, 512),
    Case(EXACT, 0.75, 256, "scan", "none"),
    Case(EXACT, 0.25, 128, "lru", "next"),
    Case(EXACT, 0.25, 64, "scan", "none"),
    Case(SPARSE, 0.5, 256, "lru"),
    Case(SPARSE, 0.125, 256, "lru"),
    Case(SPARSE, 0.25, 128, "lru"),
    Case(SPARSE, 0.5, 256, "scan"),
    Case(SPARSE, 0.25, 512, "lru"),
    Case(SPARSE, 0.25, 256, "lru", pages=0.75, fitted=True),
    Case(SPARSE, 0.5, 256, "lru", pages=0.75),
    Case(SPARSE, 0.125, 256, "s3fifo", pages=0.75),
    Case(SPARSE, 0.25, 128, "lru", pages=0.5, guess="last"),
    Case(SPARSE, 0.25, 256, "heat", pages=0.75, guess="confident"),
    Case(PROMPT, 0.5, 256, "lru", "none"),
    Case(PROMPT, 0.125, 128),
    Case(PROMPT, 1.0, 512),
)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of the decoded tokens: seconds and SSD bytes of one, share of the KV in memory or on its way; seconds before."""

    tpot: float
    hit_rate: float
    ssd_bytes: float
    ttft: float

    @classmethod
    def of(cls, phases: list[Phase]) -> "Numbers":
        """What a replay says."""
        last = phases[-1]
        before = sum(phase.seconds for phase in phases if phase.name == "prompt")
        return cls(last.tpot, last.hit_rate, last.read_bytes / max(1, len(last.steps)), before)


@dataclass(slots=True)
class Row:
    """One configuration, predicted and measured."""

    case: Case
    predicted: Numbers
    measured: Numbers
    kv_bytes: int

    @property
    def errors(self) -> dict[str, float]:
        """Relative for times and bytes (of at least 1 % of the KV); of the hit rate, the difference."""
        p, m = self.predicted, self.measured
        found = {
            "tpot": abs(p.tpot - m.tpot) / m.tpot,
            "hit_rate": abs(p.hit_rate - m.hit_rate),
            "ssd_bytes": abs(p.ssd_bytes - m.ssd_bytes) / max(m.ssd_bytes, 0.01 * self.kv_bytes),
        }
        return found | ({"ttft": abs(p.ttft - m.ttft) / m.ttft} if self.case.workload.chunk else {})


@dataclass(slots=True)
class Report:
    """All rows."""

    machine: dict[str, Any]
    profile_date: str
    cpu_of_others: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def worst(self, what: str, *, fitted: bool) -> float:
        """The largest error among the fitted, or the held out."""
        return max((row.errors.get(what, 0.0) for row in self.rows if row.case.fitted is fitted), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [
            {
                "workload": row.case.workload.name, "configuration": row.case.name, "held_out": not row.case.fitted,
                "predicted": asdict(row.predicted), "measured": asdict(row.measured), "errors": row.errors,
            }
            for row in self.rows
        ]  # fmt: skip
        return {
            "machine": self.machine, "profile": self.profile_date, "cpu_of_others": self.cpu_of_others, "floor": FLOOR,
            "rows": rows,
        }  # fmt: skip


# ---------------------------------------------------------------------- the engine
def engine(workload: Workload, settings: dict[str, Any], trace: Path | None = None) -> Numbers:
    """What a cache with these settings really does. trace: written, if given."""
    model: Any = build_model(SHAPE, workload.tokens + workload.steps + WARM + 1, workload.sharpness)
    model.set_attn_implementation("alaya")
    with AlayaCache.for_model(model, **settings) as cache, torch.no_grad():
        if trace is None:
            return _run(workload, model, cache, None)
        with cache.record(trace) as recorder:
            return _run(workload, model, cache, recorder)


def _run(workload: Workload, model: Any, cache: AlayaCache, recorder: Recorder | None) -> Numbers:
    def mark(name: str) -> None:
        if recorder is not None:
            recorder.mark(name)

    mark("prompt")
    began = time.perf_counter()
    if workload.chunk:
        for start in range(0, workload.tokens, workload.chunk):
            ids = torch.arange(start, start + workload.chunk)[None] * 7 % VOCABULARY
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    else:
        Context(SHAPE).fill(cache, workload.tokens)
        cache.build_index()
    ttft = time.perf_counter() - began
    mark("warm")
    for i in range(WARM):
        _step(model, cache, i)
    before = cache.stats()
    mark("decode")
    times = [_step(model, cache, WARM + i) for i in range(workload.steps)]
    return _numbers(times, before, cache.stats(), ttft)


def _step(model: Any, cache: AlayaCache, i: int) -> float:
    token = torch.tensor([[(7 * i + 3) % VOCABULARY]])
    began = time.perf_counter()
    model(input_ids=token, past_key_values=cache, use_cache=True)
    return time.perf_counter() - began


def _numbers(times: list[float], before: Stats, after: Stats, ttft: float) -> Numbers:
    waited, total = after.touched.waited - before.touched.waited, after.touched.total - before.touched.total
    read = (after.read_bytes - before.read_bytes) / len(times)
    return Numbers(statistics.median(times), 1 - waited / max(1, total), read, ttft)


# ---------------------------------------------------------------------- both
def run(known: Profile, cases: tuple[Case, ...], say: Say, tokens: int | None = None, tries: int = 1) -> Report:
    """Predict all, then measure all. tokens: shorter contexts; tries: runs of the engine, of which the fastest counts.

    Raises AlayaError.
    """
    report, began = Report(machine.describe(), known.date), CpuUse.now()
    with tempfile.TemporaryDirectory() as folder:
        traces = dict(_traces(cases, Path(folder), say, tokens))
        for number, case in enumerate(cases, 1):
            say(f"{number} of {len(cases)}: {case.workload.name}, {case.name}")
            workload = case.workload if tokens is None else case.workload.small(tokens)
            settings = case.settings(workload)
            predicted = Numbers.of(replayed(traces[case.workload.name], known, **settings))
            found = [engine(workload, settings) for _ in range(tries)]
            measured = min(found, key=lambda numbers: numbers.tpot)
            report.rows.append(Row(case, predicted, measured, workload.kv_bytes))
    report.cpu_of_others = CpuUse.now().others_since(began)
    return report


def _traces(cases: tuple[Case, ...], folder: Path, say: Say, tokens: int | None) -> Iterator[tuple[str, Recording]]:
    for workload in dict.fromkeys(case.workload for case in cases):
        say(f"recording: {workload.name}")
        path = folder / f"{workload.mode}-{workload.chunk}.jsonl"
        one = workload if tokens is None else workload.small(tokens)
        engine(one, Case(workload, 1.0).settings(one), path)
        yield workload.name, open_recording(path)


EPILOG = "Example: [bold]alaya-tiers validate --profile here.toml[/bold]"


def command(
    profile_file: Annotated[
        Path, typer.Option("--profile", help="Of this machine, by [bold]alaya-tiers profile[/bold].")
    ],
    tries: Annotated[int, typer.Option(min=1, help="Runs of each configuration; the fastest counts.")] = 1,
    tokens: Annotated[int | None, typer.Option(min=1024, help="Shorter contexts, for a quick look.")] = None,
    only: Annotated[str | None, typer.Option(help="Workloads whose name has this in it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Runs the engine in 25 configurations, the simulation beside it, and reports the errors. Takes three minutes."""
    known = profile.load(profile_file)
    cases = tuple(case for case in CASES if only is None or only in case.workload.name)
    if not cases:
        raise ConfigError(f"no workload has {only!r} in its name")
    with Console(stderr=True).status("") as status:
        report = run(known, cases, lambda text: status.update(text), tokens, tries)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
        return
    out = results()
    out.print(table(report))
    out.print(summary(report))
    if report.cpu_of_others > BUSY:
        out.print(f"others took {report.cpu_of_others:.0%} of the cores meanwhile: times say little", style="bold")


def table(report: Report) -> Table:
    """All configurations."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    heads = (
        "workload",
        "host, block, policies",
        "TPOT ms",
        "measured",
        "hits",
        "measured",
        "SSD a token",
        "measured",
        "",
    )
    for name in heads:
        shown.add_column(name, justify="left" if name in heads[:2] else "right", no_wrap=name in heads[:2])
    for row in report.rows:
        p, m, e = row.predicted, row.measured, row.errors
        shown.add_row(
            row.case.workload.name, row.case.name, f"{p.tpot * 1e3:.1f}", _marked(f"{m.tpot * 1e3:.1f}", e["tpot"]),
            f"{p.hit_rate:.1%}", _marked(f"{m.hit_rate:.1%}", e["hit_rate"]), format_bytes(p.ssd_bytes),
            _marked(format_bytes(m.ssd_bytes), e["ssd_bytes"]), "fitted" if row.case.fitted else "",
        )  # fmt: skip
    return shown


def _marked(text: str, error: float) -> str:
    return f"[red]{text} ({error:.0%})[/red]" if error > FLOOR else f"{text} ({error:.0%})"


def summary(report: Report) -> str:
    """The largest errors."""
    lines = []
    for fitted, name in ((False, "held out"), (True, "fitted")):
        rows = [row for row in report.rows if row.case.fitted is fitted]
        within = sum(max(row.errors.values()) <= FLOOR for row in rows)
        worst = {what: report.worst(what, fitted=fitted) for what in ("tpot", "hit_rate", "ssd_bytes", "ttft")}
        errors = ", ".join(f"{what} {error:.0%}" for what, error in worst.items())
        lines.append(f"{name}: {within} of {len(rows)} within {FLOOR:.0%}; at most {errors}")
    return "\n".join(lines)
