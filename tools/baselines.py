"""What is compared: one model, one synthetic context, the caches that hold it, and one run of each."""

import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache
from alaya_tiers.stats import Stats
from alaya_tiers.tools import machine, rawdisk
from alaya_tiers.tools.machine import Bandwidth
from alaya_tiers.tools.rawdisk import DiskFile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = 512
FILL_TOKENS = 4096
"""Tokens handed to a cache at a time when a context is filled in."""

SLACK = 512 << 20
"""RAM left over: activations, and what other programs take while a benchmark runs."""

BLOCK_TOKENS = 256
OVER_HOST = 4
"""How many times the host budget the KV is, on the ssd."""

_POOL = 1 << 22  # random numbers every chunk of KV is cut from


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes. Raises ConfigError when they do not fit together."""

    layers: int = 16
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim) < 1:
            raise ConfigError("layers, hidden, heads, kv-heads and head-dim must be positive")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ConfigError("heads must be a multiple of kv-heads, and head-dim even")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; choose one of {', '.join(DTYPES)}")

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token, all layers."""
        return self.layers * self.layer_token_bytes

    @property
    def layer_token_bytes(self) -> int:
        """KV bytes of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize

    def config(self, positions: int) -> LlamaConfig:
        """The model's config, with room for ``positions`` tokens."""
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            dtype=DTYPES[self.dtype],
        )


