"""``alaya-tiers bench io``: cold reads and writes through our own SSD tier, and what write-behind costs a prefill.

The tier moves blocks the way the engine has it do: jobs of coalesced extents on a pool of threads, two batches on their
way, straight into slots, every block compared with its digest. Beside it the same requests are made by nothing but
preadv and pwritev on as many threads (and by fio where it is installed), by turns, in the same run.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.tools import machine, rawdisk, reporting
from alaya_tiers.tools.baselines import VOCABULARY, Shape, build_model
from alaya_tiers.tools.bench import BUSY
from alaya_tiers.tools.machine import CpuUse
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, show
from alaya_tiers.tools.transfers import AT_RANDOM, HUGE, Say, Transfer, transfers

KIB, MIB = 1 << 10, 1 << 20
READ_FLOOR, WRITE_FLOOR = 0.7, 0.2
"""Cold reads against plain ones; slowdown of a prefill by write-behind."""

KEPT, BEHIND, SPILLED = "all in memory", "written behind, all kept in memory", "host budget a quarter of the KV"


@dataclass(slots=True)
class Prefill:
    """One way to read a prompt: seconds of each round, and of the last: bytes written and read, seconds waited."""

    name: str
    seconds: list[float] = field(default_factory=list)
    written: int = 0
    read: int = 0
    waited: float = 0.0
    stalled: float = 0.0


@dataclass(slots=True)
class Found:
    """All that was measured."""

    machine: dict[str, Any]
    direct: bool
    transfers: list[Transfer] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    tokens: int = 0
    cpu_of_others: float = 0.0

    def slowdown(self, prefill: Prefill) -> float:
        """How much longer than with everything in memory, as a share; the median of the rounds."""
        kept = self.prefills[0]
        return statistics.median(a / b for a, b in zip(prefill.seconds, kept.seconds, strict=True)) - 1

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        reads = [t for t in self.transfers if t.what == AT_RANDOM]
        return {
            "benchmark": "io",
            "machine": self.machine,
            "cpu_of_others": self.cpu_of_others,
            "direct_io": self.direct,
            "transfers": [asdict(t) | {"ratio": t.ratio} for t in self.transfers],
            "prefill_tokens": self.tokens,
            "prefills": [asdict(p) | {"slowdown": self.slowdown(p)} for p in self.prefills],
            "floors": {
                "reads": {"value": min((t.ratio for t in reads), default=None), "floor": READ_FLOOR},
                "write_behind": {"value": max(map(self.slowdown, self.prefills), default=None), "floor": WRITE_FLOOR},
            },
        }


# ---------------------------------------------------------------------- write-behind
@torch.no_grad()
def prefills(directory: Path, shape: Shape, tokens: int, chunk: int, rounds: int, say: Say) -> list[Prefill]:
    """The same prompt with everything in memory, with all of it written behind, and with too little memory for it."""
    model: Any = build_model(shape, tokens + 1)
    model.set_attn_implementation("alaya")
    kv, ids = tokens * shape.token_bytes, torch.arange(tokens)[None] % VOCABULARY
    run = 256 * shape.layer_token_bytes
    device = 2 * shape.layers * run
    settings: dict[str, dict[str, Any]] = {
        KEPT: {"host_budget": 2 * kv, "dirty_limit": 1.0},
        BEHIND: {"host_budget": 2 * kv, "dirty_limit": 0.0},
        SPILLED: {"host_budget": max(4 * run, kv // 4)},
    }
    found = [Prefill(name) for name in settings]
    for number in range(rounds):
        for prefill in found:
            say(f"prefill, {prefill.name}, {number + 1} of {rounds}")
            path = directory / f"prefill-{number}-{len(prefill.name)}"
            with AlayaCache(config=model.config, device_budget=device, path=path, **settings[prefill.name]) as cache:
                began = time.perf_counter()
                for start in range(0, tokens, chunk):
                    model.base_model(input_ids=ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
                prefill.seconds.append(time.perf_counter() - began)
                stats = cache.stats()
                prefill.written, prefill.read = stats.written_bytes, stats.read_bytes
                prefill.waited, prefill.stalled = stats.waited_seconds, stats.stalled_seconds
    return found


# ---------------------------------------------------------------------- reports
def run(
    sizes: list[int], depths: list[int], nbytes: int, rounds: int, tokens: int, shape: Shape, directory: str | None,
    say: Say,
) -> Found:  # fmt: skip
    """Measure everything. Raises ConfigError, StoreError, OSError."""
    began, parent = CpuUse.now(), directory or os.environ.get("ALAYA_TIERS_DIR")
    with tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=parent) as folder:
        with rawdisk.disk_file(Path(folder), MIB) as file:
            direct = file.direct
        found = Found(machine.describe(), direct, tokens=tokens)
        found.transfers = list(transfers(Path(folder), sizes, depths, nbytes, rounds, direct=direct, say=say))
        if tokens:
            found.prefills = prefills(Path(folder), shape, tokens, min(512, tokens), rounds, say)
    found.cpu_of_others = CpuUse.now().others_since(began)
    return found


def tables(found: Found) -> Iterator[Table]:
    """What was found, for people."""
    made = Table(title="cold blocks: ours against plain preadv and pwritev, MB/s", title_justify="left")
    for name in ("", "size", "depth", "ours", "plain", "ratio"):
        made.add_column(name, justify="right")
    for t in sorted(found.transfers, key=lambda t: (t.what, t.size, t.depth)):
        ours, theirs = (f"{statistics.median(rates) / 1e6:,.0f}" for rates in (t.ours, t.plain))
        made.add_row(t.what, format_bytes(t.size), str(t.depth), ours, theirs, f"{t.ratio:.2f}")
    facts, busy = found.machine, f"others took {found.cpu_of_others:.0%} of the cores"
    io = "O_DIRECT" if found.direct else "through the page cache"
    made.caption, made.caption_justify = f"{facts['cpu']}, {facts['cores']} cores; {io}; {busy}.", "left"
    if found.cpu_of_others > BUSY:
        made.caption += " Repeat on a quiet machine."
    yield made
    if found.prefills:
        yield _prefill_table(found)
    floors = Table("floor", "value", "asked for", title="floors", title_justify="left")
    reads = [t.ratio for t in found.transfers if t.what == AT_RANDOM]
    if reads:
        floors.add_row(
            "cold reads at random against plain ones, the worst", f"{min(reads):.2f}", f"{READ_FLOOR:g} or more"
        )
    for prefill in found.prefills[1:]:
        floors.add_row(f"slowdown: {prefill.name}", f"{found.slowdown(prefill):.0%}", f"{WRITE_FLOOR:.0%} or less")
    yield floors


def _prefill_table(found: Found) -> Table:
    made = Table(title=f"prefill of {found.tokens:,} tokens", title_justify="left")
    for name in ("", "s", "slower by", "written", "read", "waited s", "stalled s"):
        made.add_column(name, justify="right")
    for p in found.prefills:
        made.add_row(
            p.name, f"{statistics.median(p.seconds):.2f}", f"{found.slowdown(p):.1%}", format_bytes(p.written),
            format_bytes(p.read), f"{p.waited:.2f}", f"{p.stalled:.2f}",
        )  # fmt: skip
    return made


def plot(found: Found, path: Path) -> None:
    """Bytes a second over block size, ours and plain, for each depth. Needs matplotlib."""
    pyplot = reporting.pyplot()
    figure, axes = pyplot.subplots()
    for color, depth in enumerate(sorted({t.depth for t in found.transfers})):
        some = [t for t in found.transfers if t.depth == depth and t.what == AT_RANDOM]
        for name, style in (("ours", "-"), ("plain", "--")):
            values = [statistics.median(getattr(t, name)) / 1e6 for t in some]
            label = f"{name}, depth {depth}"
            axes.loglog([t.size / KIB for t in some], values, style, marker="o", color=f"C{color}", label=label)
    axes.set(xlabel="KiB a block", ylabel="MB/s, cold, at random")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def command(
    sizes: Annotated[str, typer.Option(help="Block sizes in KiB.")] = "4,16,64,256,1024",
    depths: Annotated[str, typer.Option(help="Requests at a time: threads.")] = "1,4,16",
    mib: Annotated[int, typer.Option(help="MiB to move in each measurement, at most.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often, by turns.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt; 0 leaves the prefill out.")] = 4096,
    layers: int = 8,
    hidden: int = 512,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 64,
    directory: Annotated[str | None, typer.Option("--dir", help="A directory on the disk to measure.")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    quick: Annotated[bool, typer.Option(help="Shows that it runs, measures nothing.")] = False,
) -> None:
    """Cold reads and writes of blocks against plain ones; what write-behind costs a prefill."""
    errors = Console(stderr=True)
    with one_line_errors(errors):
        need_matplotlib(plot_file)
        numbers = [_numbers("--sizes", sizes), _numbers("--depths", depths)]
        if any(size % 4 for size in numbers[0]):
            raise ConfigError("--sizes are multiples of 4 KiB, a page")
        if max(numbers[0]) > HUGE // KIB:
            raise ConfigError(f"--sizes are at most {HUGE // KIB} KiB")
        if min(mib, rounds) < 1 or tokens < 0 or max(numbers[0]) > mib * KIB:
            raise ConfigError("--mib, --rounds and --tokens must be positive, and a block must fit into --mib")
        shape = Shape(layers, hidden, heads, kv_heads, head_dim, "fp32")
        if quick:
            mib, rounds, tokens = 1, 1, min(tokens, 512)
        with errors.status("disk") as status:
            wanted = [size * KIB for size in numbers[0]]
            found = run(wanted, numbers[1], mib * MIB, rounds, tokens, shape, directory, status.update)
        if plot_file is not None:
            plot(found, plot_file)
    show(tables(found), found.as_dict(), json_file)


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"{option} is a list of numbers, such as 4,16,64; not {text!r}") from error
    if found[0] < 1:
        raise ConfigError(f"{option} must be positive")
    return found
