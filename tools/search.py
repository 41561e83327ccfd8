"""Looking for the best point of a space of settings: all of it, or as much as a number of trials allows."""

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alaya_tiers.errors import ConfigError

Point = dict[str, Any]

OVER = 10.0
"""How much worse than its price a point is that misses its target: times so much for each time it is missed by."""

ENOUGH = 3
"""Trials in a row, in multiples of the number of settings, that find nothing new: the search is over."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a point gives. price: in money a month, or whatever the price of memory is in. seconds: that the target is
    about, TPOT or TTFT. quality: share of the attention recovered. facts: for tables. missing: why it does not work."""

    price: float
    seconds: float
    quality: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted: at most so many seconds, at least that quality, for the lowest price. Without seconds: the
    fastest for at most ``price``."""

    seconds: float | None = None
    quality: float = 0.0
    price: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "price"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"a target of {name} is above 0, got {value!r}")
        if not 0 <= self.quality <= 1:
            raise ConfigError(f"quality is a share from 0 to 1, got {self.quality!r}")

    def score(self, outcome: Outcome) -> float:
        """The lower the better; infinite for what does not work."""
        if outcome.missing is not None:
            return math.inf
        aim, limit, value = (
            (outcome.price, self.seconds, outcome.seconds)
            if self.seconds is not None
            else (outcome.seconds, self.price, outcome.price)
        )
        missed = 0.0 if limit is None else max(0.0, value / limit - 1)
        missed += max(0.0, self.quality - outcome.quality) * 100
        return aim * (1 + OVER * missed) + (missed > 0) * aim * OVER

    def met(self, outcome: Outcome) -> bool:
        """Whether nothing is missed."""
        fast = self.seconds is None or outcome.seconds <= self.seconds
        cheap = self.price is None or outcome.price <= self.price
        return outcome.missing is None and fast and cheap and outcome.quality >= self.quality


@dataclass(frozen=True, slots=True)
class Trial:
    """A point that was tried."""

    point: Point
    outcome: Outcome
    score: float


Space = Mapping[str, Sequence[Any]]
Evaluate = Callable[[Point], Outcome]
Say = Callable[[int, float], None]


def size(space: Space) -> int:
    """How many points there are."""
    return math.prod(len(values) for values in space.values())


def exhaustive(space: Space, target: Target, evaluate: Evaluate, say: Say = lambda n, best: None) -> list[Trial]:
    """Every point."""
    trials: list[Trial] = []
    for values in itertools.product(*space.values()):
        point = dict(zip(space, values, strict=True))
        outcome = evaluate(point)
        trials.append(Trial(point, outcome, target.score(outcome)))
        say(len(trials), best(trials).score)
    return trials


def search(
    space: Space,
    target: Target,
    evaluate: Evaluate,
    trials: int,
    seed: int = 0,
    first: Sequence[Point] = (),
    say: Say = lambda n, best: None,
) -> list[Trial]:
    """At most so many different points, chosen by optuna's TPE from what earlier ones gave; ``first`` ones first.

    Settings whose values are numbers count as ordered. The same seed gives the same search. Raises ConfigError where
    optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("a search needs optuna: pip install 'alaya-tiers[tune]', or take --exhaustive")
    optuna: Any = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, trials // 4)))
    for point in first:
        study.enqueue_trial({name: _asked(space[name], value) for name, value in point.items()})
    done: dict[tuple[Any, ...], Trial] = {}
    idle = 0
    while len(done) < min(trials, size(space)) and idle < ENOUGH * trials:
        trial = study.ask()
        point = {name: _suggested(trial, name, values) for name, values in space.items()}
        key = tuple(point.values())
        idle = idle + 1 if key in done else 0
        if key not in done:
            outcome = evaluate(point)
            done[key] = Trial(point, outcome, target.score(outcome))
            say(len(done), best(list(done.values())).score)
        score = done[key].score
        study.tell(trial, min(score, 1e300))
    return list(done.values())


def _ordered(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _suggested(trial: Any, name: str, values: Sequence[Any]) -> Any:
    if _ordered(values):
        return values[trial.suggest_int(name, 0, len(values) - 1)]
    return trial.suggest_categorical(name, list(values))


def _asked(values: Sequence[Any], value: Any) -> Any:
    return list(values).index(value) if _ordered(values) else value


def best(trials: Sequence[Trial]) -> Trial:
    """The one with the lowest score; of equals the cheapest, then the fastest."""
    return min(trials, key=lambda t: (t.score, t.outcome.price, t.outcome.seconds))


def front(trials: Sequence[Trial], quality: float = 0.0) -> list[Trial]:
    """Those of enough quality that no other beats in both price and seconds, cheapest first."""
    working = [t for t in trials if t.outcome.missing is None and t.outcome.quality >= quality]
    found: list[Trial] = []
    for trial in sorted(working, key=lambda t: (t.outcome.price, t.outcome.seconds)):
        if not found or trial.outcome.seconds < found[-1].outcome.seconds:
            found.append(trial)
    return found
