"""``alaya-tiers bench gpu``: what the device tier does on a GPU, in one call of minutes and without a network.

A model by its sizes, random weights, synthetic keys and values. Measured, each as long as time is left:

    copies    blocks between pinned memory and the GPU, against one large copy: what the bus does
    kernels   each over a layer's keys, values or codes, against a copy in GPU memory: what the memory does
    decode    a step over full attention in GPU memory, transformers' offloaded cache, ours in GPU memory, in host
              memory and on ssd, at each length; how often CUDA made the program wait in it
    first     the first token of a stored context: ours, and everything loaded into a DynamicCache
    prefill   a prompt through ours, most of it written behind, against DynamicCache
    quality   sparse against full attention of a trained model, if one is given

Every part has its share of the time, what one leaves the next ones get; numbers are written as they come, so that a run
that is cut off has lost nothing; a part that fails is said, and the others go on. ``--device simulated`` runs all of it
over the simulated device: that the script works, never how fast anything is.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.hf.db import DB
from alaya_tiers.tools import gpu_probes, machine, quality
from alaya_tiers.tools.baselines import FILL_TOKENS, VOCABULARY, Context, Shape, build_model, in_place, parse_contexts
from alaya_tiers.tools.gpu_bench import Bench, NotHere, OutOfTime
from alaya_tiers.tools.gpu_report import REFERENCE, WAYS, Decode, Found, plot, tables
from alaya_tiers.tools.reporting import JsonFile, PlotFile, need_matplotlib, one_line_errors, results, write

STEPS = 20
PROFILED = 2
"""Steps that are looked at closely, after the measured ones."""

SHARPNESS = 6.0
"""Standard deviation of the scores: a sharp head. Flatter ones have more keys that matter at any length."""

ALPHAS, QUALITY = (0.012, 0.001), (1024, 4096, 16_384)
"""Shares of the largest weight, and context lengths, of the trained model."""

SLACK = 1.15
"""Room over the KV: blocks that are not full, and the steps."""


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to measure. weight: its share of the time, against the others'."""

    name: str
    weight: float
    work: Callable[[], Iterator[tuple[str, Any]]]


