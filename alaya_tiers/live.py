"""One screen that shows what a cache does while it does it.

with live(cache):
    model.generate(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from alaya_tiers.config import format_bytes
from alaya_tiers.pace import BOUNDS, Histogram
from alaya_tiers.seams import Clock, SystemClock
from alaya_tiers.stats import Source, Stats

TIERS = {"index": "magenta", "device": "green", "host": "cyan", "ssd": "blue"}
FOUND = {"device": "green", "host": "cyan", "ahead": "yellow", "waited": "red"}
"""Where attention found what it read, and the colour of that."""

WIDTH = 40
LEVELS = " ▁▂▃▄▅▆▇█"


class Screen:
    """Draws snapshots; rates are of the time between the last two."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._before: tuple[float, int, int] | None = None
        self._rates = (0.0, 0.0)

    def draw(self, stats: Stats) -> RenderableType:
        """The screen for a snapshot."""
        self._measure(stats)
        kv = f", {format_bytes(stats.kv_bytes)} of keys and values"
        title = Text.assemble((f"{stats.tokens:,} tokens", "bold"), kv)
        return Group(title, _tiers(stats), _lines(stats, *self._rates))

    def _measure(self, stats: Stats) -> None:
        now = self._clock.monotonic()
        if self._before is not None and now > self._before[0]:
            then, read, written = self._before
            self._rates = ((stats.read_bytes - read) / (now - then), (stats.written_bytes - written) / (now - then))
        self._before = (now, stats.read_bytes, stats.written_bytes)


@contextmanager
def live(source: Source, console: Console | None = None, *, per_second: float = 4.0) -> Iterator[None]:
    """Show ``source`` on the terminal, drawn anew ``per_second`` times; what is seen last stays.

    On anything but a terminal only the last screen is printed. console: where to, stderr without it.
    """
    screen = Screen()
    console = console or Console(stderr=True)
    with Live(
        get_renderable=lambda: screen.draw(source.stats()),
        console=console,
        refresh_per_second=per_second,
        auto_refresh=console.is_terminal,
    ):
        yield


def _tiers(stats: Stats) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("tier", "in use, of its budget"):
        table.add_column(name, no_wrap=True)
    for name in ("used", "peak", "budget", "attention found here"):
        table.add_column(name, justify="right", no_wrap=True)
    total = stats.touched.total or 1
    found = {
        "device": stats.touched.device,
        "host": stats.touched.host,
        "ssd": stats.touched.ahead + stats.touched.waited,
    }
    for name, tier in stats.tiers.items():
        limit = "no limit" if tier.budget is None else format_bytes(tier.budget)
        full = tier.used / tier.budget if tier.budget else 0.0
        table.add_row(
            name, bar([(full, TIERS.get(name, ""))]), format_bytes(tier.used), format_bytes(tier.peak), limit,
            f"{found[name] / total:.1%}" if name in found and stats.touched.total else "",
        )  # fmt: skip
    return table


def _lines(stats: Stats, read_rate: float, write_rate: float) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    touched, queues, tpot = stats.touched, stats.queues, stats.steps.decoding
    if touched.total:
        shares = [(getattr(touched, name) / touched.total, style) for name, style in FOUND.items()]
        words = f" hit rate {stats.hit_rate:.1%}, IO hidden {stats.io_hidden:.1%}"
        table.add_row("attention read", Text.assemble(bar(shares), words))
    if stats.read_ahead_bytes:
        words = f"{format_bytes(stats.read_ahead_bytes)}, {stats.prefetch_precision:.1%} of it was asked for"
        table.add_row("read ahead", words)
    table.add_row(
        "ssd now",
        f"reads {format_bytes(read_rate)}/s ({format_bytes(stats.read_bytes)} so far), "
        f"writes {format_bytes(write_rate)}/s ({format_bytes(stats.written_bytes)}, x {stats.write_amplification:.3f})",
    )
    table.add_row(
        "queues",
        f"{format_bytes(queues.reading)} being read, {format_bytes(queues.writing)} being written, "
        f"{format_bytes(queues.dirty)} to be written; {queues.waiting} waiting",
    )
    table.add_row(
        "waited",
        f"{stats.waited_seconds:.2f} s, of which {stats.stalled_seconds:.2f} s in {stats.stalls} stalls by writing",
    )
    if (sparse := stats.sparse) is not None and sparse.steps:
        table.add_row(
            "sparse",
            f"attended {sparse.attended / max(1, sparse.visible):.2%} of the tokens, "
            f"{sparse.recovered / sparse.steps:.1%} of the mass, {sparse.least:.1%} at least",
        )
    if (pages := stats.pages) is not None and pages.wanted:
        guesses = ", ".join(f"{name} {share:.0%}" for name, share in pages.precision.items())
        table.add_row(
            "single pages",
            f"{1 - pages.missed / pages.wanted:.1%} were there; read ahead: {pages.recall:.0%} of the others"
            + (f", right: {guesses}" if guesses else ""),
        )
    if tpot.count:
        words = f" median {_time(tpot.quantile(0.5))}, p90 {_time(tpot.quantile(0.9))}, {tpot.count:,} tokens"
        table.add_row("time per token", Text.assemble((curve(tpot), "green"), words))
    if (rate := stats.steps.prefill_rate) is not None:
        table.add_row("prompts", f"{1 / rate:,.0f} tokens/s")
    return table


def bar(shares: list[tuple[float, str]]) -> Text:
    """Shares of one side by side, each in its style, on a line of WIDTH."""
    text, at, reached = Text(), 0, 0.0
    for share, style in shares:
        reached = min(1.0, reached + share)
        text.append("█" * (round(reached * WIDTH) - at), style)
        at = round(reached * WIDTH)
    return text.append("·" * (WIDTH - at), "dim")


def curve(histogram: Histogram) -> str:
    """Its buckets from the first to the last that is not empty, as columns one character high; with the ends' times."""
    used = [i for i, count in enumerate(histogram.counts) if count]
    most = max(histogram.counts)
    columns = "".join(
        LEVELS[-(-count * (len(LEVELS) - 1) // most)] for count in histogram.counts[used[0] : used[-1] + 1]
    )
    low = BOUNDS[used[0] - 1] if used[0] else 0.0
    high = f"{_time(BOUNDS[used[-1]])}" if used[-1] < len(BOUNDS) else "more"
    return f"{_time(low)} {columns} {high}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