def build_model(shape: Shape, positions: int, sharpness: float = 3.0) -> LlamaForCausalLM:
    """Random weights, the same for the same shape. Queries are made long enough for attention to be peaked.

    sharpness: standard deviation of the scores against unit normal keys.

    With plain random weights every output would be the mean of all values, and a cache that loses blocks would pass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(shape.config(positions))
        model.to(DTYPES[shape.dtype])
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(sharpness / (0.02 * shape.hidden**0.5))
    return cast(LlamaForCausalLM, model.train(False).requires_grad_(False))


QUICK = "2K"
"""The context of ``--quick``, unless one is given."""


def parse_contexts(text: str) -> tuple[int, ...]:
    """``"8K,32K,1M"`` as numbers of tokens. Raises ConfigError."""
    units = {"K": 1 << 10, "M": 1 << 20}
    words = [word.strip().upper() for word in text.split(",")]
    try:
        return tuple(int(w[:-1]) * units[w[-1]] if w[-1:] in units else int(w) for w in words)
    except ValueError as error:
        raise ConfigError(f"cannot read {text!r} as context lengths; write e.g. 8K,32K,100000") from error


def contexts_of(text: str | None, usual: str, *, quick: bool) -> tuple[int, ...]:
    """The lengths that were asked for; else the usual ones, or one that takes no time. Raises ConfigError."""
    return parse_contexts(text or (QUICK if quick else usual))


class Context:
    """Standard normal K and V of any length: the same numbers for every cache, made when asked for."""

    def __init__(self, shape: Shape, place: torch.device | None = None) -> None:
        self.shape = shape
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(1)).to(place, DTYPES[shape.dtype])

    @property
    def dtype(self) -> torch.dtype:
        """Of all numbers."""
        return self._pool.dtype

    def write(self, out: Tensor, layer: int, start: int) -> None:
        """K and V from position ``start``, a multiple of FILL_TOKENS, into ``out`` [2, 1, kv_heads, n, head_dim]."""
        heads, tokens, width = out.shape[2:]
        for first, i in itertools.product(range(0, tokens, FILL_TOKENS), range(2 * heads)):
            n = min(FILL_TOKENS, tokens - first)
            at = ((layer * 2 * heads + i) * 1_000_003 + start + first) * 7919 % (_POOL - FILL_TOKENS * width)
            out[i // heads, 0, i % heads, first : first + n] = self._pool[at : at + n * width].view(n, width)

    def fill(self, cache: Cache, tokens: int, *, whole: bool = False) -> None:
        """Put the first ``tokens`` tokens into every layer; ``whole``: in one update (a cache that concatenates)."""
        step = tokens if whole else min(tokens, FILL_TOKENS)
        chunk = torch.empty(2, 1, self.shape.kv_heads, step, self.shape.head_dim, dtype=self._pool.dtype)
        for layer, start in itertools.product(range(self.shape.layers), range(0, tokens, step)):
            k, v = part = chunk[:, :, :, : tokens - start]  # one buffer: many would leave holes in the heap
            self.write(part, layer, start)
            cache.update(k, v, layer)


class InPlaceLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """K and V in memory allocated once; an update writes the new tokens and returns views of all so far."""

    is_compileable, is_sliding, is_croppable = False, False, False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, k_dim = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, k_dim)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        first, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, first : self.length], self.values[:, :, first : self.length] = key_states, value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


def in_place(layers: int, capacity: int) -> Cache:
    """A dense cache that never copies what it holds."""
    return Cache(layers=[InPlaceLayer(capacity) for _ in range(layers)])


@dataclass(frozen=True, slots=True)
class Case:
    """What a cache is made for: ``tokens`` is the context, ``room`` the context and all steps."""

    shape: Shape
    config: LlamaConfig
    tokens: int
    room: int
    directory: Path
    sharpness: float = 3.0

    @property
    def kv_bytes(self) -> int:
        """KV bytes of the context."""
        return self.tokens * self.shape.token_bytes

    def dense_bytes(self, more: int) -> int:
        """KV bytes after the last step, and of ``more`` layers that are filled in or copied meanwhile."""
        return self.room * (self.shape.token_bytes + more * self.shape.layer_token_bytes)

    @property
    def run_bytes(self) -> int:
        """Bytes of one block in every kv head of every layer, page by page."""
        block = -(-BLOCK_TOKENS * self.shape.layer_token_bytes // self.shape.kv_heads // 4096) * 4096
        return block * self.shape.kv_heads * self.shape.layers

    @property
    def host_bytes(self) -> int:
        """The host budget that the KV is four times of (more where two runs of blocks would not fit)."""
        return max(self.kv_bytes // OVER_HOST, 2 * self.run_bytes // self.shape.layers)

    @property
    def device_bytes(self) -> int:
        """The device budget beside it: in every layer the block that is written to, and one before."""
        return 2 * self.run_bytes


@dataclass(frozen=True, slots=True)
class Competitor:
    """A cache and the attention that goes with it.

    make: the empty cache. ram: bytes it needs at its worst. whole: filled by one update a layer. ssd: reads the disk.
    """

    name: str
    attention: str
    make: Callable[[Case], Cache]
    ram: Callable[[Case], int]
    whole: bool = False
    ssd: bool = False

    @contextmanager
    def opened(self, case: Case, model: LlamaForCausalLM, context: Context) -> Iterator[Cache]:
        """The cache with the context in it, and the model set to its attention."""
        cache = self.make(case)
        try:
            model.set_attn_implementation(self.attention)
            context.fill(cache, case.tokens, whole=self.whole)
            if isinstance(cache, AlayaCache):
                cache.build_index()
            yield cache
        finally:
            if isinstance(cache, AlayaCache):
                cache.close()


def _in_ram(case: Case, **settings: Any) -> Cache:
    device = -(-case.room // BLOCK_TOKENS) * case.run_bytes
    return AlayaCache(
        config=case.config, device_budget=device, host_budget=device, block_tokens=BLOCK_TOKENS, **settings
    )


def _on_ssd(case: Case, **settings: Any) -> Cache:
    return AlayaCache(
        config=case.config,
        device_budget=case.device_bytes,
        host_budget=case.host_bytes,
        block_tokens=BLOCK_TOKENS,
        path=str(case.directory / f"store-{case.tokens}-{settings.get('mode')}"),
        **settings,
    )


REFERENCE, IN_PLACE, RAM, SSD = "DynamicCache + sdpa", "in place + sdpa", "alaya, RAM", "alaya, SSD"
_SPARSE: dict[str, Any] = {"mode": "sparse", "index_budget": None}

COMPETITORS = (
    Competitor(REFERENCE, "sdpa", lambda c: DynamicCache(config=c.config), lambda c: c.dense_bytes(3), whole=True),
    Competitor(IN_PLACE, "sdpa", lambda c: in_place(c.shape.layers, c.room), lambda c: c.dense_bytes(1)),
    Competitor(RAM, "alaya", _in_ram, lambda c: c.dense_bytes(0) + c.run_bytes),
    Competitor(SSD, "alaya", _on_ssd, lambda c: c.host_bytes + c.device_bytes, ssd=True),
)

SPARSE = (
    Competitor(
        f"{RAM}, sparse", "alaya", lambda c: _in_ram(c, **_SPARSE), lambda c: c.dense_bytes(0) * 4 // 3 + c.run_bytes
    ),
    Competitor(
        f"{SSD}, sparse", "alaya", lambda c: _on_ssd(c, **_SPARSE),
        lambda c: c.host_bytes + c.device_bytes + c.dense_bytes(0) // 3, ssd=True,
    ),
)  # fmt: skip
"""Caches that attend to what matters only: their logits differ."""


@dataclass(frozen=True, slots=True)
class Pace:
    """At most ``steps`` steps; fewer when they take longer than ``seconds``, but never below ``least``."""

    steps: int = 50
    least: int = 5
    seconds: float = 5.0

    def enough(self, times: list[float]) -> bool:
        """Whether to stop after these steps, the first of which was the warm-up."""
        counted = times[1:]
        return len(counted) >= self.steps or (len(counted) >= self.least and sum(counted) > self.seconds)


@dataclass(slots=True)
class Measured:
    """One competitor at one length. All times in seconds.

    warm_up: the first step, which is not counted. steps: all others. fill: to put the context in. attention: a whole
    step's worth of attention without the model, several times. peak_rss: of the process, filling included. differs:
    largest difference of the logits from the reference's, over the largest logit. ssd: what was read. skipped: why not.
    """

    name: str
    warm_up: float = 0.0
    steps: list[float] = field(default_factory=list)
    fill: float = 0.0
    attention: list[float] = field(default_factory=list)
    peak_rss: int = 0
    differs: float | None = None
    ssd: dict[str, Any] | None = None
    skipped: str | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0, VOCABULARY), repr=False)

    @property
    def best(self) -> float:
        """The fastest step: what ratios are made of, because limits are the fastest reads."""
        return min(self.steps)

    @property
    def median(self) -> float:
        """Of the counted steps."""
        return statistics.median(self.steps)

    @property
    def p90(self) -> float:
        """Nine steps of ten were at least as fast."""
        return sorted(self.steps)[-(-9 * len(self.steps) // 10) - 1]

    def as_dict(self) -> dict[str, Any]:
        """JSON values, every step's time among them."""
        if self.skipped is not None:
            return {"name": self.name, "skipped": self.skipped}
        names = ("name", "warm_up", "steps", "fill", "attention", "peak_rss", "differs", "ssd")
        times = {"best": self.best, "median": self.median, "p90": self.p90}
        return {name: getattr(self, name) for name in names} | times


