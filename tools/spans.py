"""What goes on while a forward runs, as spans: its waits, scans of codes, attention, and the jobs of the SSD's threads.

A stretch of time is split into computing, scanning the index, and waiting for the disk. Reading is hidden as far as it
happens while the forward does not wait for it. What the system reads ahead into its page cache is not seen.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial, wraps
from typing import Any, Self

from rich.table import Table

from alaya_tiers import looking
from alaya_tiers.cache import Session
from alaya_tiers.engine import Engine
from alaya_tiers.partitions import Partitions
from alaya_tiers.tiers.ssd import SsdTier

SESSION, ATTENTION, INDEX, WAIT = "session", "attention", "index", "wait"
READ, WRITE, STEP = "read", "write", "step"
COLORS = {
    STEP: "0.85",
    SESSION: "tab:cyan",
    ATTENTION: "tab:green",
    INDEX: "tab:purple",
    WAIT: "tab:red",
    READ: "tab:blue",
    WRITE: "tab:orange",
}
FORWARD = "forward"
"""The lane of whatever thread is none of ours."""

Pieces = list[tuple[float, float]]
Work = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that went on from ``start`` to ``end`` (seconds) on a lane: "forward", or a thread of ours."""

    what: str
    lane: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Split:
    """One step, in seconds: total = compute + index + waited, compute = session + model + attention.

    session: of opening a context, where that is part of it. model: whatever is nothing else. hidden: of reading, while
    nothing waited.
    """

    total: float
    compute: float
    session: float
    model: float
    attention: float
    index: float
    waited: float
    hidden: float

    @classmethod
    def mean(cls, splits: Sequence[Self]) -> Self:
        """Of several, part by part."""
        return cls(*(statistics.fmean(getattr(split, part.name) for split in splits) for part in fields(cls)))


@dataclass(slots=True)
class Timeline:
    """Collects spans. Thread-safe."""

    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Until left, everything that any session of this process does is noted. Costs some microseconds a span."""
        watched: list[tuple[Any, str, Callable[[Work], Work]]] = [
            (Session, "attention", self._noted(ATTENTION)),
            (Engine, "wait_for", self._noted(WAIT)),
            (Partitions, "_fetch", self._noted(READ)),
            (looking, "scan", self._noted(INDEX)),
            (looking, "scan_parts", self._noted(INDEX)),
            (SsdTier, "read_jobs", self._jobs(READ)),
            (SsdTier, "page_jobs", self._jobs(READ)),
            (SsdTier, "write_jobs", self._jobs(WRITE)),
        ]
        before = [(thing, name, vars(thing)[name]) for thing, name, _ in watched]
        for thing, name, wrap in watched:
            setattr(thing, name, wrap(vars(thing)[name]))
        try:
            yield
        finally:
            for thing, name, real in before:
                setattr(thing, name, real)

    def note(self, what: str, work: Work, *args: Any, **kwargs: Any) -> Any:
        """The result of ``work``, which becomes a span. What the forward reads itself it waits for."""
        thread = threading.current_thread().name
        lane = thread if thread.startswith("alaya-") else FORWARD
        began = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            what = WAIT if what == READ and lane == FORWARD else what
            self.spans.append(Span(what, lane, began, time.perf_counter()))

    def _noted(self, what: str) -> Callable[[Work], Work]:
        def wrap(work: Work) -> Work:
            @wraps(work)
            def noted(*args: Any, **kwargs: Any) -> Any:
                return self.note(what, work, *args, **kwargs)

            return noted

        return wrap

    def _jobs(self, what: str) -> Callable[[Work], Work]:
        def wrap(make: Work) -> Work:
            @wraps(make)
            def noted(*args: Any) -> list[Work]:
                return [partial(self.note, what, job) for job in make(*args)]

            return noted

        return wrap

    def split(self, step: Span) -> Split:
        """What a step was made of."""
        inside = [s for s in self.spans if s.start < step.end and s.end > step.start]
        of = {what: union((s.start, s.end) for s in inside if s.what == what and _counts(s)) for what in COLORS}
        for pieces in of.values():
            pieces[:] = [(max(a, step.start), min(b, step.end)) for a, b in pieces]
        total, waited = step.end - step.start, length(of[WAIT])
        index = length(union(of[WAIT] + of[INDEX])) - waited
        attention = length(union(of[WAIT] + of[INDEX] + of[ATTENTION])) - waited - index
        session = length(union(of[WAIT] + of[INDEX] + of[ATTENTION] + of[SESSION])) - waited - index - attention
        compute, hidden = total - waited - index, length(union(of[READ] + of[WAIT])) - waited
        return Split(total, compute, session, compute - session - attention, attention, index, waited, hidden)


def _counts(span: Span) -> bool:
    """Whether it is the forward's, or somebody's who reads meanwhile."""
    return span.lane == FORWARD or span.what in (READ, WRITE)


def union(pieces: Iterable[tuple[float, float]]) -> Pieces:
    """The same stretches of time, none of which overlap, in order."""
    joined: Pieces = []
    for start, end in sorted(pieces):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def length(pieces: Iterable[tuple[float, float]]) -> float:
    """How long they are together."""
    return sum(end - start for start, end in pieces)


def split_table(title: str, rows: Iterable[tuple[str, Split]]) -> Table:
    """Where the time of several ways goes, in milliseconds, for people."""
    made, rows = Table(title=title, title_justify="left"), list(rows)
    opened = any(split.session for _, split in rows)
    parts = ("of it session", "of it attention") if opened else ("of it attention",)
    made.add_column("")
    for name in ("all", "compute", *parts, "index", "IO waited", "IO hidden", "hidden of IO"):
        made.add_column(name, justify="right")
    for name, s in rows:
        ms = (s.total, s.compute, *([s.session] if opened else []), s.attention, s.index, s.waited, s.hidden)
        io = s.hidden + s.waited
        made.add_row(name, *(f"{x * 1e3:.1f}" for x in ms), f"{s.hidden / io:.0%}" if io else "-")
    return made


def draw_splits(axes: Any, rows: Sequence[tuple[str, Split]]) -> None:
    """Bars of where the time of several ways goes, over matplotlib's axes; hidden reading as a thin bar below."""
    done, names = [0.0] * len(rows), [name for name, _ in rows]
    for label, part, color in (
        ("compute", "compute", COLORS[ATTENTION]),
        ("index", "index", COLORS[INDEX]),
        ("IO waited", "waited", COLORS[WAIT]),
    ):
        ms = [getattr(split, part) * 1e3 for _, split in rows]
        axes.barh(range(len(rows)), ms, 0.5, left=done, color=color, label=label)
        done = [a + b for a, b in zip(done, ms, strict=True)]
    below = [place + 0.33 for place in range(len(rows))]
    axes.barh(below, [split.hidden * 1e3 for _, split in rows], 0.12, color=COLORS[READ], label="IO hidden")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlabel="ms")
    axes.legend()
