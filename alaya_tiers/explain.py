"""What the optimizer planned for the last step of each layer, beside what it took, as a database explains a query."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alaya_tiers.config import Settings
from alaya_tiers.layer import Layer


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's last decode step.

    tokens: what it saw. heads: kv heads, and of them codes: how many scanned codes; the others read everything.
    found: keys each head found within reach when it scanned last; alphas: the share of the largest weight a key had
    to have for it, less than the setting where that held too little of the attention. most: what a head may find at
    most; None: any number.
    predicted, measured: seconds.
    """

    layer: int
    tokens: int
    heads: int
    codes: int
    found: tuple[int, ...]
    alphas: tuple[float, ...]
    most: int | None
    predicted: float
    measured: float

    @property
    def plan(self) -> str:
        """The plan in words."""
        reach = "DIPR" if self.most is None else f"DIPR, at most {self.most}"
        if self.codes and min(self.alphas) < 0.999 * max(self.alphas):
            reach += f", alpha down to {min(self.alphas):.2g}"
        parts = [f"{self.codes} codes ({reach})"] * bool(self.codes) + [f"{self.heads - self.codes} flat"] * (
            self.codes < self.heads
        )
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plans of all layers that sparse attention has worked on. str() is a table for people."""

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

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"predicted": self.predicted, "measured": self.measured}

    def __str__(self) -> str:
        if not self.layers:
            return "no layer has been attended sparsely yet"
        lines = [
            f"{'layer':>5}  {'tokens':>9}  {'found by head':<28}  {'predicted':>9}  {'measured':>9}  plan of kv heads"
        ]
        for one in self.layers:
            found = " ".join(map(str, one.found))
            found = found if len(found) <= 28 else f"{min(one.found)} to {max(one.found)}"
            lines.append(
                f"{one.layer:>5}  {one.tokens:>9,}  {found:<28}  {_ms(one.predicted)}  {_ms(one.measured)}  {one.plan}"
            )
        target = "no target" if self.target is None else f"target {self.target * 1e3:.2f} ms"
        lines.append(
            f"attention of a token: {self.predicted * 1e3:.2f} ms predicted, {self.measured * 1e3:.2f} ms measured, "
            f"{target}, alpha {self.alpha:g}"
        )
        return "\n".join(lines)


def explain(settings: Settings, layers: Iterable[Layer]) -> Explanation:
    """The plans of layers that were planned at all."""
    plans = []
    for state in layers:
        history = state.history
        if not history.tokens:
            continue
        found = tuple(np.minimum(history.found, history.tokens).astype(int).tolist())
        look = int(history.choice.look.sum())
        alphas = tuple(np.exp(-np.maximum(history.far, -math.log(settings.alpha))).tolist())
        plans.append(
            LayerPlan(
                state.number, history.tokens, history.found.size, look, found, alphas,
                history.choice.most if look else None, history.predicted, history.measured,
            )
        )  # fmt: skip
    return Explanation(settings.alpha, settings.attention_target, tuple(plans))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>6.2f} ms"
