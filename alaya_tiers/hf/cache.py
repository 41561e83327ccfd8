"""The cache class: a session behind the interface transformers expects of a DynamicCache."""

import copy
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.engine import Engine
from alaya_tiers.errors import AlayaError, ConfigError, InputError, SessionClosed
from alaya_tiers.hf.handles import KVHandle
from alaya_tiers.hf.switch import Switched
from alaya_tiers.stats import Stats
from alaya_tiers.store import Model


class AlayaLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One full-attention layer in the tiers. ``update`` returns handles, not tensors."""

    is_compileable, is_sliding, is_croppable, supports_early_init = False, False, True, True

    def __init__(self, session: Session, number: int, undo: Callable[[int], None]) -> None:
        self.session, self.number = session, number
        self._undo = undo
        self.version = 0
        self.before = 0
        """Length before the last update: where to go back to when a step fails."""
        self.is_initialized = False
        self.dtype, self.device = torch.float32, torch.device("cpu")

    # ------------------------------------------------------------------ what a forward calls
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.before = self.get_seq_length()
        self.session.update(self.number, key_states, value_states)
        self.lazy_initialization(key_states, value_states)
        self.version += 1
        length = self.get_seq_length()
        k_shape = (*key_states.shape[:2], length, key_states.shape[3])
        v_shape = (*value_states.shape[:2], length, value_states.shape[3])
        return (
            KVHandle(self, "k", k_shape, self.dtype, self.device),
            KVHandle(self, "v", v_shape, self.dtype, self.device),
        )

    def attend(
        self,
        query: Tensor,
        visible: Callable[[int], Visible],
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        *,
        latent: bool = False,
    ) -> Tensor:
        """Exact attention; see TieredLayer."""
        try:
            with torch.no_grad():
                rows = [visible(r) for r in range(query.shape[0])]
                return self.session.attention(self.number, query, rows, scale, softcap, sinks, latent=latent)
        except AlayaError:
            self._undo(self.before)
            raise

    def gather(self, role: str) -> Tensor:
        """All of K ("k") or V ("v") as one tensor."""
        k, v = self.session.gather(self.number)
        return (k if role == "k" else v).to(self.device)

    # ------------------------------------------------------------------ sizes
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.session.length(self.number)

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return self.session.rows(self.number) if self.is_initialized else 0

    # ------------------------------------------------------------------ what generate does between forwards
    def reset(self) -> None:
        self._change()
        if self.number in self.session.layers:
            self.session.layers.pop(self.number).clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise InputError("crop takes the negative number of tokens to remove, e.g. crop(-3)")
        if tokens_to_remove and self.is_initialized:
            self._change()
            self.session.crop(max(0, self.get_seq_length() + tokens_to_remove), self.number)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size)[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select([r for r in range(self.batch_size) for _ in range(repeats)])

    def offload(self) -> None:
        """Blocks move by themselves."""

    def prefetch(self) -> None:
        """Blocks move by themselves."""

    # ------------------------------------------------------------------ code that reads or assigns whole tensors
    @property
    def keys(self) -> Tensor | None:
        """All keys, gathered; None before the first update."""
        return self.gather("k") if self.is_initialized else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            self._assign(value, self.values if self.is_initialized else value)

    @property
    def values(self) -> Tensor | None:
        """All values, gathered; None before the first update."""
        return self.gather("v") if self.is_initialized else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            self._assign(self.keys if self.is_initialized else value, value)

    # ------------------------------------------------------------------ inside
    def fork(self, session: Session, undo: Callable[[int], None]) -> "AlayaLayer":
        """This layer in a forked session."""
        other = AlayaLayer(session, self.number, undo)
        other.dtype, other.device, other.is_initialized = self.dtype, self.device, self.is_initialized
        return other

    def _select(self, rows: Sequence[int]) -> None:
        if self.is_initialized:
            self._change()
            self.session.select(self.number, rows)

    def _assign(self, k: Tensor | None, v: Tensor | None) -> None:
        assert k is not None
        assert v is not None
        n = min(k.shape[2], v.shape[2])
        self.reset()
        self.update(k[:, :, :n], v[:, :, :n])

    def _change(self) -> None:
        self.version += 1


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
        engine = Engine(base.replace(**overrides), None if path is None else os.fspath(path), _model(config))
        most = _positions(config) if max_tokens == "auto" else max_tokens
        assert most is None or isinstance(most, int)
        self.session, self._torn = Session(engine, most), False
        undo = _weakly(self)
        if config is None:
            Cache.__init__(self, layer_class_to_replicate=_layer_maker(self.session, undo, 0))  # type: ignore[arg-type]
        else:
            stock = DynamicCache(config=config).layers  # transformers decides which layer is what
            tiered = (type(layer) is DynamicLayer for layer in stock)
            ours = [AlayaLayer(self.session, i, undo) if t else stock[i] for i, t in enumerate(tiered)]
            Cache.__init__(self, layers=ours)
        for number, (keys, values, *_) in enumerate(ddp_cache_data or ()):
            if keys is not None:  # a layer without data, as DynamicCache has them too
                self.update(keys, values, number)

    @classmethod
    def for_model(cls, model: PreTrainedModel, **settings: Any) -> Self:
        """A cache for this model, which is switched to the "alaya" attention where its code allows that."""
        Switched(model)
        return cls(config=model.config, **settings)

    # ------------------------------------------------------------------ what is ours
    def stats(self) -> Stats:
        """What the cache did so far."""
        return self.session.stats()

    def flush(self) -> None:
        """Write all full blocks to the store, with the metadata any Zarr reader needs. Raises StoreError."""
        self.session.flush()

    def close(self) -> None:
        """Free all memory and files, also those of forks. Using the cache afterwards raises SessionClosed."""
        self.session.engine.close()

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

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        self._torn = False

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
    def _undo(self, length: int) -> None:
        """A step failed: go back to ``length`` tokens in every layer."""
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


def _positions(config: PretrainedConfig | None) -> int | None:
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


def _model(config: PretrainedConfig | None) -> Model | None:
    """What identifies the model in a store: its config, as JSON values."""
    if config is None:
        return None
    found: Model = json.loads(json.dumps(config.to_dict(), default=str))
    return {k: v for k, v in found.items() if k not in _NOT_OF_THE_MODEL}
