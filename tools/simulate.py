"""``alaya-tiers simulate``: what a machine and a policy would make of a request trace, or of a described load."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import EVICTION, EvictionPolicy, Shares, Window, by_name
from alaya_tiers.tools import catalog, keeping, load, loadsteps, profile, rerun
from alaya_tiers.tools.described import described, machine_of, shares_of, swept
from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.limits import Future
from alaya_tiers.tools.prices import RENTED, Prices, prices
from alaya_tiers.tools.recorded import is_recording, open_recording
from alaya_tiers.tools.repeat import repeated
from alaya_tiers.tools.reporting import results
from alaya_tiers.tools.shapes import NAMED, Shape, shape_of
from alaya_tiers.tools.simulated import Run, hits, outcome, overloaded, table, traffic
from alaya_tiers.tools.simulator import Simulator
from alaya_tiers.tools.traces import FORMATS, Request, Trace, open_trace

QUICK = 500
POLICIES: dict[str, type[EvictionPolicy]] = {**EVICTION, "window": Window}
"""The engine's own; ``belady`` beside them is no policy but the limit."""
BELADY = "belady"


# ---------------------------------------------------------------------- the work
def simulate(
    trace: Trace,
    shape: Shape,
    machines: list[Machine],
    policies: list[str],
    slack: float,
    limit: int | None = None,
    progress: Progress | None = None,
    *,
    pauses: tuple[str, ...] = ("none",),
    any_pause: bool = False,
    shares: Shares | None = None,
    attend: float = 1.0,
    prices: Prices = RENTED,
) -> list[Run]:
    """All policies on all machines, in one pass over the trace (two with Belady or an oracle, which look ahead)."""

    def requests(what: str) -> Iterator[Request]:
        task = progress.add_task(what, total=None, at=0.0) if progress else None
        for number, request in enumerate(trace.requests()):
            if limit is not None and number >= limit:
                return
            if progress and task is not None and number % 64 == 0:
                progress.update(task, completed=number, at=request.time / 3600)
            yield request

    known: list[Future] = []

    def future() -> Future:
        known[:] = known or [Future(requests("looking ahead"))]
        return known[0]

    chosen: dict[str, EvictionPolicy | Future] = {n: by_name(POLICIES, n) for n in policies if n != BELADY}
    if BELADY in policies:
        chosen[BELADY] = future()
    runs = [
        (name, pause, machine, Simulator(
            machine, shape, trace.block_tokens, chosen[name], slack=slack, shares=shares, attend=attend,
            pauses=keeping.pauses(pause, machine, future), any_pause=any_pause,
        ))
        for machine in machines
        for pause in pauses
        for name in policies
    ]  # fmt: skip
    for request in requests("simulating"):
        for *_, simulator in runs:
            simulator.arrive(request)
    return [Run(name, machine, made.close(), prices, pause) for name, pause, machine, made in runs]


EPILOG = """
Examples:

[bold]alaya-tiers simulate chat.jsonl.xz --model llama-3.1-8b --policy lru,belady[/bold]

[bold]alaya-tiers simulate recorded.jsonl --profile here.toml --policy lru,scan --sweep "host-budget=8MiB,64MiB"[/bold]

[bold]alaya-tiers simulate load.toml --policy all --pause none,ttl:60,patience,oracle[/bold]

[bold]alaya-tiers simulate agents.tar.xz --sweep host-memory=16GiB,64GiB,256GiB --servers 4[/bold]
"""
HELP = "[dim]default: {}[/dim]"
USUAL, ALL = "lru,scan,belady", "all"


