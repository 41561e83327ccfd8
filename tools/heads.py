"""``alaya-tiers bench attention``: sparse attention against exact attention and against the limit of any exact one.

One decode step of a few layers, without a model, over synthetic heads whose statistics are known. The limit is reading
all keys and values once at the machine's own memory bandwidth: no exact attention can be faster.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ConfigError
from alaya_tiers.index.plan import History
from alaya_tiers.stats import SparseUse
from alaya_tiers.tools import machine, reporting
from alaya_tiers.tools.baselines import DTYPES, QUICK, contexts_of
from alaya_tiers.tools.machine import Bandwidth, CpuUse
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show

Say = Callable[[str], None]

CHUNK = 16_384
CONTEXTS = "32K,128K"
TOPICS = 64
LOOK = Settings().look_seconds

HEADS: dict[str, float] = {"sharp": 6.0, "medium": 3.0, "diffuse": 1.0}
"""Standard deviation of a head's scores: 6 puts nearly all mass on a few keys, 1 spreads it over thousands."""

RETRIEVAL = "retrieval"
"""Heads that look for a passage of 64 tokens that lies anywhere and alone scores high (Retrieval Head, arXiv
2404.15574): what is within reach of its best does not grow with the context."""

PASSAGE, APART = 64, 2.0
"""Tokens of a passage, and how far its keys lie from those of its topic, in deviations of a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. layers: as many as make the codes larger than the processor's caches. Raises ConfigError.

    passages: keys of every ``PASSAGE`` tokens have a direction in common, so that a query can look for them. parts: see
    Settings.index_parts.
    """

    contexts: tuple[int, ...] = (32 << 10, 128 << 10)
    kv_heads: int = 4
    group: int = 4
    head_dim: int = 64
    layers: int = 4
    dtype: str = "fp32"
    alpha: float = 0.001
    bits: int = 4
    sure: float = 2.0
    most: int | None = None
    look_seconds: float = LOOK
    passages: bool = False
    parts: float = 0.0
    steps: int = 15
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if min(*self.contexts, self.kv_heads, self.group, self.head_dim, self.layers, self.steps) < 1:
            raise ConfigError("contexts, heads, dims, layers and steps must be positive")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; choose one of {', '.join(DTYPES)}")

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize


@dataclass(slots=True)
class Kind:
    """One kind of head at one length: seconds of each step (all layers), and what sparse attention used."""

    name: str
    exact: list[float]
    dense: list[float]
    sparse: list[float]
    use: dict[str, Any]
    prefix: list[float] = field(default_factory=list)
    """The same seeing the first fifth of the context only."""


@dataclass(slots=True)
class Row:
    """One context length."""

    tokens: int
    kv_bytes: int
    index_bytes: int
    build_seconds: float
    kinds: list[Kind] = field(default_factory=list)


@dataclass(slots=True)
class Found:
    """All that was measured."""

    plan: Plan
    machine: dict[str, Any]
    memory: Bandwidth
    cpu_of_others: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def limit(self, row: Row) -> float:
        """Seconds to read a row's KV once."""
        return row.kv_bytes / self.memory.best

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [asdict(row) | {"limit_seconds": self.limit(row)} for row in self.rows]
        facts = {"benchmark": "attention", "machine": self.machine, "cpu_of_others": self.cpu_of_others}
        return facts | {"plan": asdict(self.plan), "memory": self.memory.as_dict(), "rows": rows}


