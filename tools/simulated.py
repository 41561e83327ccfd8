"""What a simulation of requests came to: as JSON values, and as tables."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from alaya_tiers.config import format_bytes
from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.prices import Prices
from alaya_tiers.tools.simulator import TIERS, Counts

SECONDS_A_DAY = 86400
SECONDS_AN_HOUR = 3600

DRAIN = 600.0
"""Seconds in which the last answers may be finished before a machine is called overloaded."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one machine, and what came out. pause: of contexts that wait. prices: an hour."""

    policy: str
    machine: Machine
    counts: Counts
    prices: Prices
    pause: str = "none"

    def as_dict(self) -> dict[str, Any]:
        """JSON values: bytes, seconds, tokens, shares; the price of a million tokens, read and written."""
        counts, m = self.counts, self.machine
        hits = {tier: counts.hit_tokens[tier] / counts.tokens for tier in TIERS}
        hour = self.prices.of(m.device_memory, m.host_memory, m.ssd, m.servers)
        hours = max(counts.ended, counts.decoded) / SECONDS_AN_HOUR
        return {
            "policy": self.policy,
            "pause": self.pause,
            "machine": asdict(self.machine),
            "requests": counts.requests,
            "tokens": counts.tokens,
            "output_tokens": counts.output,
            "ttft_seconds": _spread(np.frombuffer(counts.ttft)),
            "tpot_seconds": _spread(np.frombuffer(counts.tpot)),
            "hit_rate": hits | {"all": sum(hits.values())},
            "hit_tokens": counts.hit_tokens,
            "categories": {
                name: {"tokens": asked, "hit_rate": found / asked} for name, (asked, found) in counts.categories.items()
            },
            "moved_bytes": counts.moved,
            "prefill_saved": 1 - counts.flops / counts.flops_without,
            "queue_seconds": counts.queue_seconds,
            "load_seconds": counts.load_seconds,
            "stall_seconds": counts.stall_seconds,
            "compute_seconds": counts.compute_seconds,
            "simulated_seconds": counts.ended,
            "decoded_seconds": counts.decoded,
            "ssd_written_bytes_per_day": counts.moved["host_to_ssd"] / counts.ended * SECONDS_A_DAY,
            "price_an_hour": hour,
            "price_per_million_tokens": hour * hours / (counts.tokens + counts.output) * 1e6,
        }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float | None]:
    """Percentiles and mean; None where there is nothing, as of TPOT where every answer has one token."""
    if not values.size:
        return dict.fromkeys([*(f"p{p}" for p in PERCENTILES), "mean"])
    found = np.percentile(values, PERCENTILES).tolist()
    return {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)} | {"mean": float(values.mean())}


def outcome(row: dict[str, Any]) -> dict[str, str]:
    """What a user of the machine sees."""
    ttft = {f"TTFT {name}": f"{seconds:,.2f} s" for name, seconds in row["ttft_seconds"].items() if name != "mean"}
    tpot = {
        f"TPOT {name}": "–" if (seconds := row["tpot_seconds"][name]) is None else f"{seconds * 1e3:,.1f} ms"
        for name in ("p50", "p99")
    }
    return ttft | tpot | {"price of 1M tokens": f"{row['price_per_million_tokens']:,.3g}"}


def hits(row: dict[str, Any]) -> dict[str, str]:
    """What was found where."""
    found = {f"{tier} hits": f"{row['hit_rate'][tier]:.1%}" for tier in TIERS}
    kinds = row["categories"] if len(row["categories"]) > 1 else {}
    of_each = {f"of {name}": f"{kind['hit_rate']:.1%}" for name, kind in sorted(kinds.items())}
    return found | {"saved": f"{row['prefill_saved']:.1%}"} | of_each


def traffic(row: dict[str, Any]) -> dict[str, str]:
    """What the machine had to do."""
    moved = {"ssd read": "ssd_to_host", "to device": "host_to_device", "to host": "device_to_host"}
    seconds = {name: f"{row[f'{name}_seconds']:,.0f} s" for name in ("queue", "stall")}
    bytes_moved = {name: format_bytes(row["moved_bytes"][key]) for name, key in moved.items()}
    return seconds | bytes_moved | {"ssd written a day": format_bytes(row["ssd_written_bytes_per_day"])}


def overloaded(runs: list[Run]) -> str | None:
    """What to say where answers were still being written long after the last prompt was read."""
    late = [run.counts.decoded - run.counts.ended for run in runs]
    many = sum(more > max(DRAIN, run.counts.ended / 4) for more, run in zip(late, runs, strict=True))
    if not many:
        return None
    hours = max(late) / SECONDS_AN_HOUR
    return (
        f"Overloaded, {many} of {len(runs)} runs: answers were still written {hours:,.1f} h after "
        "the last prompt was read. Requests come faster than they are decoded, so TPOT says little but how long "
        "the trace is: take a larger --device-memory (of all --servers together), or --attend for sparse attention."
    )


def table(runs: list[Run], varied: str | None, cells: Callable[[dict[str, Any]], dict[str, str]]) -> Table:
    """One line a run. varied: the setting of the machine that differs."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    pauses = len({run.pause for run in runs}) > 1
    heads = ([varied.replace("_", "-")] if varied else []) + (["pause"] if pauses else [])
    for name in (*heads, "policy", *cells(runs[0].as_dict())):
        shown.add_column(name, justify="left" if name == "policy" else "right", no_wrap=name in ("policy", *heads))
    for run in runs:
        value = getattr(run.machine, varied) if varied else None
        start = [] if value is None else [f"{value:,}" if varied in ("servers", "flops") else format_bytes(value)]
        start += [run.pause] if pauses else []
        shown.add_row(*start, run.policy, *cells(run.as_dict()).values())
    return shown
