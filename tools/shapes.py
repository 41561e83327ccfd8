"""What a model costs a machine: bytes of KV and floating point operations, from its configuration."""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from alaya_tiers.errors import ConfigError, UnsupportedModel

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that are what ``Shape`` describes: full attention in all layers and a gated MLP."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder: sizes as in a configuration of the hub; number_bytes: of one number of K or V."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    number_bytes: int = 2

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate, self.vocab)
        if any(type(n) is not int or n < 1 for n in sizes):
            raise ConfigError(f"the sizes of model {self.name} must be integers above 0, got {sizes}")

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.number_bytes

    @property
    def weights(self) -> int:
        """Numbers a token is multiplied with in all layers: projections of attention and the gated MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def prefill_flops(self, cached: int, tokens: int) -> int:
        """Operations for the first token after a prompt of ``tokens``, of which ``cached`` have their KV already.

        Two for each weight and new token; four for each pair of a new token and a token it sees, query head and
        dimension (scores, weighted sum); the logits of the last token.
        """
        pairs = (tokens * (tokens + 1) - cached * (cached + 1)) // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        return 2 * self.weights * (tokens - cached) + attention + 2 * self.hidden * self.vocab


NAMED = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256),
        Shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Shape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        Shape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936),
    )
}


def _configuration(model: str) -> tuple[str, Any]:
    """Where a configuration is, and what it says: a file, a folder, or a model of the hub (nothing but its config)."""
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        return str(path), json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not path.exists() and HUB_ID.fullmatch(model):
            with contextlib.suppress(Exception):  # no network, no such model: the first error says what to do
                return model, AutoConfig.from_pretrained(model).to_dict()
        known = ", ".join(NAMED)
        raise ConfigError(f"no model {model!r}: give a config.json, a hub id, or one of {known} ({error})") from error


def shape_of(model: str) -> Shape:
    """A named shape, or that of a ``config.json``, a folder with one, or a model of the hub.

    Raises ConfigError if there is none, UnsupportedModel if it is another kind of model than ``Shape`` describes.
    """
    if model in NAMED:
        return NAMED[model]
    path, config = _configuration(model)
    return from_config(path, config)


def from_config(name: str, config: Any) -> Shape:
    """The shape of a configuration. name: what it is called. Raises ConfigError, UnsupportedModel."""
    if not isinstance(config, dict):
        raise ConfigError(f"{name} is no model's configuration: it holds no JSON object")
    windowed = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if config.get("model_type") not in KINDS or windowed:
        kind = f"{config.get('model_type')!r}{' with a sliding window' if windowed else ''}"
        raise UnsupportedModel(f"{name}: a model of type {kind} cannot be simulated yet, only {', '.join(KINDS)}")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            name,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            number_bytes=DTYPES[dtype],
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{name} lacks {error}, or has a value there that makes no sense") from error
