"""Benchmarks: ``alaya-tiers bench decode``.

Every competitor decodes the same tokens over the same synthetic context with the same model, one after the other in one
process; the machine's own limits (reading memory, reading the disk) are measured in between, in the same run. What
counts are ratios: absolute times move by a third from one minute to the next on a shared machine.
"""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import Cache

from alaya_tiers.cache import Session, Visible
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine
from alaya_tiers.tools.baselines import (
    COMPETITORS,
    IN_PLACE,
    RAM,
    REFERENCE,
    VOCABULARY,
    Case,
    Competitor,
    Context,
    Shape,
    build_model,
    model_bytes,
)
from alaya_tiers.tools.machine import Bandwidth

SPEED_FLOOR, SPEED_FROM = 5.0, 32 << 10
"""Our exact decode against the reference, for contexts from this many tokens on; below, the linear layers decide."""

LIMIT_FLOOR = 0.3
"""Our exact attention: share of the time it takes to read the KV once."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What to measure. Raises ConfigError.

    steps: at most so many for each competitor; fewer when they take longer than ``seconds``, but never below ``least``.
    directory: where the store and the file to measure the disk with go; both are removed. memory_bytes, disk_bytes: how
    much is read to find the machine's limits.
    """

    shape: Shape = Shape()
    contexts: tuple[int, ...] = (8 << 10, 32 << 10, 128 << 10)
    steps: int = 50
    least: int = 5
    seconds: float = 5.0
    directory: str | None = None
    memory_bytes: int = 1 << 30
    disk_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1 or self.steps < 1 or self.least < 1:
            raise ConfigError("contexts, steps and least must be positive")

    @property
    def room(self) -> int:
        """Positions the longest run needs: the context, the warm-up and the steps."""
        return max(self.contexts) + self.steps + 1

    @property
    def rounds(self) -> int:
        """How often ``run`` says something."""
        return 1 + len(self.contexts) * (1 + len(COMPETITORS))