def command(
    traces: Annotated[
        list[Path],
        typer.Argument(
            help="Request traces of one format: .jsonl, .json, .tar; also .xz. Or a recorded one, or a load in .toml."
        ),
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
    device_read: Annotated[
        str | None, typer.Option(help="Of the device's memory, by decoding. " + HELP.format("1.6TB/s"))
    ] = None,
    servers: Annotated[int | None, typer.Option(help="Prompts computed at once. " + HELP.format(1))] = None,
    attend: Annotated[float, typer.Option(help="Share of the KV that a step of decoding reads.")] = 1.0,
    pause: Annotated[
        str, typer.Option(help=f"What becomes of contexts that wait: {', '.join(keeping.KINDS)}; several with commas.")
    ] = "none",
    any_pause: Annotated[
        bool, typer.Option("--any-pause", help="After every answer, not only while a tool runs.")
    ] = False,
    shares: Annotated[
        Path | None, typer.Option(help="A TOML file: what each category may have of the SSD: floor, most, ttl.")
    ] = None,
    price_of: Annotated[
        str | None, typer.Option("--prices", help="An hour, of a GiB and a server: device=0.02,host=0.003,server=1.")
    ] = None,
    session_gap: Annotated[float, typer.Option(help="Mean seconds between starts of sessions of agents.")] = 300.0,
    slack: Annotated[float, typer.Option(help="Share of a full tier that is freed at once.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of everything that is left to chance.")] = 0,
    repeat: Annotated[int, typer.Option(min=1, help="The trace so many times, each a little different.")] = 1,
    sample: Annotated[
        float, typer.Option(help="Of recorded or described steps, replay this share, in stretches; e.g. 0.01.")
    ] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many requests.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Only {QUICK} requests.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Simulates the tiers: on request traces, or on one that a cache recorded, with other settings.

    Of requests: time to first token, time per token, hits, bytes moved, price. Of a recorded run: TPOT, hits, bytes;
    --sweep takes settings of a cache then, e.g. "host-budget=64MiB,1GiB block-tokens=128,256".
    """
    known = None if profile_file is None else profile.load(profile_file, any_machine=any_machine)
    known = known if what_if is None else catalog.what_if(what_if)
    spec = load.read(traces[0]) if len(traces) == 1 and traces[0].suffix == ".toml" else None
    if spec is None and any(path.suffix == ".toml" for path in traces):
        raise ConfigError("a load that is described comes alone: give one .toml file, or traces")
    steps = spec is not None and spec.steps is not None
    if steps or (spec is None and len(traces) == 1 and is_recording(traces[0])):
        budgets = {"device_budget": device_memory, "host_budget": host_memory, "ssd_budget": ssd}
        fixed = {name: [rerun.setting(name, value)] for name, value in budgets.items() if value is not None}
        listed = [] if policy is None else list(EVICTION) if policy == ALL else policy.split(",")
        chosen = {"eviction": [rerun.setting("eviction", name) for name in listed]} if listed else {}
        usual = Settings(mode="sparse", index_budget=None)
        found = open_recording(traces[0]) if spec is None else loadsteps.recording(spec, shape_of(model), usual, seed)
        spread = chosen | fixed | rerun.sweeps(sweep)
        rerun.report(found, known or profile.TYPICAL, spread, as_json=as_json, sample=sample)
        return
    given = {
        "device_memory": device_memory, "host_memory": host_memory, "ssd": ssd, "ssd_read": ssd_read,
        "ssd_write": ssd_write, "pcie": pcie, "flops": flops, "device_read": device_read, "servers": servers,
    }  # fmt: skip
    shape = shape_of(model)
    settings = (
        ({} if known is None else known.machine(shape.layers))
        | described(machine)
        | {name: value for name, value in given.items() if value is not None}
    )
    asked = ",".join((*POLICIES, BELADY)) if policy == ALL else policy or USUAL
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    if unknown := [name for name in names if name not in (*POLICIES, BELADY)]:
        raise ConfigError(f"unknown policy {unknown[0]!r}; known are {', '.join([*sorted(POLICIES), BELADY])}")
    machines, console, began = swept(machine_of(settings), sweep), Console(stderr=True), time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} requests, {task.fields[at]:,.1f} h"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        trace = repeated(
            open_trace(traces, form, session_gap, seed) if spec is None else spec.trace(seed), repeat, seed
        )
        runs = simulate(
            trace, shape, machines, names, slack, QUICK if quick else limit, progress, attend=attend,
            pauses=tuple(one.strip() for one in pause.split(",")), any_pause=any_pause, shares=shares_of(shares),
            prices=prices(price_of, RENTED),
        )  # fmt: skip
    report: dict[str, Any] = {"traces": [str(p) for p in traces], "model": asdict(shape)}
    report |= {"token_bytes": shape.token_bytes, "block_tokens": trace.block_tokens, "seed": seed}
    report |= {"session_gap": session_gap, "slack": slack, "attend": attend, "repeat": repeat}
    varied = sweep.partition("=")[0].strip().replace("-", "_") if sweep else None
    tell(runs, report, time.perf_counter() - began, varied, as_json=as_json)


def tell(runs: list[Run], facts: dict[str, Any], wall: float, varied: str | None, *, as_json: bool) -> None:
    """Print what came out. facts: of all runs; wall: seconds it took; varied: the setting that was swept."""
    speed = {
        "wall_seconds": wall,
        "times_real_time": runs[0].counts.ended / wall,
        "times_real_time_a_run": sum(run.counts.ended for run in runs) / wall,
    }
    if as_json:
        print(json.dumps(facts | {"runs": [run.as_dict() for run in runs], "speed": speed}, indent=2))
        return
    out = results()
    for cells in (outcome, hits, traffic):
        out.print(table(runs, varied, cells))
        out.print()
    if (warning := overloaded(runs)) is not None:
        out.print(warning, style="yellow")
        out.print()
    first = runs[0].counts
    what = f"{first.requests:,} requests, {first.tokens:,} tokens, {format_bytes(facts['token_bytes'])} of KV each"
    times = f"{speed['times_real_time']:,.0f} times real time for all, {speed['times_real_time_a_run']:,.0f} a run"
    words = f"{facts['model']['name']}: {what}. {first.ended / 3600:,.1f} h in {wall:,.1f} s: {times}."
    out.print(words, style="dim")
