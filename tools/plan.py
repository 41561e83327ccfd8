"""``alaya-tiers plan``: will a context fit, what goes where, and what to expect, before anybody loads a model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alaya_tiers.config import Settings, format_bytes, parse_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import catalog, profile, toml
from alaya_tiers.tools.baselines import parse_contexts
from alaya_tiers.tools.costs import CODE_SHARE, DTYPES, Costs
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.reporting import out_file, results, told
from alaya_tiers.tools.shapes import NAMED, Shape, shape_of

LEFT = 0.1
"""Share of each memory that is left alone: activations, libraries, other programs."""

FOUND = 0.005
"""Share of a context that a head is taken to find within reach, where no trace says better."""

MISSED = 0.1
"""Share of the blocks a sparse step needs, beyond what memory holds for certain, that it is taken to read from SSD."""

DOES_NOT_FIT = 1
MODES = ("auto", "exact", "sparse")


@dataclass(frozen=True, slots=True)
class Room:
    """What there is. Bytes; device 0: no GPU, the model and all memory tiers are in host memory."""

    device: int
    host: int
    ssd: int


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes room: where, bytes, and what it is."""

    where: str
    nbytes: int
    what: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found. missing: what is in the way, in words; empty when it fits. Seconds, bytes, tokens.

    terms: what a token takes, by name, in the order of the formula. ttft: with nothing stored; resumed: from the stored
    context.
    """

    model: Shape
    tokens: int
    room: Room
    mode: str
    parts: tuple[Part, ...]
    missing: tuple[str, ...]
    settings: dict[str, Any]
    terms: dict[str, float]
    tpot: float
    ttft: float
    resumed: float

    @property
    def fits(self) -> bool:
        """Whether nothing is in the way."""
        return not self.missing

    def toml(self) -> str:
        """The settings, as ``Settings.from_toml`` reads them."""
        note = f"{self.tokens:,} tokens of {self.model.name}, planned by alaya-tiers plan\n"
        note += f"expected: {self.tpot * 1e3:.1f} ms a token, first token after {told(self.ttft)}"
        return toml.text({"alaya_tiers": self.settings}, note)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"fits": self.fits}


def plan(shape: Shape, tokens: int, room: Room, known: Profile, mode: str = "auto") -> Plan:
    """What a context of ``tokens`` takes and gets on a machine. Raises ConfigError."""
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if room.device and mode == "sparse":
        raise ConfigError("sparse mode works on the CPU so far: plan it with --device-memory 0, or take --mode exact")
    costs, missing = Costs(known, shape), []
    kv, block_tokens = tokens * shape.token_bytes, _block_tokens(costs)
    run = shape.kv_heads * block_tokens * costs.row_bytes
    runs = -(-tokens // block_tokens) + 1
    free = {"device": int(room.device * (1 - LEFT)), "host": int(room.host * (1 - LEFT))}
    home = "device" if room.device else "host"
    free[home] -= costs.weight_bytes
    parts = [Part(home, costs.weight_bytes, "weights")]
    if free[home] < 0:
        missing.append(f"the weights of {format_bytes(costs.weight_bytes)} do not fit into the {home} memory")
    chosen = mode if mode != "auto" else _mode(room, kv, sum(free.values()), tokens)
    window = min(kv, shape.layers * run * 3)  # sinks, recent tokens, the block that is written
    numbers = kv / shape.number_bytes / 2
    codes = int(numbers * CODE_SHARE * Settings().index_bits / 8) if chosen == "sparse" else 0
    device = min(shape.layers * run * runs, max(window, free["device"] if room.device else window))
    free[home] -= device
    free["host"] -= codes
    floor = 2 * run
    host = max(floor, min(shape.layers * run * runs, free["host"]))
    if free[home] < 0 or free["host"] < floor:
        needed = format_bytes(device + codes + floor)
        missing.append(f"the tiers need {needed} beside the weights: give more memory, or a shorter context")
    on_disk = max(0, kv - device - host)
    if on_disk and kv > room.ssd:  # what leaves the host tier was written, and what is stored is written whole
        missing.append(f"{format_bytes(kv)} of KV pass through the SSD, which has {format_bytes(room.ssd)}")
    parts += [Part("device", min(device, kv), "KV: sinks, recent tokens" + " and as much as fits" * bool(room.device))]
    parts += [Part("host", codes, "codes of keys")] * bool(codes)
    parts += [Part("host", min(host, max(0, kv - device)), "KV: what was used last")]
    parts += [Part("ssd", on_disk, "KV: everything else")]
    settings: dict[str, Any] = {
        "mode": chosen, "device_budget": device, "host_budget": host, "block_tokens": block_tokens,
        "ssd_budget": room.ssd or None, "index_budget": codes or None,
    }  # fmt: skip
    settings |= known.settings(DTYPES[shape.number_bytes], shape.head_dim) if chosen == "sparse" else {}
    if not missing:
        Settings.from_dict(dict(settings))
    cold = on_disk / kv
    terms = _terms(costs, tokens, cold, chosen, block_tokens)
    tpot = sum(terms.values())
    first = max(costs.prefill(0, tokens), on_disk / known.ssd_write)
    resumed = tpot + (codes if chosen == "sparse" else kv) / known.ssd_read
    return Plan(
        shape, tokens, room, chosen, tuple(parts), tuple(missing), settings, terms, tpot, first, resumed
    )  # fmt: skip


def _mode(room: Room, kv: int, memory: int, tokens: int) -> str:
    return "exact" if room.device or kv <= memory or tokens < 4096 else "sparse"


def _block_tokens(costs: Costs) -> int:
    """256, or as many as make a block of at least 64 KiB: what an SSD reads at nearly its best."""
    tokens = 256
    while tokens * costs.row_bytes < 64 << 10 and tokens < 4096:
        tokens *= 2
    return tokens


def _terms(costs: Costs, tokens: int, cold: float, mode: str, block_tokens: int) -> dict[str, float]:
    """Seconds of a token by what they are spent on."""
    shape = costs.shape
    block = block_tokens * costs.row_bytes
    if mode == "exact":
        compute, disk = costs.exact(tokens), costs.disk(cold * tokens * shape.token_bytes, block)
        return {
            "model": costs.model(),
            "attention, K and V / rate": compute,
            "SSD not hidden, max(0, cold bytes / rate - attention)": max(0.0, disk - compute),
        }
    window, found = min(tokens, 768 + block_tokens), FOUND * tokens
    heads = shape.layers * shape.kv_heads
    blocks = min(found, tokens / block_tokens) * cold * MISSED
    return {
        "model": costs.model(),
        "sparse attention, window + codes + found keys": costs.sparse(tokens, window, found),
        "SSD, missed blocks x bytes / rate": costs.disk(heads * blocks * block, block),
        "waiting for batches": shape.layers * costs.profile.load * min(1.0, heads * blocks / shape.layers),
    }


EPILOG = """
Example: [bold]alaya-tiers plan --model llama-3.1-8b --context 128K --host-memory 24GiB --ssd 1TiB[/bold]
"""


def command(
    model: Annotated[str, typer.Option(help=f"A config.json, its folder, a hub id, or one of {', '.join(NAMED)}.")],
    context: Annotated[str, typer.Option(help="Tokens, e.g. 128K.")],
    host_memory: Annotated[str, typer.Option(help="RAM, e.g. 64GiB.")],
    device_memory: Annotated[str, typer.Option(help="GPU memory; 0 for a model on the CPU.")] = "0",
    ssd: Annotated[str, typer.Option(help="Room on disk.")] = "0",
    mode: Annotated[str, typer.Option(help=f"One of {', '.join(MODES)}.")] = "auto",
    profile_file: Annotated[
        Path | None,
        typer.Option("--profile", help="By [bold]alaya-tiers profile[/bold]; else a typical machine's rates."),
    ] = None,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="The profile may be another machine's.")] = False,
    what_if: Annotated[
        str | None, typer.Option(help=f"Instead of a profile: {', '.join(catalog.PROFILES)}.", show_default=False)
    ] = None,
    output: Annotated[Path | None, out_file("Write the settings as TOML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON on stdout.")] = False,
) -> None:
    """Says whether a context fits, what goes where, and what TTFT and TPOT to expect. Loads no model.

    Exits with 1 if it does not fit.
    """
    lengths = parse_contexts(context)
    if len(lengths) != 1 or lengths[0] < 1:
        raise ConfigError(f"the context is one number of tokens, e.g. 128K, not {context!r}")
    known = profile.TYPICAL if profile_file is None else profile.load(profile_file, any_machine=any_machine)
    known = known if what_if is None else catalog.what_if(what_if)
    room = Room(parse_bytes(_plain(device_memory)), parse_bytes(_plain(host_memory)), parse_bytes(_plain(ssd)))
    found = plan(shape_of(model), lengths[0], room, known, mode)
    if output is not None and found.fits:
        _write(output, found.toml())
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found, results(), measured=profile_file is not None or what_if is not None, output=output)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _plain(size: str) -> str | int:
    return int(size) if size.strip().isdigit() else size


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write settings to {path}: {error}") from error


def show(found: Plan, out: Console, *, measured: bool, output: Path | None) -> None:
    """The plan for people."""
    kv = found.tokens * found.model.token_bytes
    out.print(f"{found.tokens:,} tokens of {found.model.name}: {format_bytes(kv)} of KV, mode {found.mode}\n")
    where = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("where", "bytes", "what"):
        where.add_column(name, justify="right" if name == "bytes" else "left")
    for part in found.parts:
        where.add_row(part.where, format_bytes(part.nbytes), part.what)
    out.print(where)
    for problem in found.missing:
        out.print(f"\n[bold red]does not fit:[/bold red] {problem}")
    if not found.fits:
        return
    out.print("\n[bold green]fits.[/bold green] A token takes")
    terms = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    terms.add_column(justify="right")
    for name, seconds in found.terms.items():
        terms.add_row(f"{seconds * 1e3:,.1f} ms", name)
    terms.add_row(f"{found.tpot * 1e3:,.1f} ms", "TPOT, the sum", style="bold")
    terms.add_row(told(found.ttft), "TTFT of the whole prompt: operations / rate, or writing the KV")
    terms.add_row(told(found.resumed), "first token when the context is stored already")
    out.print(terms)
    if found.mode == "sparse":
        guess = f"{FOUND:.1%} of the keys within reach, {MISSED:.0%} of cold blocks missed"
        out.print(f"\nsparse: taken to be {guess}; a recorded trace says better", style="dim")
    if not measured:
        out.print("\nrates of a typical machine: alaya-tiers profile measures yours", style="dim")
    out.print(f"\nsettings{'' if output is None else f', written to {output}'}:", style="dim")
    out.print(found.toml(), style="dim", markup=False, highlight=False)
