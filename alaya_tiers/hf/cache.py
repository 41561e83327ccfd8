"""The cache class: a session behind the interface transformers expects of a DynamicCache."""

import copy
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from alaya_tiers.cache import Session
from alaya_tiers.config import Settings
from alaya_tiers.engine import Engine
from alaya_tiers.errors import AlayaError, ConfigError, InputError, ModelChanged, SessionClosed
from alaya_tiers.explain import Explanation
from alaya_tiers.hf import continuing
from alaya_tiers.hf.layer import AlayaLayer
from alaya_tiers.hf.switch import Switched
from alaya_tiers.hf.weights import weights_sample
from alaya_tiers.recorder import Recorder
from alaya_tiers.snapshot import Model
from alaya_tiers.stats import Stats


class AlayaCache(DynamicCache):
    """A KV cache in three tiers with hard byte budgets. Give it to ``generate`` or a forward as ``past_key_values``.

    config: the model's config; with it the layers that are not plain full attention (sliding, linear, ...) keep
    transformers' own cache layers. settings: a Settings object; or its fields as keyword arguments, for example
    ``device_budget="256MiB", host_budget="2GiB"``. path: a directory for the ssd tier; None makes a temporary one that
    is removed with the cache. max_tokens: refuse longer contexts; by default the model's positions, None = any length.

    ``copy.deepcopy`` is a fork that shares all blocks. ``close()``, or leaving a ``with`` block, frees memory and files
    at once; otherwise that happens when the last fork is garbage-collected.

    Raises ConfigError, StoreError.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Any, ...]] | None = None,
        config: PretrainedConfig | None = None,
        *,
        settings: Settings | None = None,
        path: str | os.PathLike[str] | None = None,
        max_tokens: int | str | None = "auto",
        **overrides: Any,
    ) -> None:
        if isinstance(ddp_cache_data, PretrainedConfig | PreTrainedModel):
            raise ConfigError(
                "the first argument is KV data, as for DynamicCache: write AlayaCache(config=model.config)"
            )
        base = settings if settings is not None else Settings()
        engine = Engine(base.replace(**overrides), None if path is None else os.fspath(path), model_of(config))
        most = positions_of(config) if max_tokens == "auto" else max_tokens
        assert most is None or isinstance(most, int)
        self._begin(Session(engine, most), config, (DynamicLayer,))
        for number, (keys, values, *window) in enumerate(ddp_cache_data or ()):
            make: Any = self.layer_class_to_replicate
            if make is not None and window and window[0] is not None:
                self.layers += [make() for _ in range(len(self.layers), number + 1)]
                self.layers[number] = DynamicSlidingWindowLayer(sliding_window=int(window[0]))
            if keys is not None:  # a layer without data, as DynamicCache has them too
                self.update(keys, values, number)

    def _begin(self, session: Session, config: PretrainedConfig | None, tiered: tuple[type, ...]) -> None:
        """Become a cache of this session; layers that transformers would make one of ``tiered`` are ours."""
        self.session, self._torn = session, False
        self._ids: Tensor | None = None
        """The first tokens, as far as ``generate`` let us see them, int64 [rows, n]; one row stands for any number."""
        self._weights: str | None = None
        undo = _weakly(self)
        if config is None:
            maker = _layer_maker(session, undo, len(session.layers))
            Cache.__init__(self, layer_class_to_replicate=maker)  # type: ignore[arg-type]
            self.layers += [AlayaLayer(session, i, undo) for i in range(len(session.layers))]
        else:
            stock = DynamicCache(config=config).layers  # transformers decides which layer is what
            ours = [AlayaLayer(session, i, undo) if type(s) in tiered else s for i, s in enumerate(stock)]
            Cache.__init__(self, layers=ours)

    @classmethod
    def for_model(cls, model: PreTrainedModel, **settings: Any) -> Self:
        """A cache for this model, which is switched to the "alaya" attention where its code allows that."""
        Switched(model)
        return cls(config=model.config, **settings)

    @classmethod
    def from_dynamic(cls, cache: DynamicCache, config: PretrainedConfig | None = None, **settings: Any) -> Self:
        """A cache with the keys and values of a DynamicCache, which stays as it is.

        config, settings: as for AlayaCache. Layers that are not plain full attention are copied.
        """
        made = cls(config=config, **settings)
        undo = _weakly(made)
        made.layers = [
            AlayaLayer(made.session, i, undo) if type(layer) is DynamicLayer else copy.deepcopy(layer)
            for i, layer in enumerate(cache.layers)
        ]
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
                made.update(layer.keys, layer.values, number)
        return made

    def to_dynamic(self) -> DynamicCache:
        """A DynamicCache with all keys and values, which must fit in memory; this cache stays as it is."""
        made = DynamicCache()
        made.layers = [
            layer.dense() if isinstance(layer, AlayaLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return made

    # ------------------------------------------------------------------ what is ours
    def stats(self) -> Stats:
        """What the cache did so far."""
        return self.session.stats()

    def flush(self) -> None:
        """Write all full blocks to the store, with the metadata any Zarr reader needs. Raises StoreError."""
        self.session.flush()

    def build_index(self, say: Callable[[int, int], None] = lambda done, all_of_them: None) -> None:
        """See Session.build_index."""
        self.session.build_index(say)

    @contextmanager
    def record(self, path: str | os.PathLike[str]) -> Iterator[Recorder]:
        """See Session.record."""
        with self.session.record(path) as recorder:
            yield recorder

    def explain(self) -> Explanation:
        """See Session.explain."""
        return self.session.explain()

    def close(self) -> None:
        """Free all memory and files, also those of forks. Using the cache afterwards raises SessionClosed."""
        self.session.engine.close()

    def fork(self) -> Self:
        """Another cache with the same tokens, which shares all blocks: ``copy.deepcopy``."""
        return copy.deepcopy(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what transformers calls
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values. On an error of Session.update the whole step is undone."""
        if self._torn:
            raise SessionClosed("a step failed halfway and some layers cannot go back: reset() the cache, start over")
        self.session.engine.check_open()
        try:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except AlayaError:
            self._undo(self.session.length(layer_idx))
            raise
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held. When a prefill of ``generate`` asks, see ``_continue`` for what it is told and refused."""
        length = super().get_seq_length(layer_idx)
        if not torch.compiler.is_compiling() and (prompt := continuing.asked()) is not None:
            return self._continue(prompt, length)
        return length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return super().get_seq_length(layer_idx)

    def activate_past_recording(self) -> None:
        """Assisted decoding begins."""
        if continuing.assisting() and super().get_seq_length():
            raise InputError(
                "assisted decoding of transformers runs the whole prompt, whatever the cache holds: pass an empty "
                "cache, or continue this one without an assistant and without prompt lookup"
            )
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        self._torn, self._ids, self._weights = False, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. tokens_to_remove: their negative number, as for DynamicCache."""
        super().crop(tokens_to_remove)
        if self._ids is not None:
            self._ids = self._ids[:, : super().get_seq_length()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make the batch the rows ``beam_idx``, which share their blocks."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select_ids(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self._select_ids(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times in a row; they share their blocks."""
        super().batch_repeat_interleave(repeats)
        if self._ids is not None and self._ids.shape[0] > 1:
            self._ids = self._ids.repeat_interleave(repeats, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = copy.copy(self)
        other.session = Session(self.session.engine, self.session.most_tokens)
        undo = _weakly(other)
        for number in self.session.layers:
            other.session.layers[number] = self.session.fork(number)
        other.layers = [
            layer.fork(other.session, undo) if isinstance(layer, AlayaLayer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        if self.layer_class_to_replicate is not None:
            maker = _layer_maker(other.session, undo, len(other.layers))
            other.layer_class_to_replicate = maker  # type: ignore[assignment]
        return other

    # ------------------------------------------------------------------ inside
    def _continue(self, prompt: continuing.Prompt, length: int) -> int:
        """How many tokens of ``prompt`` need not run. Raises InputError, ModelChanged; nothing was changed then."""
        self._meet(prompt.model)
        weights = self._weights_of(prompt.model)
        if not length:
            self._ids, self._weights = prompt.ids if prompt.whole else None, weights
            return 0
        self._check_weights(weights)
        new_only = f"only the new tokens with an attention_mask of {length} + n ones"
        if not prompt.whole:
            if prompt.covered is not None and prompt.covered != length + prompt.tokens:
                raise InputError(
                    f"the attention_mask speaks of {prompt.covered} tokens, the cache holds {length} and "
                    f"{prompt.tokens} are new: give the whole text, or {new_only}"
                )
        elif prompt.tokens < length:
            raise InputError(
                f"the prompt has {prompt.tokens} tokens and the cache {length} already: give the whole text so far "
                f"and what is new, or {new_only}, or crop() the cache"
            )
        else:
            self._check_ids(prompt.ids, length, new_only)
            if prompt.tokens == length:
                self._back_one(length)
                length -= 1
            self._ids = prompt.ids
        self._weights = weights
        return length

    def _weights_of(self, model: PreTrainedModel) -> str:
        """What tells this model's weights from others."""
        return weights_sample(model)

    def _meet(self, model: PreTrainedModel) -> None:
        """The model that is about to fill or use the cache."""

    def _check_weights(self, weights: str) -> None:
        """Raise ModelChanged for another model than the one that filled the cache."""
        if self._weights not in (None, weights):
            raise ModelChanged(
                "the cache holds keys and values of other weights than the model's now: reset() it, or make a new one"
            )

    def _check_ids(self, ids: Tensor | None, length: int, new_only: str) -> None:
        """Raise InputError where a prompt does not begin with the tokens in the cache, as far as they are known."""
        if ids is None or self._ids is None or (ids.shape[0] != self._ids.shape[0] and self._ids.shape[0] != 1):
            return
        known = self._ids[:, :length].to(ids.device)
        differs = (ids[:, : known.shape[1]] != known).any(0)
        if differs.any():
            raise InputError(
                f"the prompt differs from the {length} tokens in the cache at position {int(differs.int().argmax())}: "
                f"give the whole text so far and what is new, or {new_only}; for another text, crop() the cache to "
                "what is common, or make a new one"
            )

    def _back_one(self, length: int) -> None:
        """The last token must run again, for its logits: forget it. Raises InputError where layers cannot go back."""
        stock: dict[int, Any] = {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, AlayaLayer)}
        before = copy.deepcopy(stock)
        try:
            for layer in stock.values():
                layer.crop(-1)
        except Exception as error:
            for i, layer in before.items():
                self.layers[i] = layer
            raise InputError(
                f"the cache holds all {length} tokens of this prompt, and layers of this model "
                f"({type(layer).__name__}) cannot go back to run the last one again: add a token to the prompt, or "
                "keep a fork (copy.deepcopy) from before the last token"
            ) from error
        for tiered in self.layers:
            if isinstance(tiered, AlayaLayer):
                tiered.crop(-1)

    def _select_ids(self, rows: Tensor) -> None:
        if self._ids is not None and self._ids.shape[0] > 1:
            self._ids = self._ids[torch.as_tensor(rows, device=self._ids.device)]

    def _undo(self, length: int) -> None:
        """A step failed: go back to ``length`` tokens in every layer."""
        self._ids = None if self._ids is None else self._ids[:, :length]
        layers: list[Any] = self.layers
        for layer in layers:
            excess = layer.get_seq_length() - length if hasattr(layer, "get_seq_length") else 0
            try:
                if excess > 0:
                    layer.crop(-excess)
            except Exception:  # a sliding window that already forgot the tokens before
                self._torn = True


def _weakly(cache: AlayaCache) -> Callable[[int], None]:
    """The cache's undo, without keeping the cache alive: a dropped fork lets go of its blocks at once."""
    method = weakref.WeakMethod(cache._undo)

    def undo(length: int) -> None:
        if (found := method()) is not None:
            found(length)

    return undo


def _layer_maker(session: Session, undo: Callable[[int], None], first: int) -> Callable[[], AlayaLayer]:
    """Makes the next layer each time it is called: for caches that know no config."""
    numbers = itertools.count(first)
    return lambda: AlayaLayer(session, next(numbers), undo)


def positions_of(config: PretrainedConfig | None) -> int | None:
    """How many positions the model has; None where it has no limit or stretches them."""
    if config is None:
        return None
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return None
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}


def model_of(config: PretrainedConfig | None) -> Model | None:
    """What identifies the model in a store: its config, as JSON values."""
    if config is None:
        return None
    found: Model = json.loads(json.dumps(config.to_dict(), default=str))
    return {k: v for k, v in found.items() if k not in _NOT_OF_THE_MODEL}
