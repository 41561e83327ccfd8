"""``alaya-tiers bench index``: which index answers DIPR queries fastest, at which recall.

Every index answers the same queries over the same keys (``tools/synthetic.py``): all query heads of a kv head at once,
as decoding asks. Truth is a scan in float32. Time is of a query group, by one thread unless asked otherwise, after so
much other memory was read that the index is in no cache: between two steps of one head a model reads all its others.
Compared at equal recall, not at equal settings: what counts is who finds 95 % of the set first.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from alaya_tiers.errors import ConfigError
from alaya_tiers.index import Flat
from alaya_tiers.tools import machine, reporting
from alaya_tiers.tools.baselines import QUICK, contexts_of
from alaya_tiers.tools.contenders import CONTENDERS, NAMES, Built, Contender, Search
from alaya_tiers.tools.machine import CpuUse
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show
from alaya_tiers.tools.synthetic import KINDS, Head

Say = Callable[[str], None]

CONTEXTS = "32K,128K"

ROUNDS = 3
"""How often every query is asked; its best time counts, and of all queries the median."""

ENOUGH = 0.95
"""Recall at which times are compared."""

WIDTH = 118
"""Columns of a terminal that the tables need."""

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Of a context that is visible, when what a filter costs is measured (AlayaDB, arXiv 2504.10326, 9.2.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. Raises ConfigError.

    visible: tokens that are seen of larger and larger contexts, for the cost of a filter; 0: not measured. cold_bytes:
    read before every query.
    """

    contexts: tuple[int, ...] = (32 << 10, 128 << 10)
    kinds: tuple[str, ...] = tuple(KINDS)
    contenders: tuple[str, ...] = NAMES
    dim: int = 128
    group: int = 4
    alpha: float = 0.012
    steps: int = 16
    threads: int = 1
    visible: int = 40_960
    cold_bytes: int = 128 << 20

    def __post_init__(self) -> None:
        if min(*self.contexts, self.steps, self.threads, self.group) < 1 or min(self.visible, self.cold_bytes) < 0:
            raise ConfigError("contexts, steps, threads and queries must be positive")
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha is a share of the largest weight, above 0 and at most 1, not {self.alpha}")
        for what, given, known in (
            ("kind of head", self.kinds, tuple(KINDS)),
            ("contender", self.contenders, NAMES),
        ):
            if unknown := set(given) - set(known):
                raise ConfigError(f"unknown {what}: {', '.join(sorted(unknown))}; choose of {', '.join(known)}")

    @property
    def beta(self) -> float:
        """The same distance in score units."""
        return -math.log(self.alpha) * math.sqrt(self.dim)


@dataclass(slots=True)
class Answered:
    """How one search did on one kind of head. Shares are means over steps; seconds the median query group's.

    recall: share of the DIPR set that was found. mass: attention weight of what was found. of_set: of the set itself.
    """

    kind: str
    wanted: float
    recall: float
    mass: float
    of_set: float
    seconds: float


@dataclass(slots=True)
class Row:
    """One search at one context length."""

    contender: str
    name: str
    bytes_per_key: float
    build_seconds_per_million: float
    answers: list[Answered] = field(default_factory=list)

    def of(self, kind: str) -> Answered:
        """How it did on a kind of head."""
        return next(a for a in self.answers if a.kind == kind)


@dataclass(slots=True)
class Filtered:
    """One search that sees the first keys of a context only, on sharp heads."""

    name: str
    share: float
    tokens: int
    recall: float
    seconds: float


@dataclass(slots=True)
class Found:
    """All that was measured."""

    plan: Plan
    machine: dict[str, Any]
    rows: dict[int, list[Row]] = field(default_factory=dict)
    filtered: list[Filtered] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    cpu_of_others: float = 0.0

    def fastest(self, tokens: int, kind: str) -> Row | None:
        """The fastest search with enough recall."""
        good = [row for row in self.rows[tokens] if row.of(kind).recall >= ENOUGH]
        return min(good, key=lambda row: row.of(kind).seconds, default=None)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        facts = {"benchmark": "index", "machine": self.machine, "cpu_of_others": self.cpu_of_others}
        rows = {str(tokens): [asdict(row) for row in rows] for tokens, rows in self.rows.items()}
        best = {
            str(tokens): {kind: row.name if (row := self.fastest(tokens, kind)) else None for kind in self.plan.kinds}
            for tokens in self.rows
        }
        found = {"rows": rows, "fastest": best, "filtered": [asdict(each) for each in self.filtered]}
        return facts | {"plan": asdict(self.plan), "skipped": self.skipped} | found


