"""``alaya-tiers bench gpu``: what the device tier does on a GPU, in one call of minutes and without a network.

A model by its sizes, random weights, synthetic keys and values. Measured, each as long as time is left:

    copies    blocks between pinned memory and the GPU, against one large copy: what the bus does
    decode    a step over full attention in GPU memory, transformers' offloaded cache, ours in GPU memory, in host
              memory and on ssd, at each length
    first     the first token of a stored context: ours, and everything loaded into a DynamicCache
    prefill   a prompt through ours, most of it written behind, against DynamicCache

``--device simulated`` runs all of it over the simulated device: that the script works, never how fast anything is.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import DynamicCache
from transformers.cache_utils import Cache

from alaya_tiers.config import format_bytes
from alaya_tiers.devices import device_at
from alaya_tiers.devices.base import DOWN, UP, Device
from alaya_tiers.devices.simulated import Simulated
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.hf.db import DB
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.device import DeviceTier
from alaya_tiers.tiers.host import HostTier
from alaya_tiers.tiers.lanes import Lanes
from alaya_tiers.tools import machine
from alaya_tiers.tools.baselines import FILL_TOKENS, VOCABULARY, Context, Shape, build_model, in_place, parse_contexts
from alaya_tiers.tools.gpu_report import REFERENCE, WAYS, Decode, Found, plot, tables
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, results, write

Say = Callable[[str], None]

STEPS = 20
SLACK = 1.15
"""Room over the KV: blocks that are not full, and the steps."""

COPY_BYTES = 256 << 20


class OutOfTime(Exception):
    """The time given is used up; what is left out is said."""


@dataclass(slots=True)
class Bench:
    """Where and how long. seconds: for everything; begun: when."""

    shape: Shape
    contexts: tuple[int, ...]
    device: str
    seconds: float
    directory: Path
    say: Say
    begun: float = field(default_factory=time.perf_counter)

    @property
    def place(self) -> torch.device:
        """Where the model is."""
        return torch.device("cuda" if self.device == "cuda" else "cpu")

    def on(self) -> Device:
        """A new device of the kind that is measured."""
        return Simulated(0, eagerness=0.9) if self.device == "simulated" else device_at(self.place)

    def check_time(self) -> None:
        """Raises OutOfTime."""
        if time.perf_counter() - self.begun > self.seconds:
            raise OutOfTime

    def settle(self) -> None:
        """What the GPU was told has happened."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds that work takes, to its end on the GPU."""
        self.settle()
        began = time.perf_counter()
        work()
        self.settle()
        return time.perf_counter() - began


@torch.no_grad()
def run(bench: Bench) -> Found:
    """Measure everything there is time for. Raises ConfigError, StoreError, OSError."""
    facts = machine.describe()
    if bench.place.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found = Found(bench.shape, bench.device, facts)
    bench.say("copies")
    found.copies = copies(bench)
    model: Any = build_model(bench.shape, max(bench.contexts) + 2 * STEPS + 2).to(bench.place)  # type: ignore[arg-type]
    context = Context(bench.shape)
    parts: list[tuple[str, Iterator[tuple[str, Any]]]]
    parts = [(f"decode, {n:,} tokens", _decodes(bench, model, context, n)) for n in sorted(bench.contexts)]
    for tokens in sorted(bench.contexts)[:2]:
        parts.append((f"the first token, {tokens:,} tokens", _firsts(bench, model, context, tokens)))
    parts.append(("prefill", _prefills(bench, model)))
    for name, part in parts:
        bench.say(name)
        try:
            for kind, result in part:
                if kind == "prefill":
                    found.prefill |= result
                else:
                    getattr(found, kind).append(result)
                bench.check_time()
        except OutOfTime:
            found.left_out.append(name)
    return found


