"""``alaya-tiers bench offload``: sparse decoding where the KV is many times the host budget, on SSD.

Attention of a few layers without a model, over the heads of ``bench attention`` with queries that drift: a step's query
is the last one's, turned. Against the same with everything in memory, against reading all KV from the disk every step,
and policy by policy. O_DIRECT where the file system can: the page cache does not help.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import psutil
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine, rawdisk, reporting
from alaya_tiers.tools.baselines import DTYPES, parse_contexts
from alaya_tiers.tools.heads import CHUNK, HEADS, PASSAGE, RETRIEVAL, Heads
from alaya_tiers.tools.heads import Plan as HeadsPlan
from alaya_tiers.tools.machine import Bandwidth, CpuUse
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show
from alaya_tiers.tools.spans import FORWARD, STEP, Span, Split, Timeline, draw_splits, split_table

Say = Callable[[str], None]

KINDS = (*HEADS, RETRIEVAL)
"""Of heads: how far scores are spread, or looking for a passage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. times: KV bytes over the host budget; drift: share of a query that is the last step's.

    ways: of eviction and guess policies, each tried on the same steps. Raises ConfigError.
    """

    tokens: int = 128 << 10
    times: float = 8.0
    kind: str = "sharp"
    drift: float = 0.95
    ways: tuple[tuple[str, str], ...] = (("lru", "none"), ("lru", "confident"))
    heads: HeadsPlan = field(default_factory=HeadsPlan)
    steps: int = 30
    warm: int = 20
    compute: float = 0.0
    in_memory: bool = True
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind {self.kind!r} is not known; choose one of {', '.join(KINDS)}")
        if not 0 <= self.drift <= 1 or self.times <= 0 or self.compute < 0 or min(self.tokens, self.steps) < 1:
            raise ConfigError("drift is between 0 and 1; times, tokens and steps are positive")

    @property
    def kv_bytes(self) -> int:
        """All KV."""
        return self.tokens * self.heads.token_bytes


@dataclass(slots=True)
class Way:
    """One way to do it: seconds of each step, and per step what was read and found."""

    name: str
    times: list[float]
    waited: float
    read_bytes: float
    selected: float
    mass: float
    pages: dict[str, Any]
    rss: int
    """Most bytes of memory the process had during the steps."""
    first: float
    first_bytes: float
    """Of the very first step, before those that warm up."""
    split: Split
    """The mean step, with the compute between layers."""

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.times)


@dataclass(slots=True)
class Found:
    """All that was measured. page_rate: pages a second that the disk itself gives, read singly."""

    plan: Plan
    machine: dict[str, Any]
    disk: Bandwidth
    page_rate: float
    host_budget: int
    index_bytes: int = 0
    peak_rss: int = 0
    budgets: int = 0
    cpu_of_others: float = 0.0
    in_memory: Way | None = None
    ways: list[Way] = field(default_factory=list)

    @property
    def read_all(self) -> float:
        """Seconds to read all KV from the disk once, at its best."""
        return self.plan.kv_bytes / self.disk.best

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        facts = asdict(self) | {"benchmark": "offload", "read_all_seconds": self.read_all, "disk": self.disk.as_dict()}
        facts["plan"]["path"] = None
        return facts


class Queries:
    """[layers, 1, query_heads, 1, dim] for each step, one drifting into the next.

    Of retrieval heads, each looks for a passage for as long as it drifts on with the chance ``plan.drift``, then for
    another one, anywhere.
    """

    def __init__(self, plan: Plan, heads: Heads) -> None:
        self._plan, self._heads, self._chance = plan, heads, np.random.default_rng(0)
        self._last: Tensor | None = None
        self._passages = self._anywhere()

    def at(self, step: int) -> Tensor:
        """Steps are asked for in order, from 0."""
        p = self._plan
        if p.kind == RETRIEVAL:
            moves = self._chance.random(self._passages.shape) >= p.drift
            self._passages = np.where(moves, self._anywhere(), self._passages)
            return self._heads.looking(self._passages, HEADS["medium"])
        new = self._heads.queries(step, HEADS[p.kind]).float()
        if self._last is not None:
            new = p.drift * self._last + math.sqrt(1 - p.drift**2) * new
        self._last = new
        return new.to(DTYPES[p.heads.dtype])

    def _anywhere(self) -> npt.NDArray[np.int64]:
        p = self._plan
        return self._chance.integers(
            max(1, p.tokens // PASSAGE), size=(p.heads.layers, p.heads.kv_heads * p.heads.group)
        )


def run(plan: Plan, say: Say = lambda text: None) -> Found:
    """Measure everything. Raises AlayaError."""
    began, heads = CpuUse.now(), Heads(plan.heads)
    machine.give_memory_back()
    host = int(plan.kv_bytes / plan.times)
    say("the disk itself")
    directory = plan.path or Path.cwd()
    with rawdisk.disk_file(directory, min(1 << 30, max(64 << 20, plan.kv_bytes))) as file:
        disk, pages = rawdisk.disk_bandwidth(file, min(512 << 20, file.nbytes)), rawdisk.page_rate(file)
    found = Found(plan, machine.describe(), disk, pages, host)
    if plan.in_memory:
        roomy = {"device_budget": plan.kv_bytes + (64 << 20), "host_budget": 64 << 20}
        found.in_memory = _measured(plan, heads, found, "in memory", roomy, say)
    for eviction, guess in plan.ways:
        tight = {"device_budget": max(16 << 20, host // 8), "host_budget": host, "eviction": eviction, "guess": guess}
        found.ways.append(_measured(plan, heads, found, f"{eviction}, {guess}", tight, say))
    found.cpu_of_others = CpuUse.now().others_since(began)
    return found


def _measured(plan: Plan, heads: Heads, found: Found, name: str, changes: dict[str, Any], say: Say) -> Way:
    settings = Settings(
        mode="sparse", alpha=plan.heads.alpha, index_bits=plan.heads.bits, index_sure=plan.heads.sure,
        most_selected=plan.heads.most, index_budget=None, **changes,
    )  # fmt: skip
    engine = Engine(settings, None if plan.path is None else str(plan.path / f"offload-{name.replace(', ', '-')}"))
    try:
        session = Session(engine)
        for layer in range(plan.heads.layers):
            for start in range(0, plan.tokens, CHUNK):
                say(f"{name}: filling layer {layer + 1}, {start:,} tokens")
                session.update(layer, *heads.chunk(layer, start, min(CHUNK, plan.tokens - start)))
        session.build_index(lambda done, of: say(f"{name}: index {done} of {of}"))
        way = steps(plan, heads, session, name, say)
        found.index_bytes = engine.used_bytes("index")
        if name != "in memory":
            found.peak_rss = max(found.peak_rss, way.rss)
            found.budgets = settings.device_budget + settings.host_budget + found.index_bytes
        return way
    finally:
        engine.close()


def steps(plan: Plan, heads: Heads, session: Session, name: str, say: Say) -> Way:
    """Decode ``plan.warm`` and ``plan.steps`` steps of attention, all layers. Raises StoreError."""
    engine, queries, times, peak = session.engine, Queries(plan, heads), list[float](), 0
    timeline, ends, visible = Timeline(), list[Span](), [Visible.all(plan.tokens, 1)]
    with ExitStack() as watched:
        for step in range(plan.warm + plan.steps):
            say(f"{name}: step {step + 1} of {plan.warm + plan.steps}")
            if step == plan.warm:
                before = session.stats()
                assert engine.sparse is not None
                engine.sparse = type(engine.sparse)()
                watched.enter_context(timeline.watching())
            q, start, took = queries.at(step), time.perf_counter(), 0.0
            for layer in range(plan.heads.layers):
                began = time.perf_counter()
                session.attention(layer, q[layer], visible, plan.heads.head_dim**-0.5)
                took += time.perf_counter() - began
                if plan.compute:
                    time.sleep(plan.compute)
            ends.append(Span(STEP, FORWARD, start, time.perf_counter()))
            times.append(took)
            if not step:
                first_bytes = session.stats().read_bytes
            peak = max(peak, psutil.Process().memory_info().rss)
    after = session.stats()
    n, use = plan.steps, after.sparse
    assert use is not None
    assert after.pages is not None
    assert before.pages is not None
    pages = after.pages.since(before.pages).as_dict()
    return Way(
        name, times[plan.warm :], (after.waited_seconds - before.waited_seconds) / n,
        (after.read_bytes - before.read_bytes) / n, use.attended / max(1, use.visible),
        use.recovered / max(1, use.steps), pages, peak, times[0], first_bytes,
        Split.mean([timeline.split(end) for end in ends[plan.warm :]]),
    )  # fmt: skip


def table(found: Found) -> Table:
    """What was found, for people."""
    p, m = found.plan, found.machine
    made = Table(
        title=f"{p.tokens:,} tokens, {format_bytes(p.kv_bytes)} of KV in {p.heads.layers} layers, host budget "
        f"{format_bytes(found.host_budget)}; {p.kind} heads, drift {p.drift}",
        title_justify="left",
    )
    columns = ("", "ms a step", "MiB read", "of RAM", "x read all", "attended", "mass", "hits")
    for name in (*columns, "precision", "recall", "lead ms", "amplified"):
        made.add_column(name, justify="right")
    ram = found.in_memory
    for way in [*([] if ram is None else [ram]), *found.ways]:
        u = way.pages
        share = "" if ram is None else f"{ram.median / way.median:.2f}"
        guessed, used = sum(u["guessed"].values()), sum(u["used"].values())
        made.add_row(
            way.name, f"{way.median * 1e3:.1f}", f"{way.read_bytes / 2**20:.1f}", share,
            f"{found.read_all / way.median:.1f}", f"{way.selected:.2%}", f"{way.mass:.3f}", f"{u['hit_rate']:.3f}",
            f"{used / guessed:.2f}" if guessed else "", f"{u['recall']:.2f}" if guessed else "",
            f"{u['mean_lead_seconds'] * 1e3:.0f}" if guessed else "", f"{u['read_amplification']:.1f}",
        )  # fmt: skip
    made.caption = (
        f"disk {found.disk.best / 1e6:.0f} MB/s in sequence, {found.page_rate:,.0f} pages of 4 KiB a second; reading "
        f"all KV takes {found.read_all * 1e3:.0f} ms. Index {format_bytes(found.index_bytes)}. Peak RSS "
        f"{format_bytes(found.peak_rss)}, budgets and index {format_bytes(found.budgets)}. {m['cpu']}, {m['cores']} "
        f"cores; others took {found.cpu_of_others:.0%} of the cores."
    )
    return made


def splits(found: Found) -> list[tuple[str, Split]]:
    """Where the time of each way's mean step goes."""
    return [(way.name, way.split) for way in (found.in_memory, *found.ways) if way is not None]


