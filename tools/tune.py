"""``alaya-tiers tune``: the cheapest settings that meet a target, or the fastest for a price, by simulation."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.errors import BudgetTooSmall, ConfigError, OutOfSpace
from alaya_tiers.policies import EVICTION, GUESS, PREFETCH, UNSEEN, Watermark, by_name
from alaya_tiers.tools import profile, search, toml
from alaya_tiers.tools.described import described, machine_of
from alaya_tiers.tools.events import Cut, Fork, Layer, Own, Put
from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.prices import Prices, prices
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.recorded import Recording, is_recording, open_recording
from alaya_tiers.tools.replay import Replay
from alaya_tiers.tools.reporting import need_matplotlib, out_file, place, pyplot, results
from alaya_tiers.tools.search import Outcome, Point, Space, Target, Trial
from alaya_tiers.tools.shapes import NAMED, Shape, shape_of
from alaya_tiers.tools.simulate import POLICIES
from alaya_tiers.tools.simulator import TIERS, Simulator
from alaya_tiers.tools.traces import FORMATS, Trace, open_trace

SHARES = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Of the KV: what host budgets are tried."""

UNMET = 1
SHOWN = 8


class OfRun:
    """Recorded runs, one for each alpha and number of bits that is to be chosen from, replayed with other settings."""

    unit = "TPOT"

    def __init__(self, recordings: list[Recording], known: Profile, prices: Prices) -> None:
        self.recordings, self._known, self._prices = recordings, known, prices
        self.kv_bytes = max(1, _kv_bytes(recordings[0]))

    def space(self) -> Space:
        """What is chosen from."""
        exact = self.recordings[0].settings.mode == "exact"
        return {
            "recording": tuple(range(len(self.recordings))),
            "host": SHARES,
            "block_tokens": (64, 128, 256, 512),
            "eviction": tuple(EVICTION),
            "segment_tokens": (2048, 8192, 32768),
            "prefetch": tuple(PREFETCH) if exact else ("none",),
            "prefetch_share": (0.125, 0.25, 0.5),
            "page_share": (0.0,) if exact else (0.0, 0.5, 0.75),
            "guess": ("none",) if exact else tuple(name for name in GUESS if name not in UNSEEN),
            "dirty_limit": (0.25, 0.5, 0.75),
            "batch_bytes": (2 << 20, 8 << 20),
        }

    def default(self) -> Point:
        """The defaults of ``Settings``, with the host budget the run was recorded with."""
        s, share = Settings(), self.recordings[0].settings.host_budget / self.kv_bytes
        near = min(SHARES, key=lambda one: abs(one - share))
        same = ("block_tokens", "segment_tokens", "prefetch", "page_share", "guess", "dirty_limit")
        names = {name: getattr(s, name) for name in same}
        space = self.space()
        rest = {"prefetch_share": s.prefetch_share, "batch_bytes": s.batch_bytes}
        names["eviction"] = self.recordings[0].settings.replace(eviction="auto").eviction_of_blocks
        point = {"recording": 0, "host": near} | names | rest
        return {name: value if value in space[name] else space[name][0] for name, value in point.items()}

    def settings(self, point: Point) -> Settings:
        """Of a cache."""
        changes = {name: value for name, value in point.items() if name not in ("recording", "host")}
        base = self.recordings[point["recording"]].settings
        if not point["page_share"]:  # no room for what would be guessed
            changes["guess"] = "none"
        block = point["block_tokens"] / base.block_tokens
        device = int(max(base.device_budget, base.device_budget * block))
        return base.replace(host_budget=int(point["host"] * self.kv_bytes), device_budget=device, **changes)

    def evaluate(self, point: Point) -> Outcome:
        """TPOT at the median of the last phase."""
        settings = self.settings(point)
        replay = Replay(self.recordings[point["recording"]], settings, self._known)
        try:
            phases = replay.run()
        except (BudgetTooSmall, OutOfSpace) as error:
            return Outcome(0.0, 0.0, missing=str(error))
        last = phases[-1]
        on_disk = sum(phase.written_bytes for phase in phases)
        price = self._prices.of(settings.device_budget, settings.host_budget + replay.index_bytes, on_disk)
        mass = last.mass / last.sparse_reads if last.sparse_reads else 1.0
        facts = {
            "hits": f"{last.hit_rate:.1%}",
            "SSD a token": format_bytes(last.read_bytes / max(1, len(last.steps))),
            "mass": f"{mass:.4f}",
        }
        return Outcome(price, last.tpot if last.steps else last.seconds, mass, facts)

    def shown(self, point: Point) -> dict[str, str]:
        """For tables."""
        settings = self.settings(point)
        told = {"host": format_bytes(settings.host_budget), "alpha": f"{settings.alpha:g}"}
        told["bits"] = str(settings.index_bits)
        rest = tuple(name for name in point if name not in ("recording", "host", "batch_bytes"))
        return told | {name.replace("_", " "): str(point[name]) for name in rest}

    def file(self, point: Point) -> dict[str, Any]:
        """Settings for a file: what differs from the defaults."""
        settings, usual = self.settings(point), Settings()
        if settings.index_budget is None:  # which a file cannot say; codes are always less than what they are of
            settings = settings.replace(index_budget=self.kv_bytes)
        names = Settings.__dataclass_fields__
        return {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(usual, name)}