# ---------------------------------------------------------------------- copies
def copies(bench: Bench) -> dict[str, float]:
    """Bytes a second: one large copy each way, and blocks as the mover copies them, single and in runs."""
    nbytes = min(COPY_BYTES, 64 * bench.shape.layer_token_bytes * 256)
    slot = -(-256 * bench.shape.layer_token_bytes // bench.shape.kv_heads // 4096) * 4096
    count, books, device = max(2, nbytes // slot), Accountant({"device": None, "host": None}), bench.on()
    near, far = DeviceTier(count * slot, slot, books, device), HostTier(count * slot, slot, books, device)
    lanes = Lanes(device, near, far)
    mine, theirs = near.take(count), far.take(count)
    assert mine is not None
    assert theirs is not None
    shuffled = theirs[np.random.default_rng(0).permutation(count)]
    sizes = np.full(count, slot, np.int64)
    big, other = device.slab(count * slot), device.host_slab(count * slot)
    ways: dict[str, Callable[[], object]] = {
        "bus, up": lambda: device.copy(UP, [other], [big]),
        "bus, down": lambda: device.copy(DOWN, [big], [other]),
        "blocks in order, up": lambda: lanes.up(theirs, mine, sizes),
        "blocks in order, down": lambda: lanes.down(mine, theirs, sizes),
        "blocks in disorder, up": lambda: lanes.up(shuffled, mine, sizes),
        "blocks in disorder, down": lambda: lanes.down(mine, shuffled, sizes),
    }

    measured = {}
    for name, work in ways.items():
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            device.settle()
            seconds.append(time.perf_counter() - began)
        measured[name] = count * slot / min(seconds)
    near.close()
    far.close()
    return measured


# ---------------------------------------------------------------------- decode
def _decodes(bench: Bench, model: Any, context: Context, tokens: int) -> Iterator[tuple[str, Decode]]:
    for way in WAYS:
        bench.check_time()
        bench.say(f"{tokens:,} tokens: {way}")
        yield "decode", _decode(bench, model, context, way, tokens)


def _decode(bench: Bench, model: Any, context: Context, way: str, tokens: int) -> Decode:
    result = Decode(way, tokens, skipped=_too_much(bench, way, tokens))
    if result.skipped is not None:
        return result
    if bench.place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        with _cache(bench, model, way, tokens) as cache:
            result.fill = bench.clock(lambda: _fill(bench, context, cache, tokens))
            for step in range(STEPS + 1):
                token = torch.tensor([[(7 * step + 3) % VOCABULARY]], device=bench.place)
                seconds = bench.clock(lambda token=token: model(input_ids=token, past_key_values=cache))  # type: ignore[misc]
                result.seconds += [seconds] if step else []
                if step > 2:
                    bench.check_time()
    except torch.OutOfMemoryError as error:
        result.skipped = " ".join(str(error).split())[:200]
    except OutOfTime:
        if not result.seconds:
            raise
    finally:
        if bench.place.type == "cuda":
            result.peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
    return result


@contextmanager
def _cache(bench: Bench, model: Any, way: str, tokens: int) -> Iterator[Cache]:
    """An empty cache, and the model set to its attention."""
    shape, kv = bench.shape, int((tokens + 4 * 256) * bench.shape.token_bytes * SLACK)
    model.set_attn_implementation("alaya" if way.startswith("ours") else "sdpa")
    if way == REFERENCE:
        yield in_place(shape.layers, tokens + 2 * STEPS)
    elif way == "offloaded":
        yield DynamicCache(config=model.config, offloading=True)
    else:
        window = 8 * 256 * shape.token_bytes
        near = kv if way == "ours, GPU" else window
        far = max(kv // 8, 2 * window // shape.layers) if way == "ours, ssd" else max(kv, window)
        with tempfile.TemporaryDirectory(dir=bench.directory) as folder:
            cache = AlayaCache(
                config=model.config, path=folder, device_budget=near, host_budget=far, mode="sparse",
                index_budget=None, io_threads=8,
            )  # fmt: skip
            cache.session.engine.device = bench.on()
            with cache:
                yield cache


def _fill(bench: Bench, context: Context, cache: Cache, tokens: int) -> None:
    """The context into every layer, a chunk at a time, from where the model runs."""
    shape = bench.shape
    for layer in range(shape.layers):
        for start in range(0, tokens, FILL_TOKENS):
            chunk = torch.empty(
                2, 1, shape.kv_heads, min(FILL_TOKENS, tokens - start), shape.head_dim, dtype=context.dtype
            )
            context.write(chunk, layer, start)
            k, v = chunk.to(bench.place)
            cache.update(k, v, layer)
            bench.check_time()
    if isinstance(cache, AlayaCache):
        cache.build_index()


def _too_much(bench: Bench, way: str, tokens: int) -> str | None:
    """Why a way cannot be measured here."""
    kv = int(tokens * bench.shape.token_bytes * SLACK)
    if bench.place.type == "cuda" and way in (REFERENCE, "ours, GPU"):
        free = torch.cuda.mem_get_info()[0]
        if kv > free:
            return f"needs {format_bytes(kv)} of GPU memory, {format_bytes(free)} are free"
    if way == "offloaded" and bench.place.type != "cuda":
        return "transformers offloads from CUDA only"
    if way in ("ours, host", "offloaded") and kv > (free := machine.available_ram()):
        return f"needs {format_bytes(kv)} of RAM, {format_bytes(free)} are free"
    return None


# ---------------------------------------------------------------------- the first token, and prefill
def _firsts(bench: Bench, model: Any, context: Context, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds from an open process to the first token of a stored context; the page cache is not emptied."""
    bench.check_time()
    shape, ids = bench.shape, torch.arange(tokens + 1)[None] % VOCABULARY
    model.set_attn_implementation("alaya")
    with tempfile.TemporaryDirectory(dir=bench.directory) as folder:
        keep, whole = Path(folder) / "store", Path(folder) / "whole.pt"
        kv = torch.empty(shape.layers, 2, 1, shape.kv_heads, tokens, shape.head_dim, dtype=context.dtype)
        for layer in range(shape.layers):
            context.write(kv[layer], layer, 0)
        with DB(keep, model=model, mode="sparse", index_budget=None) as db:
            db.import_context(ids[:, :tokens], [(k, v) for k, v in kv])
        torch.save(kv, whole)
        del kv
        budget: dict[str, Any] = {"device_budget": 8 * 256 * shape.token_bytes}
        budget["host_budget"] = max(64 << 20, tokens * shape.token_bytes)

        def ours() -> None:
            with DB(keep, model=model, mode="sparse", index_budget=None, **budget) as db:
                session, rest = db.create_session(ids)
                model(input_ids=rest.to(bench.place), past_key_values=session)

        def loaded() -> None:
            cache = DynamicCache(config=model.config)
            for layer, (k, v) in enumerate(torch.load(whole, mmap=True)):
                cache.update(k.to(bench.place), v.to(bench.place), layer)
            model(input_ids=ids[:, -1:].to(bench.place), past_key_values=cache)

        seconds = {}
        for name, way, attention in (("ours", ours, "alaya"), ("loaded whole", loaded, "sdpa")):
            model.set_attn_implementation(attention)
            seconds[name] = min(bench.clock(way) for _ in range(2))
            bench.check_time()
        yield "first", {"tokens": tokens, "seconds": seconds}


def _prefills(bench: Bench, model: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Tokens a second of a prompt in chunks: DynamicCache, ours in GPU memory, ours while most is written behind."""
    tokens, chunk = min(bench.contexts), min(2048, min(bench.contexts) // 2)
    ids = (torch.arange(tokens)[None] % VOCABULARY).to(bench.place)
    for way in ("DynamicCache", "ours, GPU", "ours, ssd"):
        bench.check_time()

        def prompt(cache: Any) -> None:
            for start in range(0, tokens, chunk):
                model(input_ids=ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)

        if way == "DynamicCache":
            model.set_attn_implementation("sdpa")
            bench.clock(lambda: model(input_ids=ids[:, :chunk]))
            seconds = bench.clock(lambda: prompt(DynamicCache(config=model.config)))
        else:
            with _cache(bench, model, way, tokens) as cache:
                seconds = bench.clock(lambda cache=cache: prompt(cache))  # type: ignore[misc]
        yield "prefill", {way: tokens / seconds}


def command(
    contexts: Annotated[str, typer.Option(help="Context lengths.")] = "32K,128K,512K,1M",
    device: Annotated[str, typer.Option(help="cuda, cpu, or simulated: that it works, not how fast.")] = "cuda",
    layers: Annotated[int, typer.Option(help="Layers of the model: all others are as these.")] = 8,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 4096,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Numbers of a key.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    seconds: Annotated[float, typer.Option(help="What does not fit into so much time is left out, and said.")] = 540,
    directory: Annotated[Path | None, typer.Option(help="Where the ssd tier is.")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """The device tier on a GPU: copies, decode, first token, prefill. Sizes are Llama-3.1-8B's, with fewer layers.

    Example: alaya-tiers bench gpu --json gpu.json --plot gpu.png
    """
    errors = Console(stderr=True)
    with one_line_errors(errors):
        if device not in ("cuda", "cpu", "simulated"):
            raise ConfigError(f"--device {device!r}: choose cuda, cpu or simulated")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here; --device simulated runs the same without one")
        need_matplotlib(plot_file)
        shape = Shape(layers, hidden, heads, kv_heads, head_dim, dtype)
        with tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=directory) as folder, errors.status("") as status:
            bench = Bench(shape, parse_contexts(contexts), device, seconds, Path(folder), status.update)
            found = run(bench)
    console = results(json_file)
    for made in tables(found):
        console.print(made)
    for each in found.decode:
        if each.skipped is not None:
            console.print(f"{each.name}, {each.tokens:,} tokens: {each.skipped}", highlight=False)
    for name in found.left_out:
        console.print(f"left out, no time: {name}", highlight=False)
    if plot_file is not None:
        plot(found, plot_file)
    write(found.as_dict(), json_file)