class Heads:
    """Keys and values of any length, chunk by chunk: topics that come and go, outlier channels, sinks.

    Values have a topic's mean, so that there is something to estimate. Queries are random directions, scaled so that
    scores have the standard deviation asked for; or they look for a passage, whose keys alone then score high.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        make = torch.Generator().manual_seed(5)
        d = plan.head_dim
        self._topics = 0.7 * torch.randn(TOPICS, plan.kv_heads, d, generator=make)
        self._values = torch.randn(TOPICS, plan.kv_heads, d, generator=make)
        self._channels = 1 + 7 * (torch.rand(d, generator=make) > 0.95)
        self._spread = float((self._channels**2 * 1.5).sum().sqrt())

    def chunk(self, layer: int, start: int, n: int) -> tuple[Tensor, Tensor]:
        """k and v [1, kv_heads, n, dim]."""
        make = torch.Generator().manual_seed(1_000_003 * layer + start)
        p, d = self.plan, self.plan.head_dim
        topic = torch.randint(TOPICS, (n // 256 + 1,), generator=make).repeat_interleave(256)[:n]
        k = self._topics[topic].transpose(0, 1) + torch.randn(p.kv_heads, n, d, generator=make)
        if p.passages:
            k += self._directions(layer, start // CHUNK).repeat_interleave(PASSAGE, 1)[:, start % CHUNK :][:, :n]
        v = self._values[topic].transpose(0, 1) + torch.randn(p.kv_heads, n, d, generator=make)
        return ((k * self._channels)[None].to(DTYPES[p.dtype]), v[None].to(DTYPES[p.dtype]))

    def queries(self, step: int, std: float) -> Tensor:
        """[layers, 1, query_heads, 1, dim]."""
        make = torch.Generator().manual_seed(step)
        p = self.plan
        q = torch.randn(p.layers, 1, p.kv_heads * p.group, 1, p.head_dim, generator=make)
        return (q * (std * math.sqrt(p.head_dim) / self._spread)).to(DTYPES[p.dtype])

    def asked(self, kind: str, step: int, tokens: int) -> Tensor:
        """Queries of a kind of heads; each of those that look for a passage wants another one in every step."""
        if kind != RETRIEVAL:
            return self.queries(step, HEADS[kind])
        shape = self.plan.layers, self.plan.kv_heads * self.plan.group
        return self.looking(
            np.random.default_rng(step).integers(max(1, tokens // PASSAGE), size=shape), HEADS["medium"]
        )

    def looking(self, passages: npt.NDArray[np.int64], std: float) -> Tensor:
        """Queries for a passage each, whose keys score about eight of ``std`` above all others' mean, at 64 dimensions.

        passages: numbers of passages, int64 [layers, query_heads]. Returns [layers, 1, query_heads, 1, dim].
        """
        p, q = self.plan, torch.empty(*passages.shape, self.plan.head_dim)
        for layer, head in np.ndindex(*passages.shape):
            chunk, place = divmod(int(passages[layer, head]), CHUNK // PASSAGE)
            q[layer, head] = self._directions(layer, chunk)[head // p.group, place]
        spread = q.norm(dim=-1, keepdim=True) * math.sqrt(1.5 + APART**2)  # of scores with keys of elsewhere
        q *= std * math.sqrt(p.head_dim) / spread / self._channels
        return q[:, None, :, None].to(DTYPES[p.dtype])

    def _directions(self, layer: int, chunk: int) -> Tensor:
        """What the keys of each passage of a chunk have in common. [kv_heads, passages, dim]."""
        make = torch.Generator().manual_seed((1 << 40) + 1_000_003 * layer + chunk)
        return torch.randn(self.plan.kv_heads, CHUNK // PASSAGE, self.plan.head_dim, generator=make) * APART


def run(plan: Plan, say: Say = lambda text: None) -> Found:
    """Measure everything. Raises AlayaError."""
    began, heads = CpuUse.now(), Heads(plan)
    buffer = machine.memory_buffer(plan.memory_bytes)
    found = Found(plan, machine.describe(), machine.memory_bandwidth(buffer))
    for tokens in plan.contexts:
        found.rows.append(_row(plan, heads, tokens, say))
        found.memory = found.memory.merged(machine.memory_bandwidth(buffer))
    found.cpu_of_others = CpuUse.now().others_since(began)
    return found


def _row(plan: Plan, heads: Heads, tokens: int, say: Say) -> Row:
    kv_bytes = tokens * plan.token_bytes
    room = kv_bytes + (64 << 20)
    settings = Settings(
        device_budget=room, host_budget=64 << 20, mode="sparse", alpha=plan.alpha, index_bits=plan.bits,
        index_sure=plan.sure, most_selected=plan.most, look_seconds=plan.look_seconds,
        index_parts=plan.parts,
    )  # fmt: skip
    engine = Engine(settings)
    try:
        session = Session(engine)
        say(f"{tokens:,} tokens: filling")
        for layer in range(plan.layers):
            for start in range(0, tokens, CHUNK):
                session.update(layer, *heads.chunk(layer, start, min(CHUNK, tokens - start)))
        assert engine.partitions is not None
        engine.partitions.wait()
        session.build_index(lambda done, of: say(f"{tokens:,} tokens: index {done} of {of}"))
        kinds = list[Kind]()
        for name in (*HEADS, *[RETRIEVAL] * plan.passages):
            say(f"{tokens:,} tokens: {name} heads")
            kinds.append(_kind(plan, heads, session, name))
        return Row(tokens, kv_bytes, engine.used_bytes("index"), engine.partitions.seconds, kinds)
    finally:
        engine.close()


def _kind(plan: Plan, heads: Heads, session: Session, name: str) -> Kind:
    engine, length = session.engine, session.length(0)

    def ask(step: int) -> Tensor:
        return heads.asked(name, step, length)

    visible, prefix = [Visible.all(length, 1)], [Visible.all(max(1, length // 5), 1)]
    engine.sparse = None
    exact = _times(plan, ask, lambda q: _attend(plan, session, q, visible))
    dense = _dense(plan, ask, session)
    engine.sparse = SparseUse()
    for state in session.layers.values():
        state.history = History(plan.kv_heads)
    _attend(plan, session, ask(9_999), visible)
    assert engine.partitions is not None
    engine.partitions.wait()  # what this step showed to be worth having is made in idle time
    sparse = _times(plan, ask, lambda q: _attend(plan, session, q, visible))
    first = _times(plan, ask, lambda q: _attend(plan, session, q, prefix))
    engine.sparse = use = SparseUse()
    measured = engine.settings
    engine.settings = measured.replace(measure_mass=True)
    for state in session.layers.values():
        state.history = History(plan.kv_heads)
    _attend(plan, session, ask(10_000), visible)
    engine.settings = measured
    return Kind(name, exact, dense, sparse, use.as_dict(), first)


def _attend(plan: Plan, session: Session, q: Tensor, visible: list[Visible]) -> None:
    for layer in range(plan.layers):
        session.attention(layer, q[layer], visible, plan.head_dim**-0.5)


def _times(plan: Plan, ask: Callable[[int], Tensor], step: Callable[[Tensor], None]) -> list[float]:
    times = []
    for i in range(plan.steps + 1):
        q = ask(i)
        began = time.perf_counter()
        step(q)
        times.append(time.perf_counter() - began)
    return times[1:]


def _dense(plan: Plan, ask: Callable[[int], Tensor], session: Session) -> list[float]:
    """torch's own attention over one layer that lies in place, times the layers."""
    if plan.token_bytes // plan.layers * session.length(0) > machine.available_ram() // 2:
        return []
    k, v = session.gather(0)
    times = []
    for i in range(min(5, plan.steps) + 1):
        q = ask(i)[0]
        began = time.perf_counter()
        functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        times.append((time.perf_counter() - began) * plan.layers)
    return times[1:]