class OfRequests:
    """A request trace on a described machine; TTFT at the 90th percentile."""

    unit = "TTFT p90"

    def __init__(self, trace: Trace, shape: Shape, machine: Machine, prices: Prices, limit: int | None) -> None:
        self._trace, self._shape, self.machine, self._prices, self._limit = trace, shape, machine, prices, limit

    def space(self) -> Space:
        """What is chosen from: the host's and the ssd's size, the policy, what is freed and written at once."""
        host = tuple(int(self.machine.host_memory * share) for share in (0.25, 0.5, 1, 2, 4))
        ssd = tuple(sorted({max(int(self.machine.ssd * share), host[-1]) for share in (0.125, 0.25, 0.5, 1)}))
        return {
            "host_memory": host,
            "ssd": ssd,
            "eviction": tuple(EVICTION),
            "slack": (0.0, 0.01, 0.05),
            "dirty_limit": (0.25, 0.5, 0.75),
        }

    def default(self) -> Point:
        """The defaults of ``Settings``, on the machine as described."""
        s, space = Settings(), self.space()
        return {
            "host_memory": self.machine.host_memory, "ssd": space["ssd"][-1], "eviction": s.eviction_of_blocks,
            "slack": 0.01, "dirty_limit": s.dirty_limit,
        }  # fmt: skip

    def evaluate(self, point: Point) -> Outcome:
        """The whole trace, or the first requests of it."""
        machine = replace(self.machine, host_memory=point["host_memory"], ssd=point["ssd"])
        made = Simulator(
            machine, self._shape, self._trace.block_tokens, by_name(POLICIES, point["eviction"]),
            write=Watermark(point["dirty_limit"]), slack=point["slack"],
        )  # fmt: skip
        try:
            for number, request in enumerate(self._trace.requests()):
                if self._limit is not None and number >= self._limit:
                    break
                made.arrive(request)
        except ConfigError as error:  # more requests wait than any user would
            return Outcome(0.0, 0.0, missing=str(error))
        counts = made.close()
        hits = sum(counts.hit_tokens[tier] for tier in TIERS) / counts.tokens
        facts = {"hits": f"{hits:.1%}", "saved": f"{1 - counts.flops / counts.flops_without:.1%}"}
        seconds = float(np.percentile(np.frombuffer(counts.ttft), 90))
        price = self._prices.of(machine.device_memory, machine.host_memory, machine.ssd)
        return Outcome(price, seconds, 1.0, facts)

    def shown(self, point: Point) -> dict[str, str]:
        """For tables."""
        sizes = {name: format_bytes(point[name]) for name in ("host_memory", "ssd")}
        rest = {name: str(point[name]) for name in ("eviction", "slack", "dirty_limit")}
        return {name.replace("_", " "): value for name, value in (sizes | rest).items()}

    def file(self, point: Point) -> dict[str, Any]:
        """Settings for a file."""
        return {
            "device_budget": self.machine.device_memory, "host_budget": point["host_memory"],
            "ssd_budget": point["ssd"], "eviction": point["eviction"], "dirty_limit": point["dirty_limit"],
        }  # fmt: skip