@dataclass(slots=True)
class Measured:
    """One competitor at one length. All times in seconds.

    warm_up: the first step, which is not counted. steps: all others. attention: a whole step's worth of attention
    without the model, several times. peak_rss: of the process, filling in included. agreement: largest difference of
    the logits from the reference's, over the largest logit. ssd: what was read. skipped: why it was not run.
    """

    name: str
    warm_up: float = 0.0
    steps: list[float] = field(default_factory=list)
    fill: float = 0.0
    attention: list[float] = field(default_factory=list)
    peak_rss: int = 0
    agreement: float | None = None
    ssd: dict[str, Any] | None = None
    skipped: str | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0, VOCABULARY), repr=False)

    @property
    def median(self) -> float:
        """Of the counted steps."""
        return statistics.median(self.steps)

    @property
    def p90(self) -> float:
        """Nine steps of ten were at least as fast."""
        return sorted(self.steps)[-(-9 * len(self.steps) // 10) - 1]

    def as_dict(self) -> dict[str, Any]:
        """JSON values, every step's time among them."""
        if self.skipped is not None:
            return {"name": self.name, "skipped": self.skipped}
        raw = {name: getattr(self, name) for name in ("name", "warm_up", "steps", "fill", "attention", "peak_rss")}
        times = {"median": self.median, "min": min(self.steps), "p90": self.p90}
        return raw | times | {"logits_differ": self.agreement, "ssd": self.ssd}


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
        """How many times as fast one competitor is as another."""
        one, other = self.of(name), self.of(over)
        return other.median / one.median if one and other else None


@dataclass(slots=True)
class Report:
    """All that was measured, as data."""

    bench: Bench
    machine: dict[str, Any]
    memory: Bandwidth
    model_bytes: int
    model_seconds: list[float]
    rows: list[Row] = field(default_factory=list)

    def limit(self, row: Row) -> float:
        """Seconds to read a row's KV once at the best memory bandwidth seen in this run."""
        return row.kv_bytes / self.memory.best

    def attention_share(self, row: Row) -> float | None:
        """Our attention in RAM: share of the limit."""
        ours = row.of(RAM)
        return self.limit(row) / statistics.median(ours.attention) if ours and ours.attention else None

    def floors(self, row: Row) -> dict[str, Any]:
        """What the design asks for: value, floor, and whether it is reached (None: not asked for here, or not run)."""
        speed, share = row.speed_up(RAM, REFERENCE), self.attention_share(row)
        asked = speed is not None and row.tokens >= SPEED_FROM
        return {
            "speed_up": {"value": speed, "floor": SPEED_FLOOR, "passed": speed >= SPEED_FLOOR if asked else None},
            "attention_share": {"value": share, "floor": LIMIT_FLOOR, "passed": share and share >= LIMIT_FLOOR},
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "benchmark": "decode",
            "machine": self.machine,
            "settings": asdict(self.bench),
            "memory": self.memory.as_dict(),
            "model": {"bytes": self.model_bytes, "seconds_without_context": self.model_seconds},
            "token_kv_bytes": self.bench.shape.token_bytes,
            "rows": [
                {
                    "tokens": row.tokens,
                    "kv_bytes": row.kv_bytes,
                    "limit_seconds": self.limit(row),
                    "competitors": [
                        m.as_dict()
                        | {
                            "speed_up": row.speed_up(m.name, REFERENCE),
                            "speed_up_over_in_place": row.speed_up(m.name, IN_PLACE),
                            "share_of_limit": None if m.skipped else self.limit(row) / m.median,
                        }
                        for m in row.measured
                    ],
                    "floors": self.floors(row),
                }
                for row in self.rows
            ],
        }


# ---------------------------------------------------------------------- measuring
@torch.no_grad()
def run(bench: Bench, say: Say = lambda text: None, competitors: Sequence[Competitor] = COMPETITORS) -> Report:
    """Measure everything. say: told what comes next. Raises ConfigError, StoreError, OSError."""
    say("memory bandwidth")
    memory = _memory(bench)
    model, context = build_model(bench.shape, bench.room), Context(bench.shape)
    empty = DynamicCache(config=model.config)
    alone, _ = decode(model, empty, bench)
    report = Report(bench, machine.describe(), memory, model_bytes(model), alone[1:])
    with ExitStack() as stack:
        parent = bench.directory or os.environ.get("ALAYA_TIERS_DIR")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent)))
        disk = None
        if any(c.ssd for c in competitors):
            disk = stack.enter_context(machine.disk_file(directory, bench.disk_bytes))
        for tokens in bench.contexts:
            case = Case(bench.shape, model.config, tokens, tokens + bench.steps + 1, directory)
            row = Row(tokens, case.kv_bytes)
            report.rows.append(row)
            for competitor in competitors:
                say(f"{tokens:,} tokens: {competitor.name}")
                row.measured.append(_measure(competitor, case, model, context, bench, disk))
                gc.collect()
            _compare(row)
            say("memory bandwidth")
            report.memory = report.memory.merged(_memory(bench))
    return report


def decode(
    model: LlamaForCausalLM, cache: Cache, bench: Bench, started: Say = lambda text: None
) -> tuple[list[float], Tensor]:
    """Seconds of each step, the warm-up first, and the logits of all of them, float32 [steps, vocabulary].

    started: called between the warm-up and the first counted step.
    """
    times: list[float] = []
    logits: list[Tensor] = []
    begin = time.perf_counter()
    while len(times) <= bench.steps:
        if len(times) > bench.least and time.perf_counter() - begin > bench.seconds:
            break
        if len(times) == 1:
            started("")
        token = torch.tensor([[(7 * len(times) + 3) % VOCABULARY]])
        began = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - began)
        logits.append(out.logits[0, -1].float())
    return times, torch.stack(logits)


def attention_only(session: Session, shape: Shape, seconds: float, most: int) -> list[float]:
    """Seconds of one attention in every layer, several times: what is left of a step without the model."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(shape.layers, 1, shape.heads, 1, shape.head_dim, generator=generator) * 3
    q = q.to(next(iter(session.layers.values())).shape.geometry.dtype)
    visible, scale = [Visible.all(session.length(), 1)], shape.head_dim**-0.5
    times: list[float] = []
    while len(times) <= most and (len(times) < 4 or sum(times) < seconds):
        began = time.perf_counter()
        for layer in range(shape.layers):
            session.attention(layer, q[layer], visible, scale)
        times.append(time.perf_counter() - began)
    return times[1:]
