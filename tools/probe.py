"""``alaya-tiers profile``: the measurements, each short: what the machine does usually, not at its best."""

import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from alaya_tiers.attention import BlockList, attend_blocks, attend_lists
from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings, format_bytes
from alaya_tiers.digest import pages_at
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.index.codes import Layout, Reach, encode, scan
from alaya_tiers.tools import machine, rawdisk
from alaya_tiers.tools.baselines import VOCABULARY, Shape, build_model
from alaya_tiers.tools.machine import Bytes, CpuUse
from alaya_tiers.tools.profile import Profile, Transfer, identity, today
from alaya_tiers.tools.rawdisk import DiskFile
from alaya_tiers.tools.reporting import out_file, results

HEADS, GROUP, BLOCK = 4, 4, 256
BUSY = 0.1
MEASURED = ("read", "write", "latency")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 4)
ROUNDS = 3
"""Of measuring the disk, turn by turn: it is not the same from one moment to the next."""

Say = Callable[[str], None]


def measure(directory: Path, *, quick: bool = False, say: Say = lambda text: None) -> Profile:
    """The profile of this machine; the SSD's is that of ``directory``. Raises ConfigError, OSError."""
    tries = 2 if quick else 5
    say("memory")
    buffer = machine.memory_buffer((64 if quick else 512) << 20)
    memory = machine.memory_bandwidth(buffer, tries)
    one, other = torch.from_numpy(buffer).chunk(2)
    copied = one.nbytes / best(lambda one=one, other=other: one.copy_(other), tries)  # type: ignore[misc]
    say("attention")
    attend = {f"{name}/{dim}": _attend(buffer, DTYPES[name], dim, tries) for name in DTYPES for dim in (64, 128)}
    pick = _pick(buffer, attend["float32/64"], tries)
    spots = buffer.ctypes.data + np.arange(128, dtype=np.int64) * (128 << 10)
    digest = 128 * (128 << 10) / best(lambda: pages_at(spots, 128 << 10), tries)
    say("codes")
    rate, made = _scan(64 if quick else 512, tries)
    say("weights")
    weights = _weights(buffer, tries)
    del buffer, one, other
    say("model")
    step, layer, flops = _model(weights, quick, tries)
    say("SSD")
    try:
        with rawdisk.disk_file(directory, (16 if quick else 256) << 20) as file:
            ssd = _transfers(file, (4 if quick else 64) << 20, 1 if quick else ROUNDS)
            page = 1 / rawdisk.page_rate(file, 512 if quick else 8192)
    except OSError as error:
        raise ConfigError(f"cannot measure the SSD in {directory}: {error}") from error
    say("engine")
    look = _look(attend["float32/64"], rate, pick, tries)
    load = _load(directory, ssd, attend["float32/64"], 2 * tries)
    facts = machine.describe()
    versions = {name: facts[name] for name in ("alaya_tiers", "torch", "transformers", "numpy", "python")}
    return Profile(
        identity=identity(), versions=versions | {"threads": facts["threads"]}, date=today(), memory_read=memory.best,
        memory_copy=copied, attend=attend, scan=rate, pick=pick, encode=made, weights=weights, flops=flops, step=step,
        layer=layer, look=look, load=load, digest=digest, ssd=ssd, page=page,
    )  # fmt: skip


