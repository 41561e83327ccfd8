"""A session of the database: a cache that sees the token ids that run over it."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from alaya_tiers.cache import Session
from alaya_tiers.contexts import Contexts
from alaya_tiers.errors import InputError, SessionClosed, UnsupportedModel
from alaya_tiers.hf.cache import AlayaCache, positions_of
from alaya_tiers.hf.layer import AlayaLayer
from alaya_tiers.hf.weights import weights_digest
from alaya_tiers.needs import Samples
from alaya_tiers.policies import Reuse
from alaya_tiers.stats import Stats

TIERED = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers whose KV can be stored. A sliding layer keeps all of it here: any prefix of it may be wanted again."""

_SAID_BY_IDS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "labels",
}
"""Arguments of a forward that change nothing in KV beyond what token ids say (the second and third are looked at)."""


class StoredCache(AlayaCache):
    """A session of a DB: an AlayaCache that knows its token ids. ``close()`` lets go of its tokens only."""

    def __init__(
        self,
        session: Session,
        config: PretrainedConfig | None,
        ids: Tensor,
        device: torch.device,
        contexts: Contexts,
        meet: Callable[[PreTrainedModel], None],
    ) -> None:
        self.contexts, self._meet_first = contexts, meet
        self.tenant = ""
        """The secret under which it was made, and under which alone it is stored."""
        self._begin(session, config, TIERED)
        for layer in self.layers:
            if isinstance(layer, AlayaLayer) and layer.number in session.layers:
                layer.dtype = session.layers[layer.number].shape.geometry.dtype
                layer.device, layer.is_initialized = device, True
        self._ids = ids
        self.reuse = Reuse(bool(ids.shape[1]), 0.0, None, "")
        """Whether what is stored was reused, what that costs, and why."""
        self._reused = ids.shape[1]
        self._beside: str | None = None
        """What went into the keys and values beside token ids, if anything did."""
        self._closed = False
        self._ran: weakref.ref[torch.nn.Module] | None = None
        """The model that ran last: its weights were looked at."""

    def known_ids(self, given: Tensor | None) -> Tensor:
        """The ids of all tokens held, int64 [rows, length]. Raises InputError where they are not known."""
        self._check_open()
        length = self.get_query_offset()
        rows = max((len(state.rows) for state in self.session.layers.values()), default=0)
        if not length:
            raise InputError("the session is empty: run the model over it first")
        if self._beside is not None:
            raise InputError(f"{self._beside}: token ids alone do not say what was computed, so it cannot be stored")
        ids = None if self._ids is None else self._ids.cpu()
        if given is not None:
            if given.shape[1] < length or given.shape[0] not in (1, rows):
                raise InputError(f"{tuple(given.shape)} token ids for {rows} rows of {length} tokens in the session")
            self._check_ids(given, length, "the ids of what the session holds")
            ids = given
        if ids is None or ids.shape[1] < length:
            known = 0 if ids is None else ids.shape[1]
            raise InputError(
                f"the session holds {length} tokens and only the first {known} are known: pass input_ids= here, or "
                "model= to create_session()"
            )
        return ids[:, :length].expand(rows, -1).contiguous()

    def note(self, model: torch.nn.Module, arguments: dict[str, Any]) -> None:
        """A forward with these arguments is about to run. Raises InputError, ModelChanged, SessionClosed."""
        self._check_open()
        if self._ran is None or self._ran() is not model:
            weights = weights_digest(model)
            self._check_weights(weights)
            self._weights, self._ran = weights, weakref.ref(model)
        length, ids = self.get_query_offset(), arguments.get("input_ids")
        beside = _beside(arguments, length)
        if beside is not None and self._reused:
            raise InputError(f"{beside}: a stored prefix cannot be reused then; begin with an empty AlayaCache")
        self._beside = self._beside or beside
        known = self._ids
        rows = 1 if ids is None or known is None else max(ids.shape[0], known.shape[0])
        if ids is None or known is None or known.shape[1] < length or {ids.shape[0], known.shape[0]} - {1, rows}:
            self._ids = None if known is None else known[:, :length]
            return
        self._ids = torch.cat([known[:, :length].to(ids.device).expand(rows, -1), ids.expand(rows, -1)], 1)

    def stats(self) -> Stats:
        """What all sessions of the database did so far, and why this one reuses what is stored, or not."""
        return replace(super().stats(), reuse=self.reuse.why)

    def close(self) -> None:
        """Let go of all tokens. Other sessions and what is stored are not touched."""
        self._closed = True
        self.session.clear()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._ran = None
        self._ids, self._reused, self._beside = torch.empty(1, 0, dtype=torch.int64), 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. tokens_to_remove: their negative number, as for DynamicCache."""
        super().crop(tokens_to_remove)
        self._reused = min(self._reused, self.get_query_offset())

    def flush(self) -> None:
        """Not for a session of a database: the other ones' files are in the same place."""
        raise InputError("a session of a database is not flushed but stored: db.store(session)")

    def _weights_of(self, model: PreTrainedModel) -> str:
        return weights_digest(model)

    def _meet(self, model: PreTrainedModel) -> None:
        self._check_open()
        self._meet_first(model)
        self.session.most_tokens = positions_of(model.config)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this session is closed; create_session() makes a new one")


def see(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of models: tells our sessions what is about to run over them."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, StoredCache):
        cache.note(model, {"input_ids": args[0] if args else None} | kwargs)


def _beside(arguments: dict[str, Any], length: int) -> str | None:
    """What of a forward's arguments has a say in KV beside the token ids."""
    for name, value in arguments.items():
        if value is not None and name not in _SAID_BY_IDS:
            return f"the model was given {name}"
    mask, positions, ids = (arguments.get(n) for n in ("attention_mask", "position_ids", "input_ids"))
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask != 0).all())):
        return "rows are padded or masked"
    if positions is not None and ids is not None:
        expected = torch.arange(length, length + ids.shape[1], device=positions.device)
        if positions.shape[-1] != ids.shape[1] or not bool((positions == expected).all()):
            return "positions do not count from 0"
    return None


def samples_of(model: PreTrainedModel, queries: Any) -> Samples:
    """Query samples of this model's layers, with the scale and the cap of its attention. Raises InputError."""
    found = dict[int, float]()
    for module in model.modules():
        layer, scale = getattr(module, "layer_idx", None), getattr(module, "scaling", None)
        if isinstance(layer, int) and isinstance(scale, float):
            found[layer] = scale
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return Samples.of(queries, lambda layer, dim: found.get(layer, float(dim) ** -0.5), softcap)


def check_layers(config: PretrainedConfig) -> None:
    """Refuse models that keep state which is not keys and values of each token."""
    if config.is_encoder_decoder:
        raise UnsupportedModel("an encoder-decoder's keys depend on the encoder's input: its contexts are not stored")
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in TIERED:
            raise UnsupportedModel(
                f"layer {number} of this model keeps {type(layer).__name__}, which holds more or less than keys and "
                "values of each token: its contexts cannot be stored; use AlayaCache"
            )