def plot(found: Found, path: Path) -> None:
    """The mean step of each way: compute, index, waiting for the disk. Needs matplotlib."""
    pyplot, rows = reporting.pyplot(), splits(found)
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.6 * len(rows)))
    draw_splits(axes, rows)
    axes.set(xlabel="ms, mean step")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def command(
    context: Annotated[str, typer.Option(help="Tokens.")] = "128K",
    times: Annotated[float, typer.Option(help="KV bytes over the host budget.")] = 8.0,
    kind: Annotated[str, typer.Option(help=f"Of heads: {', '.join(KINDS)}.")] = "sharp",
    drift: Annotated[float, typer.Option(help="Share of a query that is the last step's: 0 forgets, 1 stands.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Keys with this share of the largest weight are attended.")] = 0.001,
    eviction: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "lru",
    guess: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "none,confident",
    compute: Annotated[float, typer.Option(help="Milliseconds between two layers' attention, as of a model.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    bits: Annotated[int, typer.Option(help="Of a coded number: 4 or 8.")] = 4,
    layers: int = 4,
    kv_heads: int = 4,
    group: int = 4,
    head_dim: int = 64,
    steps: Annotated[int, typer.Option(help="Steps measured.")] = 30,
    warm: Annotated[int, typer.Option(help="Steps before.")] = 20,
    in_memory: Annotated[bool, typer.Option(help="Also measure with everything in memory.")] = True,
    path: Annotated[Path | None, typer.Option(help="Directory on the disk to measure.")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    quick: Annotated[bool, typer.Option(help="Shows that it runs, measures nothing.")] = False,
) -> None:
    """Sparse decoding with most KV on SSD. Example: alaya-tiers bench offload --guess none,last,beside,across,hot"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        ways = tuple(itertools.product(eviction.split(","), guess.split(",")))
        plan = Plan(
            tokens=2048 if quick else parse_contexts(context)[0], times=times, kind=kind, drift=drift, ways=ways,
            heads=HeadsPlan(
                layers=layers, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype, alpha=alpha, bits=bits,
                passages=kind == RETRIEVAL,
            ),
            steps=2 if quick else steps, warm=1 if quick else warm, compute=compute / 1e3, in_memory=in_memory,
            path=path,
        )  # fmt: skip
        with errors.status("disk") as status:
            found = run(plan, status.update)
        if plot_file is not None:
            plot(found, plot_file)
    show([table(found), split_table("the mean step, ms", splits(found))], found.as_dict(), json_file)