def _kv_bytes(recording: Recording) -> int:
    """The most KV that sessions held at once; forks, which share it, do not count."""
    sizes: dict[int, int] = {}
    layer: dict[int, int] = {}
    held: dict[int, int] = {}
    most = 0
    for event in recording.events():
        match event:
            case Layer():
                sizes[event.number] = event.geometry.token_bytes
            case Fork():
                layer[event.x] = -1
            case Own() if event.x not in layer:
                layer[event.x], held[event.x] = event.layer, event.tokens
            case Put() if event.x in held:
                held[event.x] += event.tokens
                most = max(most, sum(tokens * sizes[layer[x]] for x, tokens in held.items()))
            case Cut() if event.x in held:
                held[event.x] = min(held[event.x], event.tokens)
            case _:
                pass
    return most


# ---------------------------------------------------------------------- the command
EPILOG = """
Examples:

[bold]alaya-tiers tune trace.jsonl --profile here.toml --tpot 20ms -o settings.toml --plot front.png[/bold]

[bold]alaya-tiers tune chat.jsonl.xz --model llama-3.1-8b --ttft 2s --limit 2000[/bold]
"""


def seconds(name: str, text: str | None) -> float | None:
    """``"50ms"`` or ``"2s"``. Raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", text.strip())
    if match is None:
        raise ConfigError(f"cannot read {text!r} as {name}; write e.g. 50ms or 2s")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def command(
    traces: Annotated[list[Path], typer.Argument(help="Recorded traces, one for each alpha and bits; or of requests.")],
    tpot: Annotated[str | None, typer.Option(help="Recorded traces: at most so long for a token, e.g. 50ms.")] = None,
    ttft: Annotated[str | None, typer.Option(help="Request traces: 90 % of first tokens within, e.g. 2s.")] = None,
    price: Annotated[
        float | None, typer.Option(help="Without such a target: the fastest for at most this price.")
    ] = None,
    quality: Annotated[float, typer.Option(help="Least share of attention recovered, in sparse mode.")] = 0.0,
    price_of: Annotated[str | None, typer.Option("--prices", help="Of a GiB: device=10,host=1,ssd=0.02")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Points to try.")] = 40,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Try every point.")] = False,
    profile_file: Annotated[Path | None, typer.Option("--profile", help="Of the machine.")] = None,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="The profile may be another machine's.")] = False,
    machine: Annotated[Path | None, typer.Option(help="Request traces: a TOML file, as of simulate.")] = None,
    model: Annotated[str, typer.Option(help=f"Request traces: a config.json, or {', '.join(NAMED)}.")] = "llama-3.1-8b",
    form: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Request traces: only so many requests.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    output: Annotated[Path | None, out_file("Write the settings as TOML.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw price against time as PNG; needs matplotlib.", callback=place)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All trials as JSON on stdout.")] = False,
) -> None:
    """Searches settings by simulation: the cheapest that meet a target, or the fastest for a price.

    Exits with 1 if nothing meets it.
    """
    need_matplotlib(plot)
    known = None if profile_file is None else profile.load(profile_file, any_machine=any_machine)
    subject: OfRun | OfRequests
    if is_recording(traces[0]):
        if ttft is not None:
            raise ConfigError("--ttft is for request traces; a recorded run has --tpot")
        subject = OfRun([open_recording(path) for path in traces], known or profile.TYPICAL, prices(price_of))
    else:
        if tpot is not None:
            raise ConfigError("--tpot is for recorded traces; requests have --ttft")
        shape = shape_of(model)
        rates = ({} if known is None else known.machine(shape.layers)) | described(machine)
        subject = OfRequests(open_trace(traces, form), shape, machine_of(rates), prices(price_of), limit)
    target = Target(seconds("--tpot", tpot) or seconds("--ttft", ttft), quality, price)
    with Console(stderr=True).status("") as status:
        found = tuned(
            subject, target, trials, seed, exhaustive=exhaustive,
            say=lambda n, score: status.update(f"{n} settings tried, best score {score:.4g}"),
        )  # fmt: skip
    winner, usual = search.best(found), next(t for t in found if t.point == subject.default())
    if output is not None:
        write(output, subject, winner)
    if plot is not None:
        draw(plot, subject, found, winner, usual, target)
    met = target.met(winner.outcome)
    if as_json:
        print(json.dumps(as_dict(subject, target, found), indent=2))
    else:
        out = results()
        out.print(table(subject, found, winner, usual))
        tried = f"{len(found)} of {search.size(subject.space()):,} settings tried"
        out.print(f"\n{tried}{'' if output is None else f'; the best are in {output}'}", style="dim")
        if not met:
            out.print("[bold red]none meets the target[/bold red]: the first line comes nearest")
    if not met:
        raise typer.Exit(UNMET)


def tuned(
    subject: OfRun | OfRequests,
    target: Target,
    trials: int,
    seed: int,
    *,
    exhaustive: bool = False,
    say: Callable[[int, float], None] = lambda n, best: None,
) -> list[Trial]:
    """All that was tried, the defaults among them."""
    if exhaustive:
        return search.exhaustive(subject.space(), target, subject.evaluate, say)
    return search.search(subject.space(), target, subject.evaluate, trials, seed, [subject.default()], say)


def write(path: Path, subject: OfRun | OfRequests, trial: Trial) -> None:
    """The settings, as ``Settings.from_toml`` reads them. Raises ConfigError."""
    o = trial.outcome
    note = f"found by alaya-tiers tune: {subject.unit} {o.seconds * 1e3:.1f} ms, price {o.price:.3g}"
    try:
        path.write_text(toml.text({"alaya_tiers": subject.file(trial.point)}, note), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write settings to {path}: {error}") from error


def as_dict(subject: OfRun | OfRequests, target: Target, trials: list[Trial]) -> dict[str, Any]:
    """JSON values."""

    def one(trial: Trial) -> dict[str, Any]:
        o = trial.outcome
        values = {"price": o.price, "seconds": o.seconds, "quality": o.quality, "missing": o.missing}
        return {"point": trial.point} | values | {"met": target.met(o)}

    usual = next(t for t in trials if t.point == subject.default())
    ordered = sorted(trials, key=lambda t: t.score)
    return {
        "unit": subject.unit,
        "space": {name: list(values) for name, values in subject.space().items()},
        "best": one(search.best(trials)) | {"settings": subject.file(search.best(trials).point)},
        "default": one(usual),
        "front": [one(t) for t in search.front(trials, target.quality)],
        "trials": [one(t) for t in ordered],
    }


def table(subject: OfRun | OfRequests, trials: list[Trial], winner: Trial, usual: Trial) -> Table:
    """The best, those on the front, and the defaults."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    others = [t for t in search.front(trials) if t is not winner and t is not usual]
    rows = [(winner, "best"), *((t, "front") for t in others[: SHOWN - 2]), (usual, "defaults")]
    told = [subject.shown(trial.point) for trial, _ in rows]
    names = [name for name in told[0] if len({one[name] for one in told}) > 1]
    facts = list(winner.outcome.facts)
    for name in ("", *names, subject.unit, "price", *facts):
        shown.add_column(name, justify="right" if name else "left")
    for (trial, what), one in zip(rows, told, strict=True):
        o = trial.outcome
        cells = [what, *(one[name] for name in names), f"{o.seconds * 1e3:,.1f} ms", f"{o.price:,.3g}"]
        shown.add_row(*cells, *(str(o.facts.get(f, "–")) for f in facts), style="green" if trial is winner else None)
    return shown


def draw(
    path: Path, subject: OfRun | OfRequests, trials: list[Trial], winner: Trial, usual: Trial, target: Target
) -> None:
    """Price against seconds of all trials. Needs matplotlib."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    working = [t for t in trials if t.outcome.missing is None]
    axes.scatter([t.outcome.price for t in working], [t.outcome.seconds for t in working], s=14, c="0.7", label="tried")
    best = search.front(trials, target.quality)
    axes.step(
        [t.outcome.price for t in best], [t.outcome.seconds for t in best], where="post", marker="o", label="front"
    )
    for trial, name, marker in ((usual, "defaults", "X"), (winner, "best", "*")):
        if trial.outcome.missing is None:
            axes.scatter([trial.outcome.price], [trial.outcome.seconds], s=140, marker=marker, label=name, zorder=3)
    if target.seconds is not None:
        axes.axhline(target.seconds, ls="--", c="tab:red", lw=1, label="target")
    axes.set(xlabel="price", ylabel=f"{subject.unit}, s", yscale="log", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
