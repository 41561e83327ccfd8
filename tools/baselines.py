"""What is compared: one model, one synthetic context, and the caches that hold it. A competitor is one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from alaya_tiers.errors import ConfigError
from alaya_tiers.hf import AlayaCache

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
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


def build_model(shape: Shape, positions: int) -> LlamaForCausalLM:
    """Random weights, the same for the same shape. Queries are made long enough for attention to be peaked.

    With plain random weights every output would be the mean of all values, and a cache that loses blocks would pass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape.config(positions)).to(DTYPES[shape.dtype])
    model.train(False).requires_grad_(False)
    wanted = 3.0 / (0.02 * shape.hidden**0.5)  # scores against unit normal keys: a standard deviation of 3
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.mul_(wanted)
    return model


def model_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of the weights."""
    return sum(p.nbytes for p in model.parameters())


class Context:
    """Standard normal K and V of any length: the same numbers for every cache, made when asked for."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(1)).to(DTYPES[shape.dtype])

    def chunk(self, layer: int, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V, [1, kv_heads, tokens, head_dim], of at most FILL_TOKENS tokens from a multiple of FILL_TOKENS."""
        k, v = torch.empty(2, 1, self.shape.kv_heads, tokens, self.shape.head_dim, dtype=self._pool.dtype)
        for row, out in enumerate((k, v)):
            for head in range(self.shape.kv_heads):
                name = ((layer * 2 + row) * self.shape.kv_heads + head) * 1_000_003 + start
                size = tokens * self.shape.head_dim
                at = name * 7919 % (_POOL - FILL_TOKENS * self.shape.head_dim)
                out[0, head] = self._pool[at : at + size].view(tokens, -1)
        return k, v

    def fill(self, cache: Cache, tokens: int, *, whole: bool = False) -> None:
        """Put the first ``tokens`` tokens into every layer; ``whole``: in one update (a cache that concatenates)."""
        for layer in range(self.shape.layers):
            chunks = [(s, min(FILL_TOKENS, tokens - s)) for s in range(0, tokens, FILL_TOKENS)]
            if not whole:
                for start, n in chunks:
                    cache.update(*self.chunk(layer, start, n), layer)
                continue
            size = (2, 1, self.shape.kv_heads, tokens, self.shape.head_dim)
            all_of_it = torch.empty(size, dtype=self._pool.dtype)
            for start, n in chunks:
                all_of_it[0, :, :, start : start + n], all_of_it[1, :, :, start : start + n] = self.chunk(
                    layer, start, n
                )
            cache.update(all_of_it[0], all_of_it[1], layer)


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


@dataclass(frozen=True, slots=True)
class Case:
    """What a cache is made for: ``tokens`` is the context, ``room`` the context and all steps."""

    shape: Shape
    config: LlamaConfig
    tokens: int
    room: int
    directory: Path

    @property
    def kv_bytes(self) -> int:
        """KV bytes of the context."""
        return self.tokens * self.shape.token_bytes

    @property
    def run_bytes(self) -> int:
        """Bytes of one block in every kv head of every layer, page by page."""
        block = -(-BLOCK_TOKENS * self.shape.layer_token_bytes // self.shape.kv_heads // 4096) * 4096
        return block * self.shape.kv_heads * self.shape.layers

    @property
    def host_bytes(self) -> int:
        """The host budget that the KV is four times of (more where two runs of blocks would not fit)."""
        return max(self.kv_bytes // OVER_HOST, 2 * self.run_bytes // self.shape.layers)


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
            yield cache
        finally:
            if isinstance(cache, AlayaCache):
                cache.close()


def _dynamic(case: Case) -> Cache:
    return DynamicCache(config=case.config)


def _in_place(case: Case) -> Cache:
    return Cache(layers=[InPlaceLayer(case.room) for _ in range(case.shape.layers)])


def _in_ram(case: Case) -> Cache:
    device = -(-case.room // BLOCK_TOKENS) * case.run_bytes
    return AlayaCache(case.config, device_budget=device, host_budget=device, block_tokens=BLOCK_TOKENS)


def _on_ssd(case: Case) -> Cache:
    return AlayaCache(
        case.config,
        device_budget=2 * case.run_bytes,
        host_budget=case.host_bytes,
        block_tokens=BLOCK_TOKENS,
        path=str(case.directory / f"store-{case.tokens}"),
    )


def _layer_bytes(case: Case) -> int:
    return case.room * case.shape.layer_token_bytes


REFERENCE, IN_PLACE, RAM, SSD = "DynamicCache + sdpa", "in place + sdpa", "alaya, RAM", "alaya, SSD"

COMPETITORS = (
    Competitor(REFERENCE, "sdpa", _dynamic, lambda c: c.kv_bytes + 2 * _layer_bytes(c), whole=True),
    Competitor(IN_PLACE, "sdpa", _in_place, lambda c: c.kv_bytes + _layer_bytes(c)),
    Competitor(RAM, "alaya", _in_ram, lambda c: c.kv_bytes + c.run_bytes),
    Competitor(SSD, "alaya", _on_ssd, lambda c: c.host_bytes + 2 * c.run_bytes, ssd=True),
)
