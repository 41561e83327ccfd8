"""A Llama whose weights are computed, not trained, and which continues any quotation from its context word for word.

The residual stream of a token is cut into named parts:

    name   who the token is, for the output       (NAME_WIDTH)
    code   who the token is, for matching         (width)
    slots  the codes of the `slots` tokens before (slots * width)
    out    the name of the predicted token        (NAME_WIDTH)
    one    the constant 1

Layer 0 looks back by position. Its keys are one constant vector on RoPE's high frequencies; the query of head h is
the same vector turned back by h positions, so their product peaks at offset -h, and head h copies the code of that
token into slot h. Layer 1 looks back by content. On RoPE's low frequencies, which hardly turn in a million tokens, the
key of token j holds its slots (the tokens before j) and the query of token i holds its code and all slots but the last
(the tokens up to i). All codes have length 1, so no other word scores as high as the word itself, and the key with all
slots right wins: its token is the one that followed these words before. Layer 1 copies its name to `out`, which the
head of the model reads. The MLPs are zero.

A cache that hides the right key from layer 1 changes a word, which makes the model a test of retrieval on real text: it
is right wherever the last `slots` tokens occur once in the context. The KV of a token is 2 layers * 1 head *
2 * 256 numbers: 4 KiB in float32.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from alaya_tiers.errors import ConfigError

HEAD_DIM = 256
PAIRS = HEAD_DIM // 2
NAME_WIDTH = 64

# The frequency of pair f is ROPE_THETA ** (-f / PAIRS). With 1e30 the first 32 pairs tell all offsets below 2**22 apart
# (offset 1 is the hardest, found by trying all) and the other 96 turn by less than 0.04 radians in 2**20 tokens.
ROPE_THETA = 1e30
HIGH_PAIRS = 32
MAX_TOKENS = 1 << 22

# Logit gaps in nats. Against n keys a softmax needs ln(n), 14 at a million, plus what rounding may take.
POSITION_GAP = 64.0  # between offset -h and any other
TOKEN_GAP = 100.0  # per slot that holds an unrelated token; a word with cosine 0.9 to the right one still costs 10
OUTPUT_GAP = 100.0  # between the right token and an unrelated one in the final logits


@dataclass(frozen=True, slots=True)
class Parts:
    """Where each part of the residual stream lies."""

    slots: int

    @property
    def width(self) -> int:
        """Channels of a code: layer 1 has 2 * (PAIRS - HIGH_PAIRS) to hold one code per slot."""
        return 2 * (PAIRS - HIGH_PAIRS) // self.slots

    @property
    def name(self) -> slice:
        return slice(0, NAME_WIDTH)

    @property
    def out(self) -> slice:
        return slice(NAME_WIDTH, 2 * NAME_WIDTH)

    def code(self, back: int) -> slice:
        """The code of the token `back` positions before; 0 is the token itself, 1 to `slots` are the slots."""
        start = 2 * NAME_WIDTH + back * self.width
        return slice(start, start + self.width)

    @property
    def one(self) -> int:
        return 2 * NAME_WIDTH + (self.slots + 1) * self.width

    @property
    def hidden_size(self) -> int:
        """Rounded up to a multiple of the number of heads, which Llama demands."""
        return -(-(self.one + 1) // self.slots) * self.slots


def build_model(
    vocabulary_size: int, *, slots: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A two-layer Llama with `slots` query heads, one KV head and head_dim 256 that continues quotations verbatim.

    It continues right where the last `slots` tokens occur once in the context. The same arguments give the same
    weights; torch's global random state is left as it was. There are no special tokens, so generation stops only at
    its length limit. Raises ConfigError for an empty vocabulary or a number of slots outside 1..16.
    """
    if vocabulary_size < 1:
        raise ConfigError(f"vocabulary_size must be positive, got {vocabulary_size}")
    if not 1 <= slots <= 16:
        raise ConfigError(f"slots must be in 1..16, got {slots}: more would leave a code under 12 channels")
    parts = Parts(slots)
    generator = torch.Generator().manual_seed(seed)
    names = unit_vectors(vocabulary_size, NAME_WIDTH, generator)
    codes = unit_vectors(vocabulary_size, parts.width, generator)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(model_config(vocabulary_size, parts, dtype))
    model.train(False).requires_grad_(False)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        # Not model.to(dtype): that would round the RoPE frequencies as well.
        parameter.data = torch.full_like(parameter, 1.0 if "norm" in name else 0.0, dtype=dtype)
        weights[name] = parameter
    write_embeddings(weights, parts, names, codes)
    write_look_back_by_position(weights, parts)
    write_look_back_by_content(weights, parts)
    return model