def measure(
    competitor: Competitor, case: Case, model: LlamaForCausalLM, context: Context, pace: Pace, disk: DiskFile | None
) -> Measured:
    """Fill a competitor's cache, decode over it, and let go of it. Raises StoreError, OSError."""
    result = Measured(competitor.name, skipped=_too_much(competitor, case))
    if result.skipped is not None:
        return result
    limit = rawdisk.disk_bandwidth(disk, disk.nbytes) if disk is not None and competitor.ssd else None
    machine.reset_peak_rss()
    began = time.perf_counter()
    with competitor.opened(case, model, context) as cache:
        result.fill = time.perf_counter() - began
        facts = [cache.stats] if isinstance(cache, AlayaCache) else []
        times, result.logits, seen = decode(model, cache, pace, facts)
        result.warm_up, result.steps = times[0], times[1:]
        if isinstance(cache, AlayaCache) and not competitor.ssd:
            result.attention = attention_only(cache.session, case, pace)
    result.peak_rss = machine.peak_rss()
    if disk is not None and limit is not None:
        limit = limit.merged(rawdisk.disk_bandwidth(disk, disk.nbytes))
        result.ssd = _ssd(case, seen[0], seen[1], result.steps, limit)
    return result


def decode(
    model: LlamaForCausalLM, cache: Cache, pace: Pace, facts: Sequence[Callable[[], Stats]] = ()
) -> tuple[list[float], Tensor, list[Stats]]:
    """Seconds of each step, the warm-up first; the logits of all, float32 [steps, vocabulary]; what ``facts`` said.

    facts: asked after the warm-up and after the last step.
    """
    times: list[float] = []
    logits: list[Tensor] = []
    seen: list[Stats] = []
    while not pace.enough(times):
        token = torch.tensor([[(7 * len(times) + 3) % VOCABULARY]])
        began = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - began)
        logits.append(out.logits[0, -1].float())
        if len(times) == 1:
            seen += [fact() for fact in facts]
    return times, torch.stack(logits), seen + [fact() for fact in facts]


