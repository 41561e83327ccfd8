"""``alaya-tiers simulate`` on a recorded trace: the same run with other budgets, blocks and policies."""

import itertools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import Settings, format_bytes, parse_bytes
from alaya_tiers.errors import BudgetTooSmall, ConfigError, OutOfSpace
from alaya_tiers.policies import EVICTION, GUESS, PREFETCH
from alaya_tiers.tools.phases import Phase
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.recorded import Recording
from alaya_tiers.tools.replay import Replay
from alaya_tiers.tools.reporting import results

SIZES = ("device_budget", "host_budget", "ssd_budget", "batch_bytes")
NUMBERS = ("block_tokens", "segment_tokens", "recent_tokens", "sink_tokens", "io_threads")
SHARES = ("dirty_limit", "prefetch_share", "page_share", "page_seconds")
NAMES: dict[str, Mapping[str, Any]] = {"eviction": EVICTION, "prefetch": PREFETCH, "guess": GUESS}
KNOWN = (*SIZES, *NUMBERS, *SHARES, *NAMES)


@dataclass(frozen=True, slots=True)
class Run:
    """A recording with some settings changed, and what came out."""

    changes: dict[str, Any]
    settings: Settings
    phases: list[Phase]
    index_bytes: int
    missing: str | None = None
    """Why it cannot be, for example a budget that is too small."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "changes": self.changes,
            "index_bytes": self.index_bytes,
            "missing": self.missing,
            "phases": [phase.as_dict() for phase in self.phases],
        }


def setting(name: str, text: str) -> Any:
    """A setting's value from words. Raises ConfigError."""
    name = name.strip().replace("-", "_")
    if name not in KNOWN:
        raise ConfigError(f"no setting {name!r} can be swept over a recorded trace; known are {', '.join(KNOWN)}")
    try:
        if name in SIZES:
            return parse_bytes(int(text) if text.strip().isdigit() else text)
        if name in NUMBERS:
            return int(text)
        if name in SHARES:
            return float(text)
    except ValueError as error:
        raise ConfigError(f"cannot read {text!r} as {name}: {error}") from error
    if text not in NAMES[name]:
        raise ConfigError(f"unknown {name} {text!r}; known are {', '.join(sorted(NAMES[name]))}")
    return text


def sweeps(words: str | None) -> dict[str, list[Any]]:
    """``name=value,value`` as settings' values; several after one another, with spaces between. Raises ConfigError."""
    found: dict[str, list[Any]] = {}
    for one in (words or "").split():
        name, equals, values = one.partition("=")
        if not equals or not all(value.strip() for value in values.split(",")):
            raise ConfigError(f"cannot read the sweep {one!r}; write e.g. host-budget=64MiB,256MiB")
        found[name.strip().replace("-", "_")] = [setting(name, value) for value in values.split(",")]
    return found


def rerun(recording: Recording, known: Profile, spread: dict[str, list[Any]], sample: float = 1.0) -> list[Run]:
    """Every combination of the settings given. Raises TraceError, ConfigError."""
    runs = []
    for values in itertools.product(*spread.values()):
        changes = dict(zip(spread, values, strict=True))
        settings = recording.settings.replace(**changes)
        replay = Replay(recording, settings, known, sample=sample)
        try:
            runs.append(Run(changes, settings, replay.run(), replay.index_bytes))
        except (BudgetTooSmall, OutOfSpace) as error:
            if math.prod(map(len, spread.values())) == 1:
                raise
            runs.append(Run(changes, settings, [], 0, str(error)))
    return runs


def report(
    recording: Recording, known: Profile, spread: dict[str, list[Any]], *, as_json: bool, sample: float = 1.0
) -> None:
    """Replay and print. Raises TraceError, ConfigError."""
    began = time.perf_counter()
    with Console(stderr=True).status("replaying"):
        runs = rerun(recording, known, spread, sample)
    wall = time.perf_counter() - began
    seconds = sum(phase.seconds for run in runs for phase in run.phases)
    if as_json:
        facts = {"trace": str(recording.path), "mode": recording.settings.mode, "profile": known.date}
        speed = {"wall_seconds": wall, "times_real_time": seconds / wall}
        print(json.dumps(facts | {"runs": [run.as_dict() for run in runs], "speed": speed}, indent=2))
        return
    out = results()
    out.print(table(runs))
    words = f"{seconds:,.1f} s of time in {wall:,.1f} s: {seconds / wall:,.1f} times real time"
    out.print(f"\n{len(runs)} runs, {words}", style="dim")
    for run in runs:
        for phase in run.phases:
            if (sure := phase.confidence) is not None:
                told = f"{np.mean(phase.steps) * 1e3:,.2f} ± {sure * 1e3:,.2f} ms"
                words = f"{phase.name}: a step takes {told} (mean, 95 %), of {phase.share:.1%} of the steps"
                out.print(words, style="dim")


def table(runs: list[Run]) -> Table:
    """A line for each phase of each run."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    changed = [name for name in runs[0].changes if len({str(run.changes[name]) for run in runs}) > 1]
    heads = ("phase", "TPOT ms", "p99 ms", "seconds", "hits", "device", "host", "ahead", "SSD read", "SSD written")
    for name in (*(name.replace("_", "-") for name in changed), *heads):
        shown.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    for run in runs:
        values = [(name, run.changes[name]) for name in changed]
        told = [format_bytes(value) if name in SIZES else str(value) for name, value in values]
        if run.missing is not None:
            shown.add_row(*told, "too small", style="dim")
        for phase in run.phases:
            row, total = phase.as_dict(), max(1, phase.touched.total)
            tpot = [f"{row['tpot_seconds'][p] * 1e3:,.1f}" if phase.steps else "–" for p in ("p50", "p99")]
            shares = [f"{getattr(phase.touched, name) / total:.1%}" for name in ("device", "host", "ahead")]
            moved = (format_bytes(phase.read_bytes), format_bytes(phase.written_bytes))
            shown.add_row(*told, phase.name, *tpot, f"{phase.seconds:,.2f}", f"{phase.hit_rate:.1%}", *shares, *moved)
    return shown