def usual(work: Callable[[], object], tries: int) -> float:
    """Seconds that a quarter of so many tries are faster than: the fastest comes once in a while, others' work with the
    slowest."""
    times = []
    for _ in range(tries + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[tries // 4]


def best(work: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest of so many tries, after one that does not count."""
    times = []
    for _ in range(tries + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


# ---------------------------------------------------------------------- kernels
def _attend(buffer: Bytes, dtype: torch.dtype, dim: int, tries: int) -> float:
    """Bytes of K and V that exact attention of one step reads a second."""
    size = BLOCK * 2 * dim * dtype.itemsize
    blocks = buffer.nbytes // size // HEADS
    order = np.random.default_rng(0).permutation(HEADS * blocks).reshape(HEADS, blocks)
    addresses = buffer.ctypes.data + order * size
    starts = np.arange(blocks, dtype=np.int32) * BLOCK
    listed = BlockList(addresses, starts, np.full(blocks, BLOCK, np.int32), dim, dim, dtype)
    q = torch.randn(HEADS, GROUP, dim, generator=torch.Generator().manual_seed(0))
    lo, hi = np.zeros(GROUP, np.int32), np.full(GROUP, blocks * BLOCK, np.int32)
    return HEADS * blocks * size / usual(lambda: attend_blocks(q, listed, 0.1, lo, hi), 2 * tries)


def _pick(buffer: Bytes, read: float, tries: int, dim: int = 64, each: int = 2048) -> float:
    """Seconds a key attended singly takes beside reading its bytes."""
    row = 2 * dim * 4
    chance = np.random.default_rng(1)
    places = np.sort(chance.integers(0, buffer.nbytes // row, (HEADS, each)), axis=1)
    addresses = (buffer.ctypes.data + places * row).ravel()
    first = np.arange(HEADS + 1, dtype=np.int64) * each
    q = torch.randn(HEADS, GROUP, dim, generator=torch.Generator().manual_seed(0))
    seconds = usual(lambda: attend_lists(q, addresses, first, dim, dim, torch.float32, 0.1), 2 * tries)
    return max(1e-9, seconds / (HEADS * each) - row / read)


def _scan(blocks: int, tries: int, dim: int = 64) -> tuple[float, float]:
    """Numbers of codes scanned, and of keys whose codes are made, a second."""
    make, layout = torch.Generator().manual_seed(0), Layout(BLOCK, dim, dim, 8)
    k, v = torch.randn(2, HEADS, BLOCK, dim, generator=make)
    made = HEADS * BLOCK * dim / best(lambda: encode(k, v, layout), 2 * tries)
    every = torch.from_numpy(machine.memory_buffer(blocks * HEADS * layout.nbytes)).view(-1, layout.nbytes)
    for block in range(blocks):
        coded = encode(torch.randn(k.shape, generator=make), v, layout)
        assert coded is not None
        every[block * HEADS : (block + 1) * HEADS] = coded
    addresses = every.data_ptr() + np.arange(HEADS * blocks, dtype=np.int64).reshape(HEADS, blocks) * layout.nbytes
    first, count = np.zeros(blocks, np.int32), np.full(blocks, BLOCK, np.int32)
    q = 3 * torch.randn(HEADS, GROUP, dim, generator=make)
    reach = Reach.of_share(0.01)
    seconds = usual(lambda: scan(q, addresses, first, count, layout, reach, dim**-0.5), tries)
    return HEADS * blocks * BLOCK * dim / seconds, made


def _weights(buffer: Bytes, tries: int, width: int = 1024) -> float:
    """Bytes of weights that one token's matrix products read a second."""
    matrix = torch.from_numpy(buffer).view(torch.float32).view(-1, width)
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    return matrix.nbytes / usual(lambda: torch.nn.functional.linear(x, matrix), tries)


# ---------------------------------------------------------------------- a whole model
def _model(weights: float, quick: bool, tries: int) -> tuple[float, float, float]:
    """Seconds of a decode step beside its sizes, once and in each layer; operations of prefill a second."""
    few, many, chunk = 2, 6, 128 if quick else 512
    times, flops = {}, 0.0
    for layers in (few, many):
        shape = Shape(layers=layers, hidden=512, heads=8)
        model: Any = build_model(shape, 8 * chunk)
        model.set_attn_implementation("alaya")
        numbers = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        with AlayaCache.for_model(model, device_budget="256MiB", host_budget="64MiB") as cache, torch.no_grad():
            ids = torch.arange(chunk)[None] % VOCABULARY

            def run(tokens: Tensor, model: Any = model, cache: Any = cache) -> None:
                model(input_ids=tokens, past_key_values=cache, use_cache=True)

            prefill = best(lambda run=run, ids=ids: run(ids), 3)  # type: ignore[misc]
            decode = usual(lambda run=run, ids=ids: run(ids[:, :1]), 12 * tries)  # type: ignore[misc]
        flops = max(flops, 2 * numbers * chunk / prefill)
        times[layers] = decode - 4 * numbers / weights
    layer = max(1e-6, min((times[many] - times[few]) / (many - few), times[many] / many))  # others' work shows too
    return max(0.0, times[few] - few * layer), layer, flops


def _session(tokens: int, **settings: Any) -> tuple[Session, Tensor]:
    """One layer of random keys and values, and a query."""
    make = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, HEADS, tokens, 64, generator=make)
    session = Session(Engine(Settings(**settings)))
    session.update(0, k, v)
    return session, 4 * torch.randn(1, HEADS * GROUP, 1, 64, generator=make)


def _look(read: float, rate: float, pick: float, tries: int, tokens: int = 8192) -> float:
    """What a sparse step of a layer takes more than its window, its codes and the keys it finds."""
    seconds, row = {}, 2 * 64 * 4
    spent = {"exact": HEADS * tokens * row / read, "sparse": 0.0}
    for mode in ("exact", "sparse"):
        session, q = _session(tokens, device_budget="64MiB", host_budget="16MiB", mode=mode, alpha=0.05)
        try:
            session.build_index()
            visible = [Visible.all(tokens, 1)]
            seconds[mode] = usual(lambda s=session, q=q, v=visible: s.attention(0, q, v, 0.125), 8 * tries)  # type: ignore[misc]
            history = session.layers[0].history
            if mode == "sparse":
                window = session.engine.settings.sink_tokens + session.engine.settings.recent_tokens
                keys = HEADS * (tokens - window) * 64 / rate
                spent[mode] = HEADS * window * row / read + keys + float(history.found.sum()) * (pick + row / read)
        finally:
            session.engine.close()
    return max(0.0, (seconds["sparse"] - spent["sparse"]) - (seconds["exact"] - spent["exact"]))


# ---------------------------------------------------------------------- disk
def _transfer(file: DiskFile, size: int, depth: int, nbytes: int) -> Transfer:
    """Requests of ``size`` at random places, ``depth`` at a time."""
    count = max(depth, min(nbytes, file.nbytes) // size)
    places = np.random.default_rng(size + depth).permutation(file.nbytes // size)[:count] * size
    read = rawdisk.transfer(file.path, places, size, depth, direct=file.direct)
    some = places[: max(depth, count // 2)]
    written = rawdisk.transfer(file.path, some, size, depth, direct=file.direct, write=True, lasting=True)
    return Transfer(size, depth, read.rate, written.rate, statistics.median(read.latencies))


def _transfers(file: DiskFile, nbytes: int, rounds: int) -> tuple[Transfer, ...]:
    """Every size and depth, the median of some rounds."""
    ways = list(itertools.product(SIZES, DEPTHS))
    found = [[_transfer(file, size, depth, nbytes) for size, depth in ways] for _ in range(rounds)]
    return tuple(
        Transfer(size, depth, *(statistics.median(getattr(one, what) for one in mine) for what in MEASURED))
        for (size, depth), mine in zip(ways, zip(*found, strict=True), strict=True)
    )


def _load(directory: Path, ssd: tuple[Transfer, ...], read: float, tries: int, nbytes: int = 1 << 20) -> float:
    """What a batch of cold blocks takes beside its bytes: in attention, over what the disk needs for so many."""
    deep = max(DEPTHS)
    sizes, rates = zip(*((one.size, one.read) for one in ssd if one.depth == deep), strict=True)
    each = nbytes // Settings().io_threads  # the jobs of a batch
    disk = nbytes / float(np.interp(np.log2(each), np.log2(sizes), rates))
    return max(0.0, _batch(directory, nbytes, tries) - disk - nbytes / read)


def _batch(directory: Path, nbytes: int, tries: int, tokens: int = 128 * BLOCK) -> float:
    """Seconds of one batch of so many bytes, in exact attention over what is nearly all on the SSD."""
    run, path = HEADS * BLOCK * 2 * 64 * 4, directory / f"probe-{os.getpid()}"
    settings = Settings(
        device_budget=3 * run, host_budget=16 << 20, batch_bytes=nbytes, eviction="lru", prefetch="none"
    )
    engine = Engine(settings, str(path))
    try:
        session = Session(engine)
        k, v = torch.randn(2, 1, HEADS, tokens, 64, generator=torch.Generator().manual_seed(0))
        for start in range(0, tokens, BLOCK):
            session.update(0, k[:, :, start : start + BLOCK], v[:, :, start : start + BLOCK])
        q = torch.randn(1, HEADS * GROUP, 1, 64, generator=torch.Generator().manual_seed(1))
        visible = [Visible.all(tokens, 1)]
        seconds = usual(lambda: session.attention(0, q, visible, 0.125), 2 * tries)
        read = engine.mover.traffic.read_bytes / (2 * tries + 1)
        return seconds / max(1.0, read / nbytes)
    finally:
        engine.close()
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------- the command
EPILOG = "Example: [bold]alaya-tiers profile -o this-machine.toml[/bold]"


def command(
    output: Annotated[Path, out_file("The file to write.")] = Path("profile.toml"),
    directory: Annotated[
        Path | None,
        typer.Option(help="Where the SSD is measured. [dim]default: beside the file[/dim]", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="In a few seconds, less exactly.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The profile as JSON on stdout.")] = False,
) -> None:
    """Measures this machine once: memory, SSD, attention, index, model. Leave it alone for half a minute."""
    console, began = Console(stderr=True), CpuUse.now()
    with console.status("") as status:
        found = measure(directory or output.absolute().parent, quick=quick, say=lambda text: status.update(text))
    found.save(output)
    if (others := CpuUse.now().others_since(began)) > BUSY:
        console.print(
            f"others took {others:.0%} of the cores meanwhile: measure again when they are done", style="bold"
        )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    out = results()
    out.print(table(found))
    out.print(ssd_table(found))
    out.print(f"\nwritten to {output}", style="dim")


def table(found: Profile) -> Table:
    """The rates, for people."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    per_second = {"memory read": found.memory_read, "memory copied": found.memory_copy}
    per_second |= {f"attended, {name.replace('/', ', heads of ')}": rate for name, rate in found.attend.items()}
    per_second |= {"digests, one thread": found.digest, "weights read by a decode step": found.weights}
    for name, rate in per_second.items():
        shown.add_row(name, f"{format_bytes(rate)}/s")
    shown.add_row("codes scanned", f"{found.scan / 1e9:.1f} G numbers/s")
    shown.add_row("codes made", f"{found.encode / 1e6:.0f} M numbers/s")
    shown.add_row("prefill", f"{found.flops / 1e9:.0f} GFLOPS")
    seconds = {"a key attended singly": found.pick, "a decode step, at least": found.step}
    seconds |= {
        "each layer of it": found.layer,
        "sparse, each layer": found.look,
        "each batch from the SSD": found.load,
        "each page of 4 KiB from it": found.page,
    }
    for name, each in seconds.items():
        shown.add_row(name, f"{each * 1e6:,.2f} us")
    return shown


def ssd_table(found: Profile) -> Table:
    """The SSD by size of request and depth."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("SSD request", "depth", "read", "written", "latency"):
        shown.add_column(name, justify="right")
    for one in found.ssd:
        rates = (f"{format_bytes(one.read)}/s", f"{format_bytes(one.write)}/s", f"{one.latency * 1e6:,.0f} us")
        shown.add_row(format_bytes(one.size), str(one.depth), *rates)
    return shown
