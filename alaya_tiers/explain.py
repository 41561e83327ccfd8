"""What the optimizer planned for the last step of each layer, beside what it took, as a database explains a query."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.layer import Layer
from alaya_tiers.stats import Touched


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's last decode step.

    tokens: what it saw. heads: kv heads, and of them codes: how many were to scan all codes; coarse: how many those of
    parts that by their summary may matter; the others read everything.
    found: keys each head found within reach when it scanned last; alphas: the share of the largest weight a key had
    to have for it, less than the setting where that held too little of the attention. most: what a head may find at
    most; None: any number. predicted, measured: seconds; with ``measure_mass`` the comparison is in the measured.

    What came of it: attended: tokens of each head; mass: the share of its attention that they hold, in the worst of its
    queries, the rest is estimated. gave_up: heads that were to scan, found too much and read everything. why: where no
    head scanned. kv_bytes: of the keys and values attended; scanned_bytes: of codes; touched: of the blocks, or pages,
    these were in, whole, by tier. The last two also with the comparison.
    """

    layer: int
    tokens: int
    heads: int
    codes: int
    coarse: int
    found: tuple[int, ...]
    alphas: tuple[float, ...]
    most: int | None
    predicted: float
    measured: float
    attended: tuple[int, ...]
    mass: tuple[float, ...]
    gave_up: int
    why: str
    kv_bytes: int
    scanned_bytes: int
    touched: Touched

    @property
    def plan(self) -> str:
        """The plan in words."""
        reach = "DIPR" if self.most is None else f"DIPR, at most {self.most}"
        flat = self.heads - self.codes - self.coarse
        if flat < self.heads and min(self.alphas) < 0.999 * max(self.alphas):
            reach += f", alpha down to {min(self.alphas):.2g}"
        plans = {"coarse": self.coarse, "codes": self.codes}
        looking = [f"{heads} {name} ({reach})" for name, heads in plans.items() if heads]
        return " + ".join([*looking, *[f"{flat} flat"] * bool(flat)])

    @property
    def outcome(self) -> str:
        """What became of the plan, where that is not the plan itself; else empty."""
        if self.why:
            return self.why
        return f"{self.gave_up} found too much and read all" if self.gave_up else ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plans of all layers that have decoded a token. str() is a table for people.

    There are three plans for a head: ``flat`` reads all keys and values, ``codes`` scans the index and attends to what
    is within reach (DIPR), to a number of keys at most where there is a limit of keys, bytes or time, and ``coarse``
    does so too, but leaves out parts of 64 tokens that, by their summaries, hold nothing within reach.
    """

    mode: str
    alpha: float
    target: float | None
    layers: tuple[LayerPlan, ...]

    @property
    def predicted(self) -> float:
        """Seconds of attention for a token, as planned."""
        return sum(one.predicted for one in self.layers)

    @property
    def measured(self) -> float:
        """Seconds of attention for a token, as it was."""
        return sum(one.measured for one in self.layers)

    @property
    def mass(self) -> float:
        """The least share of its attention that a query head attended and did not estimate."""
        return min((min(one.mass) for one in self.layers), default=1.0)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        sums = {"predicted": self.predicted, "measured": self.measured, "mass": self.mass}
        layers = [asdict(one) | {"plan": one.plan, "outcome": one.outcome} for one in self.layers]
        return asdict(self) | sums | {"layers": layers}

    def __str__(self) -> str:
        if not self.layers:
            return "mode='exact' reads everything" if self.mode == "exact" else "no layer has decoded a token yet"
        head = f"{'layer':>5}  {'tokens':>9}  {'found by head':<28}  {'attended':>8}  {'mass':>5}  {'predicted':>9}"
        lines = [f"{head}  {'measured':>9}  plan of kv heads"]
        for one in self.layers:
            found = " ".join(map(str, one.found))
            found = found if len(found) <= 28 else f"{min(one.found)} to {max(one.found)}"
            share = sum(one.attended) / max(1, one.tokens * one.heads)
            lines.append(
                f"{one.layer:>5}  {one.tokens:>9,}  {found:<28}  {share:>8.1%}  {min(one.mass):>5.3f}  "
                f"{_ms(one.predicted)}  {_ms(one.measured)}  {one.plan}{': ' * bool(one.outcome)}{one.outcome}"
            )
        target = "no target" if self.target is None else f"target {self.target * 1e3:.2f} ms"
        lines.append(
            f"attention of a token: {self.predicted * 1e3:.2f} ms predicted, {self.measured * 1e3:.2f} ms measured, "
            f"{target}, alpha {self.alpha:g}"
        )
        ssd = sum(one.touched.ahead + one.touched.waited for one in self.layers)
        kv, codes = (sum(getattr(one, name) for one in self.layers) for name in ("kv_bytes", "scanned_bytes"))
        lines.append(
            f"least mass of a query head {self.mass:.3f}; attended {format_bytes(kv)} of keys and values, "
            f"scanned {format_bytes(codes)} of codes, read {format_bytes(ssd)} from ssd"
        )
        return "\n".join(lines)


def explain(settings: Settings, layers: Iterable[Layer]) -> Explanation:
    """The plans of layers that have decoded a token."""
    plans = []
    for state in layers:
        history = state.history
        if not history.tokens:
            continue
        found = tuple(np.minimum(history.found, history.tokens).astype(int).tolist())
        look, coarse = int(history.choice.look.sum()), int(history.choice.coarse.sum())
        alphas = tuple(np.exp(-np.maximum(history.far, -math.log(settings.alpha))).tolist())
        plans.append(
            LayerPlan(
                state.number, history.tokens, history.found.size, look - coarse, coarse, found, alphas,
                history.choice.most if look else None, history.predicted, history.measured,
                tuple(history.used.astype(int).tolist()), tuple(history.mass.tolist()), history.gave_up, history.why,
                int(history.used.sum()) * state.shape.geometry.row_bytes, state.scanned, replace(state.touched),
            )
        )  # fmt: skip
    return Explanation(settings.mode, settings.alpha, settings.attention_target, tuple(plans))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>6.2f} ms"