def tables(found: Found) -> list[Table]:
    """What was found, for people."""
    p, m = found.plan, found.machine
    made = []
    for row in found.rows:
        limit = found.limit(row)
        share = row.index_bytes / row.kv_bytes
        table = Table(
            title=f"{row.tokens:,} tokens, {format_bytes(row.kv_bytes)} of KV in {p.layers} layers, "
            f"{limit * 1e3:.1f} ms to read it once; index {format_bytes(row.index_bytes)} ({share:.1%}), "
            f"{row.build_seconds / row.tokens / p.layers * 1e6:.1f} s a million tokens and layer",
            title_justify="left",
        )
        for name in ("heads", "sdpa ms", "exact ms", "sparse ms", "x sdpa", "x exact", "x limit", "a fifth ms"):
            table.add_column(name, justify="right")
        for name in ("attended", "mass", "least", "error"):
            table.add_column(name, justify="right")
        for kind in row.kinds:
            dense, exact, sparse = (
                statistics.median(times) if times else math.nan for times in (kind.dense, kind.exact, kind.sparse)
            )
            table.add_row(
                kind.name,
                *(f"{x * 1e3:.1f}" for x in (dense, exact, sparse)),
                *(f"{x / sparse:.2f}" for x in (dense, exact, limit)),
                f"{statistics.median(kind.prefix) * 1e3:.1f}",
                *_quality(kind.use),
            )
        made.append(table)
    made[-1].caption = (
        f"{p.bits}-bit codes, alpha {p.alpha}, {p.dtype}, {p.kv_heads} kv heads x {p.group} queries x {p.head_dim}. "
        f"{m['cpu']}, {m['cores']} cores, torch {m['torch']}; memory {found.memory.best / 1e9:.1f} GB/s; others took "
        f"{found.cpu_of_others:.0%} of the cores."
    )
    return made