def attention_only(session: Session, case: Case, pace: Pace) -> list[float]:
    """Seconds of one attention in every layer, several times: what is left of a step without the model."""
    generator, shape = torch.Generator().manual_seed(2), case.shape
    q = case.sharpness * torch.randn(shape.layers, 1, shape.heads, 1, shape.head_dim, generator=generator)
    q = q.to(DTYPES[shape.dtype])
    visible, scale = [Visible.all(session.length(), 1)], shape.head_dim**-0.5
    times: list[float] = []
    while not pace.enough(times):
        began = time.perf_counter()
        for layer in range(shape.layers):
            session.attention(layer, q[layer], visible, scale)
        times.append(time.perf_counter() - began)
    return times[1:]


def _too_much(competitor: Competitor, case: Case) -> str | None:
    """Why a competitor cannot run here; None when it can."""
    needed, left = competitor.ram(case) + SLACK, machine.available_ram()
    if needed > left:
        return f"needs {format_bytes(needed)} of RAM, {format_bytes(left)} are free"
    needed, left = case.dense_bytes(0) + SLACK, shutil.disk_usage(case.directory).free
    if competitor.ssd and needed > left:
        return f"needs {format_bytes(needed)} in {case.directory}, {format_bytes(left)} are free"
    return None


def _ssd(case: Case, before: Stats, after: Stats, steps: list[float], disk: Bandwidth) -> dict[str, Any]:
    """What the counted steps read, a token; against the disk, and against reading only what no budget holds."""
    touched = {n: getattr(after.touched, n) - getattr(before.touched, n) for n in ("device", "host", "ahead", "waited")}
    from_disk, read = touched["ahead"] + touched["waited"], after.read_bytes - before.read_bytes
    n, seconds = len(steps), sum(steps)
    return {
        "host_budget": case.host_bytes,
        "device_budget": case.device_bytes,
        "direct_io": after.direct_io,
        "read_bytes": read / n,
        "read_ahead_bytes": (after.read_ahead_bytes - before.read_ahead_bytes) / n,
        "touched_bytes": {name: nbytes / n for name, nbytes in touched.items()},
        "waited_seconds": (after.waited_seconds - before.waited_seconds) / n,
        "hit_rate": 1 - touched["waited"] / max(1, sum(touched.values())),
        "io_hidden": touched["ahead"] / from_disk if from_disk else 1.0,
        "bytes_per_second": read / seconds,
        "disk": disk.as_dict(),
        "disk_share": read / seconds / disk.best,
        "least_read_bytes": max(0, case.kv_bytes - case.host_bytes - case.device_bytes),
    }
