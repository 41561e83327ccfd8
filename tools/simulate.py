"""``alaya-tiers simulate``: what a machine and a policy would make of a request trace."""

import json
import re
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from alaya_tiers.config import format_bytes, parse_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import EVICTION, EvictionPolicy, Window, by_name
from alaya_tiers.tools import catalog, profile, rerun
from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.limits import Future
from alaya_tiers.tools.recorded import is_recording
from alaya_tiers.tools.shapes import NAMED, Shape, shape_of
from alaya_tiers.tools.simulator import TIERS, Counts, Simulator
from alaya_tiers.tools.traces import FORMATS, Request, Trace, open_trace

QUICK = 500
SECONDS_A_DAY = 86400
SIZES = ("device_memory", "host_memory", "ssd")
BYTE_RATES = ("ssd_read", "ssd_write", "pcie")
POLICIES: dict[str, type[EvictionPolicy]] = {**EVICTION, "window": Window}
"""The engine's own; ``belady`` beside them is no policy but the limit."""
BELADY = "belady"


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one machine, and what came out."""

    policy: str
    machine: Machine
    counts: Counts

    def as_dict(self) -> dict[str, Any]:
        """JSON values: bytes, seconds, tokens, shares."""
        counts = self.counts
        p50, p90, p99 = np.percentile(np.frombuffer(counts.ttft), [50, 90, 99]).tolist()
        hits = {tier: counts.hit_tokens[tier] / counts.tokens for tier in TIERS}
        return {
            "policy": self.policy,
            "machine": asdict(self.machine),
            "requests": counts.requests,
            "tokens": counts.tokens,
            "ttft_seconds": {"p50": p50, "p90": p90, "p99": p99, "mean": float(np.mean(np.frombuffer(counts.ttft)))},
            "hit_rate": hits | {"all": sum(hits.values())},
            "hit_tokens": counts.hit_tokens,
            "moved_bytes": counts.moved,
            "prefill_saved": 1 - counts.flops / counts.flops_without,
            "queue_seconds": counts.queue_seconds,
            "load_seconds": counts.load_seconds,
            "stall_seconds": counts.stall_seconds,
            "compute_seconds": counts.compute_seconds,
            "simulated_seconds": counts.ended,
            "ssd_written_bytes_per_day": counts.moved["host_to_ssd"] / counts.ended * SECONDS_A_DAY,
        }


# ---------------------------------------------------------------------- what is asked for
def rate(name: str, text: str | float) -> float:
    """``"3GB/s"`` in bytes a second, ``"150TFLOPS"`` in operations a second, or a plain number. Raises ConfigError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    if not isinstance(text, str):
        raise ConfigError(f"{name} is a number or a string such as '3GB/s', not {text!r}")
    if name in BYTE_RATES:
        return float(parse_bytes(text.strip().removesuffix("/s")))
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGTP]?)(FLOPS|FLOP/s)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"cannot read {text!r} as {name}; write e.g. '150TFLOPS'")
    return float(match[1]) * 1000.0 ** " KMGTP".index(match[2].upper() or " ")


def machine_of(values: dict[str, Any]) -> Machine:
    """A machine of sizes and rates in words. Raises ConfigError."""
    known = [f.name for f in fields(Machine)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"unknown settings {', '.join(unknown)} of a machine; known are {', '.join(known)}")
    readable: dict[str, Any] = {}
    for name, value in values.items():
        if name == "servers":
            if isinstance(value, str) and not value.strip().isdigit():
                raise ConfigError(f"servers is a number, got {value!r}")
            readable[name] = int(value) if isinstance(value, str) else value
        else:
            readable[name] = parse_bytes(value) if name in SIZES else rate(name, value)
    return Machine(**readable)


def described(path: Path | None) -> dict[str, Any]:
    """The settings of a machine's TOML file, or of parts that ``tools/catalog.py`` names. Raises ConfigError."""
    if path is None:
        return {}
    if not path.suffix and not path.exists():
        return catalog.machine(str(path))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read a machine from {path}: {error}") from error
    settings = data.get("machine", data)
    if not isinstance(settings, dict):
        raise ConfigError(f"cannot read a machine from {path}: [machine] must be a table")
    return {name.replace("-", "_"): value for name, value in settings.items()}


def swept(machine: Machine, sweep: str | None) -> list[Machine]:
    """The machine, or one for each value of ``name=value,value``. Raises ConfigError."""
    if sweep is None:
        return [machine]
    name, equals, values = sweep.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or name not in {f.name for f in fields(Machine)} or not all(v.strip() for v in values.split(",")):
        raise ConfigError(f"cannot read the sweep {sweep!r}; write e.g. host-memory=16GiB,64GiB")
    return [replace(machine, **{name: getattr(machine_of({name: v.strip()}), name)}) for v in values.split(",")]