@torch.no_grad()
def run(bench: Bench, keep: Callable[[Found], None] = lambda found: None, trained: Path | None = None) -> Found:
    """Measure everything there is time for, each part in its own share of it; a part that fails is said, and the next
    goes on. keep: told whenever something more was found. trained: a folder of `alaya-tiers train`, for its quality.
    """
    facts = machine.describe()
    if bench.place.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found = Found(bench.shape, bench.device, facts)
    parts = parts_of(bench, trained)
    for place, part in enumerate(parts):
        bench.grant(part.weight / sum(each.weight for each in parts[place:]))
        bench.say(part.name)
        try:
            for kind, result in part.work():
                found.put(kind, result)
                keep(found)
                bench.check_time()
        except OutOfTime:
            found.left_out.append(f"{part.name}: no time")
        except NotHere as reason:
            found.left_out.append(f"{part.name}: {reason}")
        except Exception as error:  # whatever it was, the other parts are worth having
            found.failed[part.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        bench.clean()
        keep(found)
    return found


def parts_of(bench: Bench, trained: Path | None) -> list[Part]:
    """What is measured, in this order: what says most in little time comes first, the longest contexts last."""
    lengths, model = sorted(bench.contexts), cache(lambda: _model(bench))
    context = Context(bench.shape, bench.place)
    usual = min(lengths, key=lambda n: abs(n - (128 << 10)))

    def decode(tokens: int) -> Part:
        weight = 1 + tokens / (96 << 10)
        return Part(f"decode, {tokens:,} tokens", weight, lambda: _decodes(bench, model(), context, tokens))

    parts = [Part("copies", 1, lambda: _copies(bench)), Part("kernels", 2, lambda: _kernels(bench)), decode(usual)]
    parts += [decode(n) for n in lengths if n < usual]
    parts += [
        Part(f"the first token, {n:,} tokens", 2, lambda n=n: _firsts(bench, model(), context, n))  # type: ignore[misc]
        for n in lengths[:2]
    ]
    parts += [Part("prefill", 2, lambda: _prefills(bench, model()))]
    if trained is not None:
        parts.append(Part("quality", 3, lambda: _quality(bench, trained)))
    return parts + [decode(n) for n in lengths if n > usual]


def _model(bench: Bench) -> Any:
    with bench.place:  # weights are made where they are used
        return build_model(bench.shape, max(bench.contexts) + 2 * STEPS + 2, SHARPNESS)


def _copies(bench: Bench) -> Iterator[tuple[str, Any]]:
    for name, rate in gpu_probes.copies(bench):
        if name == "bus, up":
            bench.bus_rate = rate
        yield "copies", {name: rate}


def _kernels(bench: Bench) -> Iterator[tuple[str, Any]]:
    for share in gpu_probes.kernels(bench):
        yield "kernels", share._asdict()


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
            result.fill = bench.clock(lambda: _fill(bench, context, cache, tokens, whole=way == "offloaded"))
            for step in range(STEPS + 1):
                token = torch.tensor([[(7 * step + 3) % VOCABULARY]], device=bench.place)

                def decode(token: Tensor = token) -> Tensor:
                    logits: Tensor = model(input_ids=token, past_key_values=cache).logits
                    return logits

                seconds = bench.clock(decode)
                result.seconds += [seconds] if step else []
                if step > 2:
                    bench.check_time()
            if bench.place.type == "cuda":
                result.waits = gpu_probes.waits(bench, decode, PROFILED)
            if isinstance(cache, AlayaCache):
                use = cache.stats().sparse
                result.attended = use.attended / use.visible if use is not None and use.visible else None
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
            known: dict[str, Any] = {} if bench.bus_rate is None else {"bus_rate": bench.bus_rate}
            cache = AlayaCache(
                config=model.config, path=folder, device_budget=near, host_budget=far, mode="sparse",
                index_budget=None, device_index_budget=kv // 4, io_threads=8,
                dirty_limit=0.5 if way == "ours, ssd" else 1.0, **known,
            )  # fmt: skip
            cache.session.engine.device = bench.on()
            with cache:
                yield cache


def _fill(bench: Bench, context: Context, cache: Cache, tokens: int, *, whole: bool) -> None:
    """The context into every layer, made where the model runs; whole: a layer at once, where a cache concatenates."""
    shape, step = bench.shape, tokens if whole else FILL_TOKENS
    for layer in range(shape.layers):
        for start in range(0, tokens, step):
            n = min(step, tokens - start)
            chunk = torch.empty(2, 1, shape.kv_heads, n, shape.head_dim, dtype=context.dtype, device=bench.place)
            context.write(chunk, layer, start)
            cache.update(chunk[0], chunk[1], layer)
            bench.check_time()
    if isinstance(cache, AlayaCache):
        cache.build_index(lambda done, every: bench.check_time())


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
            bench.check_time()
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


def _quality(bench: Bench, folder: Path) -> Iterator[tuple[str, Any]]:
    """Sparse against full attention of a model that was trained, where the others were measured."""
    model, tasks = quality.subject(folder, None)
    model.to(bench.place)
    each, questions = (2, 4) if bench.place.type == "cuda" else (1, 1)
    lengths = QUALITY if bench.place.type == "cuda" else QUALITY[:1]
    for row in quality.trained(model, tasks, lengths, ALPHAS, each, questions, bench.say):
        yield "quality", [scored.as_dict(row[0]) for scored in row]


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
    model: Annotated[
        Path | None, typer.Option(help="A folder made by alaya-tiers train: measures quality too.")
    ] = None,
    directory: Annotated[Path | None, typer.Option(help="Where the ssd tier is.")] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """The device tier on a GPU: copies, kernels, decode, first token, prefill. Sizes are Llama-3.1-8B's, fewer layers.

    Numbers are written to --json as they come.

    Example: alaya-tiers bench gpu --json gpu.json --plot gpu.png
    """
    errors = Console(stderr=True)
    with one_line_errors(errors):
        if device not in ("cuda", "cpu", "simulated"):
            raise ConfigError(f"--device {device!r}: choose cuda, cpu or simulated")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here; --device simulated runs the same without one")
        need_matplotlib(plot_file)

        def keep(found: Found) -> None:
            write(found.as_dict(), json_file)

        shape = Shape(layers, hidden, heads, kv_heads, head_dim, dtype)
        with tempfile.TemporaryDirectory(prefix="bench-alaya-", dir=directory) as folder, errors.status("") as status:
            bench = Bench(shape, parse_contexts(contexts), device, seconds, Path(folder), status.update)
            found = run(bench, keep if str(json_file) != "-" else lambda found: None, model)
    console = results(json_file)
    for made in tables(found):
        console.print(made)
    for each in found.decode:
        if each.skipped is not None:
            console.print(f"{each.name}, {each.tokens:,} tokens: {each.skipped}", highlight=False)
    for name in found.left_out:
        console.print(f"left out: {name}", highlight=False)
    for name, why in found.failed.items():
        console.print(f"failed: {name}: {why}", highlight=False, markup=False)
    if plot_file is not None:
        plot(found, plot_file)
    write(found.as_dict(), json_file)
    if found.failed:
        raise typer.Exit(1)