@dataclass(slots=True)
class Step:
    """One query group, and the truth about it."""

    queries: Tensor
    wanted: set[int]
    weights: Tensor
    """Softmax weights of all keys, float32 [group, tokens]."""

    @classmethod
    def of(cls, keys: Tensor, queries: Tensor, beta: float) -> Step:
        found = Flat(keys).in_range(queries, beta)
        weights = torch.softmax(queries @ keys.T * keys.shape[1] ** -0.5, -1)
        return cls(queries, set(found.tokens.tolist()), weights)

    def mass(self, tokens: list[int]) -> float:
        """Mean attention weight of some keys."""
        return float(self.weights[:, tokens].sum(1).mean())


def run(plan: Plan, say: Say = lambda text: None) -> Found:
    """Measure everything. Raises ConfigError."""
    began, found = CpuUse.now(), Found(plan, machine.describe())
    chosen = [c for c in CONTENDERS if c.name in plan.contenders]
    for contender in chosen:
        if contender.needs is not None and importlib.util.find_spec(contender.needs) is None:
            found.skipped[contender.name] = contender.hint
    chosen = [c for c in chosen if c.name not in found.skipped]
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        head, cold = Head(plan.dim, plan.group), torch.ones(plan.cold_bytes // 4)
        for tokens in plan.contexts:
            _context(plan, found, head, cold, tokens, chosen, say)
        if plan.visible:
            _filters(plan, found, head, cold, chosen, say)
    finally:
        torch.set_num_threads(threads)
    found.cpu_of_others = CpuUse.now().others_since(began)
    return found


def _context(
    plan: Plan, found: Found, head: Head, cold: Tensor, tokens: int, chosen: list[Contender], say: Say
) -> None:
    say(f"{tokens:,} tokens: keys and truth")
    keys, rows = head.keys(tokens), found.rows.setdefault(tokens, [])
    truth = {kind: _steps(plan, head, keys, kind, tokens) for kind in plan.kinds}
    for contender in chosen:
        say(f"{tokens:,} tokens: building {contender.name}")
        began = time.perf_counter()
        built = contender.build(keys, plan.threads)
        seconds = (time.perf_counter() - began) / tokens * 1e6
        for name, make in built.searches.items():
            say(f"{tokens:,} tokens: {name}")
            answers = [_answered(kind, truth[kind], make, plan.beta, cold) for kind in plan.kinds]
            rows.append(Row(contender.name, name, built.nbytes / tokens, seconds, answers))
        del built
        gc.collect()


def _steps(plan: Plan, head: Head, keys: Tensor, kind: str, tokens: int) -> list[Step]:
    return [Step.of(keys, head.queries(KINDS[kind], i, tokens), plan.beta) for i in range(plan.steps)]


def _answered(kind: str, steps: list[Step], make: Callable[[], Search], beta: float, cold: Tensor) -> Answered:
    recalls, masses, times = [], [], np.empty((ROUNDS, len(steps)))
    for turn in range(ROUNDS):
        search = make()
        for i, step in enumerate(steps):
            cold.sum()
            began = time.perf_counter()
            tokens = search(step.queries, beta)
            times[turn, i] = time.perf_counter() - began
            if turn == 0:
                got = tokens.tolist()
                recalls.append(len(step.wanted & set(got)) / len(step.wanted))
                masses.append(step.mass(got))
    mean = statistics.fmean
    wanted, of_set = mean(len(step.wanted) for step in steps), mean(step.mass(sorted(step.wanted)) for step in steps)
    return Answered(kind, wanted, mean(recalls), mean(masses), of_set, float(np.median(times.min(0))))


def _filters(plan: Plan, found: Found, head: Head, cold: Tensor, chosen: list[Contender], say: Say) -> None:
    """The same visible keys as a larger and larger context grows behind them."""
    for share in SHARES:
        tokens = round(plan.visible / share)
        keys = head.keys(tokens)
        seen = _steps(plan, head, keys[: plan.visible], "sharp", plan.visible)
        for contender in chosen:
            if contender.prefix is None:
                continue
            say(f"{plan.visible:,} of {tokens:,} tokens: {contender.name}")
            built: Built = contender.prefix(keys, plan.visible, plan.threads)
            for name, make in built.searches.items():
                answered = _answered("sharp", seen, make, plan.beta, cold)
                found.filtered.append(Filtered(name, share, tokens, answered.recall, answered.seconds))


def tables(found: Found) -> list[Table]:
    """What was found, for people."""
    p, m = found.plan, found.machine
    made = []
    for tokens, rows in found.rows.items():
        wanted = ", ".join(f"{a.kind} {a.wanted:,.0f} ({a.of_set:.2f})" for a in rows[0].answers)
        title = f"{tokens:,} keys x {p.dim}, {p.group} queries, alpha {p.alpha:g}. Keys wanted (their mass): {wanted}"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
        table.add_column("recall, ms", no_wrap=True)
        for name in (*p.kinds, "mass", "B/key", "build s/M"):
            table.add_column(name, justify="right", no_wrap=True)
        best = {kind: found.fastest(tokens, kind) for kind in p.kinds}
        for row in rows:
            cells = []
            for answer in row.answers:
                mark = "[bold]" if best[answer.kind] is row else ""
                cells.append(f"{mark}{answer.recall:.3f} {answer.seconds * 1e3:6.2f}")
            mass = statistics.fmean(a.mass for a in row.answers)
            sizes = (f"{row.bytes_per_key:,.0f}", f"{row.build_seconds_per_million:,.1f}")
            table.add_row(row.name, *cells, f"{mass:.3f}", *sizes)
        fast = "; ".join(f"{kind}: {row.name if row else 'none'}" for kind, row in best.items())
        table.caption, table.caption_justify = f"Fastest at a recall of {ENOUGH:g} or more: {fast}.", "left"
        made.append(table)
    if found.filtered:
        made.append(_filter_table(found))
    lines = [f"{name} skipped: {why}" for name, why in found.skipped.items()]
    lines.append(
        f"{m['cpu']}, {p.threads} thread{'s' * (p.threads > 1)}; others took {found.cpu_of_others:.0%} of the cores."
    )
    made[-1].caption = "\n".join([*([str(made[-1].caption)] if made[-1].caption else []), *map(escape, lines)])
    made[-1].caption_justify = "left"
    return made


def _filter_table(found: Found) -> Table:
    title = f"the first {found.plan.visible:,} keys of larger contexts, sharp heads"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("recall, ms", no_wrap=True)
    for share in SHARES:
        table.add_column(f"{share:.0%} visible", justify="right", no_wrap=True)
    for name in dict.fromkeys(each.name for each in found.filtered):
        mine = {each.share: each for each in found.filtered if each.name == name}
        table.add_row(name, *(f"{mine[share].recall:.3f} {mine[share].seconds * 1e3:6.2f}" for share in SHARES))
    return table


def plot(found: Found, path: Path) -> None:
    """Recall against time, a picture for each length and kind of head. Needs matplotlib."""
    pyplot = reporting.pyplot()
    kinds, contexts = found.plan.kinds, list(found.rows)
    size = (4.2 * len(kinds), 3.4 * len(contexts))
    figure, grid = pyplot.subplots(len(contexts), len(kinds), squeeze=False, sharex=True, sharey=True, figsize=size)
    for axes, (tokens, kind) in zip(grid.flat, [(t, k) for t in contexts for k in kinds], strict=True):
        for name in dict.fromkeys(row.contender for row in found.rows[tokens]):
            mine = [row.of(kind) for row in found.rows[tokens] if row.contender == name]
            points = np.array(sorted((a.seconds * 1e3, a.recall) for a in mine))
            axes.semilogx(points[:, 0], points[:, 1], marker="o", label=name)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.axhline(ENOUGH, linestyle=":", color="grey")
        axes.set(title=f"{tokens:,} keys, {kind}", xlabel="ms a query group", ylabel="recall")
    grid.flat[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def command(
    contexts: Annotated[
        str | None, typer.Option(help=f"Context lengths. default: {CONTEXTS}; {QUICK} with --quick")
    ] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of heads.")] = ",".join(KINDS),
    only: Annotated[str, typer.Option(help="Contenders.")] = ",".join(NAMES),
    alpha: Annotated[float, typer.Option(help="Keys with this share of the largest weight are wanted.")] = 0.012,
    dim: int = 128,
    group: Annotated[int, typer.Option(help="Query heads of a kv head.")] = 4,
    steps: Annotated[int, typer.Option(help="Query groups of each kind of head.")] = 16,
    threads: Annotated[int, typer.Option(help="Of every contender; a model has other heads for the others.")] = 1,
    visible: Annotated[int, typer.Option(help="Keys seen of larger contexts: what a filter costs; 0: skip.")] = 40_960,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    quick: Annotated[bool, typer.Option(help="Shows that it runs, measures nothing.")] = False,
) -> None:
    """Indexes against each other at equal recall. Example: alaya-tiers bench index --contexts 32K --only flat,codes8"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        few = {"steps": 2, "visible": min(visible, 1024), "cold_bytes": 0} if quick else {}
        plan = Plan(
            contexts=contexts_of(contexts, CONTEXTS, quick=quick),
            kinds=tuple(kinds.split(",")),
            contenders=tuple(only.split(",")),
            **{"dim": dim, "group": group, "steps": steps, "threads": threads, "visible": visible} | few,
            alpha=alpha,
        )
        with errors.status("") as status:
            found = run(plan, status.update)
        if not any(found.rows.values()):
            raise ConfigError("; ".join(f"{name}: {why}" for name, why in found.skipped.items()))
    show(tables(found), found.as_dict(), json_file)
    if plot_file is not None:
        plot(found, plot_file)