def unit_vectors(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Random directions: (count, width) float32."""
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def model_config(vocabulary_size: int, parts: Parts, dtype: torch.dtype) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=parts.hidden_size,
        intermediate_size=1,
        num_hidden_layers=2,
        num_attention_heads=parts.slots,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        dtype=dtype,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def write_embeddings(weights: dict[str, Tensor], parts: Parts, names: Tensor, codes: Tensor) -> None:
    """The input, the output and the norms.

    Every part is a unit vector, so the length of the stream is known at each norm; a norm whose weight is the root
    mean square it divides by passes its input on unchanged.
    """
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, parts.name] = names.to(embedding.dtype)
    embedding[:, parts.code(0)] = codes.to(embedding.dtype)
    embedding[:, parts.one] = 1.0
    weights["lm_head.weight"][:, parts.out] = (names * OUTPUT_GAP).to(embedding.dtype)
    unit_parts = {
        "model.layers.0.input_layernorm.weight": 3,
        "model.layers.1.input_layernorm.weight": 3 + parts.slots,
        "model.norm.weight": 3 + parts.slots + 1,
    }
    for name, count in unit_parts.items():
        weights[name].fill_(math.sqrt(count / parts.hidden_size))


def write_look_back_by_position(weights: dict[str, Tensor], parts: Parts) -> None:
    """Layer 0: head h copies the code of the token h positions before into slot h."""
    query, key, value, output = (weights[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkvo")
    frequencies = ROPE_THETA ** (-torch.arange(HIGH_PAIRS, dtype=torch.float64) / PAIRS)
    gap_to_neighbour = (1.0 - torch.cos(frequencies)).sum().item()
    amplitude = math.sqrt(POSITION_GAP * math.sqrt(HEAD_DIM) / gap_to_neighbour)
    # Llama pairs channel f with channel f + PAIRS and turns pair f at position p by p * frequency.
    key[:HIGH_PAIRS, parts.one] = amplitude
    eye = torch.eye(parts.width, dtype=value.dtype)
    value[: parts.width, parts.code(0)] = eye
    for back in range(1, parts.slots + 1):
        head = (back - 1) * HEAD_DIM
        query[head : head + HIGH_PAIRS, parts.one] = (amplitude * torch.cos(back * frequencies)).to(query.dtype)
        query[head + PAIRS : head + PAIRS + HIGH_PAIRS, parts.one] = (-amplitude * torch.sin(back * frequencies)).to(
            query.dtype
        )
        output[parts.code(back), head : head + parts.width] = eye


def write_look_back_by_content(weights: dict[str, Tensor], parts: Parts) -> None:
    """Layer 1: every head finds the token that followed the last `slots` tokens and writes its name to `out`.

    All heads ask the same question and each writes its share of the answer: a head without a question would attend to
    all keys alike, and an index that serves the heads of a group together would read everything for it.
    """
    query, key, value, output = (weights[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkvo")
    amplitude = math.sqrt(TOKEN_GAP * math.sqrt(HEAD_DIM))
    low = torch.tensor([*range(HIGH_PAIRS, PAIRS), *range(PAIRS + HIGH_PAIRS, HEAD_DIM)])
    heads = HEAD_DIM * torch.arange(parts.slots)
    eye = torch.eye(parts.width, dtype=key.dtype)
    for back in range(1, parts.slots + 1):
        channels = low[(back - 1) * parts.width : back * parts.width]
        key[channels, parts.code(back)] = amplitude * eye
        for head in heads:
            query[head + channels, parts.code(back - 1)] = amplitude * eye
    name_eye = torch.eye(NAME_WIDTH, dtype=value.dtype)
    value[:NAME_WIDTH, parts.name] = name_eye
    for head in heads:
        output[parts.out, head : head + NAME_WIDTH] = name_eye / parts.slots


@torch.no_grad()
def text_key_values(
    model: LlamaForCausalLM, ids: Sequence[int] | Tensor, *, chunk_tokens: int = 256
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The KV of a text in O(tokens): for each chunk one (keys, values) per layer, each (1, 1, chunk, HEAD_DIM).

    For models of `build_model` only. Layer 0 reads nothing further back than `slots` tokens (to e**-64) and nothing
    is stored of what layer 1 reads, so each chunk is computed from its own tokens and the `slots` before, at their true
    positions. Equal to the KV of a full prefill up to float rounding. Raises ConfigError unless chunk_tokens is
    positive.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be positive, got {chunk_tokens}")
    tokens = torch.as_tensor(ids, device=model.device)
    for start in range(0, len(tokens), chunk_tokens):
        first = max(0, start - model.config.num_attention_heads)
        positions = torch.arange(first, min(start + chunk_tokens, len(tokens)), device=model.device)
        cache = DynamicCache(config=model.config)
        model.model(input_ids=tokens[None, positions], position_ids=positions[None], past_key_values=cache)
        layers: list[Any] = cache.layers
        yield [(layer.keys[:, :, start - first :], layer.values[:, :, start - first :]) for layer in layers]


def fill(
    model: LlamaForCausalLM,
    cache: DynamicCache,
    ids: Sequence[int] | Tensor,
    say: Callable[[int], None] = lambda done: None,
) -> None:
    """Put `text_key_values` into an empty cache. say: told after each chunk how many are in it."""
    done = 0
    for chunk in text_key_values(model, ids):
        for layer, (keys, values) in enumerate(chunk):
            cache.update(keys, values, layer)
        done += chunk[0][0].shape[2]
        say(done)
