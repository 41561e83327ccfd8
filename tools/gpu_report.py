"""What `alaya-tiers bench gpu` finds: as values, tables and a picture."""

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from alaya_tiers.tools import reporting
from alaya_tiers.tools.baselines import Shape

REFERENCE = "full, GPU"
WAYS = (REFERENCE, "offloaded", "ours, GPU", "ours, host", "ours, ssd")


@dataclass(slots=True)
class Decode:
    """One way to decode over one context. seconds: of each step but the first; peak: bytes of GPU memory at most."""

    name: str
    tokens: int
    fill: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    attended: float | None = None
    """Share of the tokens that were attended and not estimated."""
    waits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Calls of CUDA in a step, by name: how often, and seconds."""
    skipped: str | None = None

    @property
    def median(self) -> float:
        """Of the steps."""
        return statistics.median(self.seconds)


@dataclass(slots=True)
class Found:
    """All that was measured."""

    shape: Shape
    place: str
    machine: dict[str, Any]
    copies: dict[str, float] = field(default_factory=dict)
    """Bytes a second."""
    decode: list[Decode] = field(default_factory=list)
    first: list[dict[str, Any]] = field(default_factory=list)
    prefill: dict[str, float] = field(default_factory=dict)
    """Tokens a second."""
    kernels: list[dict[str, Any]] = field(default_factory=list)
    """Bytes each must move, and seconds of a launch; the first is a plain copy."""
    quality: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def put(self, kind: str, result: Any) -> None:
        """One result more: of a list, or some of a mapping."""
        mine = getattr(self, kind)
        if isinstance(mine, dict):
            mine.update(result)
        else:
            mine.extend(result) if isinstance(result, list) else mine.append(result)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"benchmark": "gpu", **asdict(self)}


def tables(found: Found) -> list[Table]:
    """What people read."""
    bus = Table(title="copies between host and device")
    for name in ("", "GB/s", "of the bus"):
        bus.add_column(name, justify="left" if not name else "right")
    for name, rate in found.copies.items():
        limit = found.copies.get("bus, up" if name.endswith("up") else "bus, down", rate)
        bus.add_row(name, f"{rate / 1e9:.1f}", f"{rate / limit:.2f}")
    memory = Table(title="kernels against a copy in the same memory")
    for name in ("", "GB/s", "of the copy", "us"):
        memory.add_column(name, justify="left" if not name else "right")
    for each in found.kernels:
        rate = each["nbytes"] / each["seconds"]
        limit = found.kernels[0]["nbytes"] / found.kernels[0]["seconds"]
        memory.add_row(each["kernel"], f"{rate / 1e9:.0f}", f"{rate / limit:.2f}", f"{1e6 * each['seconds']:.0f}")
    steps = Table(title="a decode step, ms (of full attention in GPU memory)")
    steps.add_column("tokens", justify="right")
    for way in WAYS:
        steps.add_column(way, justify="right")
    for tokens in sorted({each.tokens for each in found.decode}):
        by_way = {each.name: each for each in found.decode if each.tokens == tokens}
        steps.add_row(f"{tokens:,}", *(_cell(by_way, way) for way in WAYS))
    rest = Table(title="first token, prefill, quality")
    for name in ("", "", ""):
        rest.add_column(name)
    for each in found.first:
        for name, seconds in each["seconds"].items():
            rest.add_row(f"first token, {each['tokens']:,} tokens", name, f"{seconds:.2f} s")
    for name, rate in found.prefill.items():
        rest.add_row("prefill", name, f"{rate:,.0f} tokens/s")
    for each in found.quality:
        told = f"loss {each['loss']:.4f}, {each['right']} of {each['answers']} right"
        rest.add_row(f"{each['task']}, {each['tokens']:,} tokens", each["way"], told)
    return [bus, memory, steps, _closely(found), rest]


def _closely(found: Found) -> Table:
    """What a step attended, took of GPU memory, and waited."""
    table = Table(title="in a decode step")
    for name in ("tokens", "", "attended", "GPU memory, GiB", "waits", "ms waited"):
        table.add_column(name, justify="left" if not name else "right")
    for each in found.decode:
        waits = [call for name, call in each.waits.items() if "Synchronize" in name]
        calls, seconds = (sum(call[what] for call in waits) for what in ("calls", "seconds"))
        attended = "all" if each.attended is None else f"{each.attended:.2%}"
        row = (
            f"{each.tokens:,}",
            each.name,
            attended,
            f"{each.peak / 2**30:.1f}",
            f"{calls:.0f}",
            f"{1e3 * seconds:.2f}",
        )
        if each.seconds:
            table.add_row(*row)
    return table


def _cell(by_way: dict[str, Decode], way: str) -> str:
    each, reference = by_way.get(way), by_way.get(REFERENCE)
    if each is None or not each.seconds:
        return "-"
    share = f" ({each.median / reference.median:.2f})" if reference is not None and reference.seconds else ""
    return f"{1e3 * each.median:.2f}{share}"


def plot(found: Found, path: Path) -> None:
    """Decode steps over context lengths, and copies beside the bus. Needs matplotlib."""
    pyplot = reporting.pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for way in WAYS:
        points = [(each.tokens, 1e3 * each.median) for each in found.decode if each.name == way and each.seconds]
        if points:
            left.plot(*zip(*points, strict=True), "o-", label=way)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms a step", title="decode")
    if left.lines:
        left.legend()
    right.barh(list(found.copies), [rate / 1e9 for rate in found.copies.values()])
    right.set(xlabel="GB/s", title="copies")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