# ---------------------------------------------------------------------- the work
def simulate(
    trace: Trace,
    shape: Shape,
    machines: list[Machine],
    policies: list[str],
    slack: float,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[Run]:
    """All policies on all machines, in one pass over the trace (two with Belady, which looks at the future first)."""

    def requests(what: str) -> Iterator[Request]:
        task = progress.add_task(what, total=None, at=0.0) if progress else None
        for number, request in enumerate(trace.requests()):
            if limit is not None and number >= limit:
                return
            if progress and task is not None and number % 64 == 0:
                progress.update(task, completed=number, at=request.time / 3600)
            yield request

    chosen: dict[str, EvictionPolicy | Future] = {n: by_name(POLICIES, n) for n in policies if n != BELADY}
    if BELADY in policies:
        chosen[BELADY] = Future(requests("looking ahead"))
    runs = [
        (name, machine, Simulator(machine, shape, trace.block_tokens, chosen[name], slack=slack))
        for machine in machines
        for name in policies
    ]
    for request in requests("simulating"):
        for _, _, simulator in runs:
            simulator.arrive(request)
    return [Run(name, machine, simulator.close()) for name, machine, simulator in runs]


EPILOG = """
Examples:

[bold]alaya-tiers simulate chat.jsonl.xz --model llama-3.1-8b --policy lru,belady[/bold]

[bold]alaya-tiers simulate recorded.jsonl --profile here.toml --policy lru,scan --sweep "host-budget=8MiB,64MiB"[/bold]

[bold]alaya-tiers simulate agents.tar.xz --sweep host-memory=16GiB,64GiB,256GiB --servers 4[/bold]
"""
HELP = "[dim]default: {}[/dim]"
USUAL, ALL = "lru,scan,belady", "all"


def command(
    traces: Annotated[
        list[Path],
        typer.Argument(help="Request traces of one format: .jsonl, .json, .tar; also .xz. Or a recorded one."),
    ],
    form: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "auto",
    model: Annotated[
        str, typer.Option(help=f"A config.json, its folder, or one of {', '.join(NAMED)}.")
    ] = "llama-3.1-8b",
    policy: Annotated[
        str | None,
        typer.Option(help=f"Of {', '.join([*POLICIES, BELADY])}, with commas, or {ALL}. {HELP.format(USUAL)}"),
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="One setting of the machine, e.g. host-memory=16GiB,64GiB.")] = None,
    machine: Annotated[
        Path | None, typer.Option(help="A TOML file with the settings below, or parts by name: h100-80+gen5-ssd.")
    ] = None,
    profile_file: Annotated[
        Path | None, typer.Option("--profile", help="Rates of a machine, by [bold]alaya-tiers profile[/bold].")
    ] = None,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="The profile may be another machine's.")] = False,
    what_if: Annotated[
        str | None, typer.Option(help=f"Instead of a profile, for recorded traces: {', '.join(catalog.PROFILES)}.")
    ] = None,
    device_memory: Annotated[str | None, typer.Option(help="For KV. " + HELP.format("24GiB"))] = None,
    host_memory: Annotated[str | None, typer.Option(help="For KV; 0 for none. " + HELP.format("64GiB"))] = None,
    ssd: Annotated[str | None, typer.Option(help="For KV; 0 for none. " + HELP.format("1TiB"))] = None,
    ssd_read: Annotated[str | None, typer.Option(help=HELP.format("3GB/s"))] = None,
    ssd_write: Annotated[str | None, typer.Option(help=HELP.format("1.5GB/s"))] = None,
    pcie: Annotated[str | None, typer.Option(help=HELP.format("25GB/s"))] = None,
    flops: Annotated[
        str | None, typer.Option(help="Really reached, of one server. " + HELP.format("150TFLOPS"))
    ] = None,
    servers: Annotated[int | None, typer.Option(help="Prompts computed at once. " + HELP.format(1))] = None,
    session_gap: Annotated[float, typer.Option(help="Mean seconds between starts of sessions of agents.")] = 300.0,
    slack: Annotated[float, typer.Option(help="Share of a full tier that is freed at once.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the starts of sessions.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many requests.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Only {QUICK} requests.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Simulates the tiers: on request traces, or on one that a cache recorded, with other settings.

    Of request traces: hits, time to first token, bytes moved. Of a recorded one: TPOT, hits, SSD bytes by phase;
    --sweep takes settings of a cache then, e.g. "host-budget=64MiB,1GiB block-tokens=128,256".
    """
    given = {
        "device_memory": device_memory, "host_memory": host_memory, "ssd": ssd, "ssd_read": ssd_read,
        "ssd_write": ssd_write, "pcie": pcie, "flops": flops, "servers": servers,
    }  # fmt: skip
    known = None if profile_file is None else profile.load(profile_file, any_machine=any_machine)
    known = known if what_if is None else catalog.what_if(what_if)
    if len(traces) == 1 and is_recording(traces[0]):
        budgets = {"device_budget": device_memory, "host_budget": host_memory, "ssd_budget": ssd}
        fixed = {name: [rerun.setting(name, value)] for name, value in budgets.items() if value is not None}
        listed = [] if policy is None else list(EVICTION) if policy == ALL else policy.split(",")
        chosen = {"eviction": [rerun.setting("eviction", name) for name in listed]} if listed else {}
        rerun.report(traces[0], known or profile.TYPICAL, chosen | fixed | rerun.sweeps(sweep), as_json=as_json)
        return
    settings = (
        ({} if known is None else known.machine())
        | described(machine)
        | {name: value for name, value in given.items() if value is not None}
    )
    asked = ",".join((*POLICIES, BELADY)) if policy == ALL else policy or USUAL
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    if unknown := [name for name in names if name not in (*POLICIES, BELADY)]:
        raise ConfigError(f"unknown policy {unknown[0]!r}; known are {', '.join([*sorted(POLICIES), BELADY])}")
    machines, shape = swept(machine_of(settings), sweep), shape_of(model)
    console, began = Console(stderr=True), time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} requests, {task.fields[at]:,.1f} h"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        trace = open_trace(traces, form, session_gap, seed)
        runs = simulate(trace, shape, machines, names, slack, QUICK if quick else limit, progress)
    wall = time.perf_counter() - began
    speed = {
        "wall_seconds": wall,
        "times_real_time": runs[0].counts.ended / wall,
        "times_real_time_a_run": sum(run.counts.ended for run in runs) / wall,
    }
    if as_json:
        report: dict[str, Any] = {
            "traces": [str(p) for p in traces],
            "model": asdict(shape),
            "token_bytes": shape.token_bytes,
        }
        report |= {"block_tokens": trace.block_tokens, "seed": seed, "session_gap": session_gap, "slack": slack}
        print(json.dumps(report | {"runs": [run.as_dict() for run in runs], "speed": speed}, indent=2))
        return
    out = Console()
    varied = sweep.partition("=")[0].strip().replace("-", "_") if sweep else None
    out.print(table(runs, varied, outcome))
    out.print()
    out.print(table(runs, varied, traffic))
    first = runs[0].counts
    what = f"{first.requests:,} requests, {first.tokens:,} tokens, {format_bytes(shape.token_bytes)} of KV each"
    times = f"{speed['times_real_time']:,.0f} times real time for all, {speed['times_real_time_a_run']:,.0f} a run"
    out.print(f"\n{shape.name}: {what}. {first.ended / 3600:,.1f} h in {wall:,.1f} s: {times}.", style="dim")


def outcome(row: dict[str, Any]) -> dict[str, str]:
    """What a user of the machine sees."""
    ttft = {f"TTFT {name}": f"{seconds:,.2f} s" for name, seconds in row["ttft_seconds"].items() if name != "mean"}
    hits = {f"{tier} hits": f"{row['hit_rate'][tier]:.1%}" for tier in TIERS}
    return ttft | hits | {"saved": f"{row['prefill_saved']:.1%}"}


def traffic(row: dict[str, Any]) -> dict[str, str]:
    """What the machine had to do."""
    moved = {"ssd read": "ssd_to_host", "to device": "host_to_device", "to host": "device_to_host"}
    seconds = {name: f"{row[f'{name}_seconds']:,.0f} s" for name in ("queue", "stall")}
    bytes_moved = {name: format_bytes(row["moved_bytes"][key]) for name, key in moved.items()}
    return seconds | bytes_moved | {"ssd written a day": format_bytes(row["ssd_written_bytes_per_day"])}


def table(runs: list[Run], varied: str | None, cells: Callable[[dict[str, Any]], dict[str, str]]) -> Table:
    """One line a run."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    heads = [varied.replace("_", "-")] if varied else []
    for name in (*heads, "policy", *cells(runs[0].as_dict())):
        shown.add_column(name, justify="left" if name == "policy" else "right", no_wrap=name in ("policy", *heads))
    for run in runs:
        value = getattr(run.machine, varied) if varied else None
        start = [] if value is None else [f"{value:,}" if varied in ("servers", "flops") else format_bytes(value)]
        shown.add_row(*start, run.policy, *cells(run.as_dict()).values())
    return shown