def _quality(use: dict[str, Any]) -> list[str]:
    if not use["steps"]:  # the plan was to read everything
        return ["all", "1", "1", "0"]
    names = ("true_recovered_mass", "true_least_recovered_mass", "output_error")
    return [f"{use['attended_share']:.2%}", *(f"{use[name]:.3f}" for name in names)]


def plot(found: Found, path: Path) -> None:
    """Milliseconds a step over context length, a picture for each kind of head. Needs matplotlib."""
    pyplot = reporting.pyplot()
    names = [kind.name for kind in found.rows[0].kinds]
    figure, grid = pyplot.subplots(1, len(names), sharey=True, figsize=(4 * len(names), 4), squeeze=False)
    for column, (axes, name) in enumerate(zip(grid[0], names, strict=True)):
        kinds = [(row.tokens, row.kinds[column]) for row in found.rows]
        for way, label in (
            ("dense", "sdpa"),
            ("exact", "exact"),
            ("sparse", "sparse"),
            ("prefix", "sparse, a fifth seen"),
        ):
            points = [(n, statistics.median(times) * 1e3) for n, kind in kinds if (times := getattr(kind, way))]
            axes.loglog([n for n, _ in points], [ms for _, ms in points], marker="o", label=label)
        limits = [found.limit(row) * 1e3 for row in found.rows]
        axes.loglog([row.tokens for row in found.rows], limits, linestyle="--", label="reading the KV once")
        axes.set(title=f"{name} heads", xlabel="tokens of context", ylabel="" if column else "ms a step")
    grid[0][0].legend()
    figure.savefig(path)
    pyplot.close(figure)


def command(
    contexts: Annotated[
        str | None, typer.Option(help=f"Context lengths. default: {CONTEXTS}; {QUICK} with --quick")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Keys with this share of the largest weight are attended.")] = 0.001,
    bits: Annotated[int, typer.Option(help="Of a coded number: 4 or 8.")] = 4,
    sure: Annotated[float, typer.Option(help="Deviations allowed for; 0: provably complete.")] = 2.0,
    most: Annotated[int | None, typer.Option(help="Keys a kv head at most.")] = None,
    look_seconds: Annotated[
        float, typer.Option(help="That the optimizer believes a look takes; next to nothing: heads look in any case.")
    ] = LOOK,
    passages: Annotated[
        bool, typer.Option(help="Keys of each 64 tokens have a direction in common, and a kind of heads looks for it.")
    ] = False,
    parts: Annotated[float, typer.Option(help="Deviations by which parts of 64 tokens are left out; 0: none.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    layers: int = 4,
    kv_heads: int = 4,
    group: int = 4,
    head_dim: int = 64,
    steps: Annotated[int, typer.Option(help="Steps of each kind.")] = 15,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    quick: Annotated[bool, typer.Option(help="Shows that it runs, measures nothing.")] = False,
) -> None:
    """Sparse attention against exact attention. Example: alaya-tiers bench attention --contexts 32K,128K,1M"""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        plan = Plan(
            contexts=contexts_of(contexts, CONTEXTS, quick=quick), kv_heads=kv_heads, group=group,
            head_dim=head_dim, layers=layers, dtype=dtype, alpha=alpha, bits=bits, sure=sure, most=most,
            look_seconds=look_seconds, passages=passages, parts=parts, steps=1 if quick else steps,
            memory_bytes=8 << 20 if quick else 1 << 30,
        )  # fmt: skip
        with errors.status("memory") as status:
            found = run(plan, status.update)
    show(tables(found), found.as_dict(), json_file)
    if plot_file is not None:
        plot(found, plot_file)
