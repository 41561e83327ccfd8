"""The database of contexts, for transformers: sessions are caches, models say who they are."""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from alaya_tiers.cache import Session
from alaya_tiers.config import Settings
from alaya_tiers.contexts import Chunk, Contexts, Say, silent
from alaya_tiers.engine import Engine
from alaya_tiers.errors import InputError, SessionClosed, UnsupportedModel
from alaya_tiers.hf.cache import AlayaCache, model_of, positions_of
from alaya_tiers.hf.continuing import weights_digest
from alaya_tiers.hf.layer import AlayaLayer
from alaya_tiers.identity import Identity, Tokens, model_digest
from alaya_tiers.manifest import Context
from alaya_tiers.stats import Stats

KV = DynamicCache | Sequence[tuple[Tensor, Tensor]] | Iterable[Chunk]
"""Keys and values: of a DynamicCache, layer by layer [1, kv_heads, tokens, dim], or an iterator of such in chunks."""

_TIERED = (DynamicLayer, DynamicSlidingWindowLayer)
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


class DB:
    """Contexts in a directory, and sessions on them. One process at a time; sessions share its budgets.

    path: the directory, made if need be. settings: a Settings object; or its fields as keyword arguments, for example
    ``device_budget="256MiB", host_budget="2GiB"``. model: that of all sessions which are not given one. tenant: a secret
    text; what is stored under it is found under it only.

    ``close()``, or leaving a ``with`` block, ends all sessions. What was stored stays, what was not is removed.

    Raises ConfigError, StoreError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        model: PreTrainedModel | None = None,
        tenant: str = "",
        **overrides: Any,
    ) -> None:
        base = settings if settings is not None else Settings()
        described = None if model is None else model_of(model.config)
        self._engine = Engine(base.replace(**overrides), os.fspath(path), described)
        try:
            self._contexts = Contexts(self._engine)
        except BaseException:
            self._engine.close()
            raise
        self._model, self._tenant = model, tenant
        self._hooks: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _unhook, self._hooks).atexit = False

    # ------------------------------------------------------------------ sessions
    def create_session(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        model: PreTrainedModel | None = None,
        config: PretrainedConfig | None = None,
    ) -> tuple["StoredCache", Tensor]:
        """A cache that holds the longest stored prefix of a prompt, and the tokens that are still to be processed.

        input_ids: [rows, tokens] or [tokens], without padding. At least the last token of each row is left, because
        the model's answer to it is what generation starts from. Give ``generate`` the whole prompt and the session; or
        a forward only the rest. model: who will run; without it the store's only model is meant, and another one is
        refused when it runs. Nothing is read from disk but the records of the segments that are found.

        Raises InputError, UnsupportedModel, StoreError.
        """
        self._engine.check_open()
        ids = _ids(input_ids)
        model = self._model if model is None else model
        config = model.config if config is None and model is not None else config
        weights = None if model is None else weights_digest(model)
        if config is not None:
            _check_layers(config)
            self._engine.store.require(model_of(config))
        dtype = None if model is None else str(model.dtype).removeprefix("torch.")
        rows, length, found = self._longest(ids.numpy(), weights, dtype)
        device = torch.device("cpu") if model is None else model.device
        session = self._contexts.open(rows, length, positions_of(config), device)
        cache = StoredCache(self, session, config, ids[:, :length], device)
        cache._weights = found.weights if found is not None and length else weights
        if model is not None:
            self._watch(model)
        return cache, torch.as_tensor(input_ids).view(ids.shape)[:, length:]

    def store(
        self, session: "AlayaCache", input_ids: Tensor | Sequence[int] | None = None, *, say: Say = silent
    ) -> list[str]:
        """Make all tokens of a session durable and reusable; the id of the context of each row.

        The session may go on, and be stored again: what is stored already is not written twice. input_ids: the token
        ids of what the session holds, and perhaps more; needed only where the model that ran is not known to the
        session (it was not given to ``create_session`` and ``generate`` was not used). say: told how many blocks are
        on disk, of how many.

        Raises InputError, StoreError; nothing was stored then, and the session and what is stored are unharmed.
        """
        self._engine.check_open()
        if not isinstance(session, StoredCache) or session.database is not self:
            raise InputError("only a session of this database can be stored: make it by create_session()")
        ids = session.known_ids(None if input_ids is None else _ids(input_ids))
        return self._contexts.store(session.session, ids.numpy(), self._identity(session), self._tenant, say)

    # ------------------------------------------------------------------ contexts
    def import_context(
        self,
        input_ids: Tensor | Sequence[int],
        kv: KV,
        *,
        model: PreTrainedModel | None = None,
        lossy: bool = False,
        say: Say = silent,
    ) -> str:
        """Store a context that was computed elsewhere; its id.

        input_ids: [tokens] or [1, tokens]. kv: a DynamicCache, keys and values of each layer, or an iterator of such
        in chunks of tokens, of which only one has to fit in memory. model: whose KV it is. lossy: whether it was
        computed by approximate attention. say: told how many tokens were taken, of how many.

        Raises InputError, UnsupportedModel, StoreError; nothing was stored then.
        """
        self._engine.check_open()
        ids, model = _ids(input_ids), self._model if model is None else model
        if model is None:
            raise InputError("whose keys and values are these? Pass model=, here or to DB()")
        if ids.shape[0] != 1:
            raise InputError(f"one context at a time: input_ids has {ids.shape[0]} rows")
        _check_layers(model.config)
        self._engine.store.require(model_of(model.config))
        chunks = _chunks(kv)
        first = next(chunks, None)
        if not first:
            raise InputError("there are no keys and values to store")
        dtype = str(first[0][0].dtype).removeprefix("torch.")
        identity = self._identity_of(weights_digest(model), dtype, lossy=lossy)
        return self._contexts.load(ids[0].numpy(), _with(first, chunks), identity, self._tenant, say)

    def export_context(self, context: str) -> tuple[Tensor, Iterator[Chunk]]:
        """Token ids [tokens] of a context, and its keys and values, segment by segment: what import_context takes."""
        self._engine.check_open()
        return torch.from_numpy(self._contexts.tokens(context)), (kv for _, kv in self._contexts.read(context))

    def contexts(self) -> list[Context]:
        """What is stored, oldest first; of all tenants."""
        return sorted(self._contexts.manifest.contexts.values(), key=lambda c: c.created)

    def delete(self, context: str) -> None:
        """Forget a context and what only it needed. Sessions on it may go on. Raises InputError, StoreError."""
        self._contexts.delete(context)

    # ------------------------------------------------------------------ life
    def close(self) -> None:
        """End all sessions, remove what was not stored, unlock the directory. Twice is fine."""
        _unhook(self._hooks)
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside
    def _longest(
        self, ids: Tokens, weights: str | None, dtype: str | None
    ) -> tuple[list[list[str]], int, Identity | None]:
        """The chains of segments that hold the longest stored prefix of every row, its length, and who computed it."""
        s = self._engine.settings
        found: list[tuple[int, list[list[str]], Identity]] = []
        for root, identity in self._contexts.manifest.identities.items():
            fits = weights in (None, identity.weights) and dtype in (None, identity.dtype)
            fits &= (identity.block_tokens, identity.segment_tokens) == (s.block_tokens, s.segment_tokens)
            fits &= s.mode == "sparse" or not identity.lossy
            if fits and identity.root(self._tenant) == root:
                rows = [self._contexts.match(root, row[:-1]) for row in ids]
                found.append((min(n for _, n in rows), [names for names, _ in rows], identity))
        if len({(i.weights, i.dtype) for _, _, i in found}) > 1:
            raise InputError("contexts of several models are stored here: say which one will run, by model=")
        if not found:
            return [[]] * len(ids), 0, None
        length, rows, identity = max(found, key=lambda f: (f[0], not f[2].lossy))
        return rows, length, identity

    def _identity(self, session: "StoredCache") -> Identity:
        if session._weights is None:
            raise InputError("which model computed this is not known: pass model= to create_session()")
        geometry = next(iter(session.session.layers.values())).shape.geometry
        dtype = str(geometry.dtype).removeprefix("torch.")
        return self._identity_of(session._weights, dtype, lossy=self._engine.settings.mode == "sparse")

    def _identity_of(self, weights: str, dtype: str, *, lossy: bool) -> Identity:
        s = self._engine.settings
        return Identity(
            model=model_digest(self._engine.store.model),
            weights=weights,
            dtype=dtype,
            block_tokens=s.block_tokens,
            segment_tokens=s.segment_tokens,
            lossy=lossy,
        )

    def _watch(self, model: PreTrainedModel) -> None:
        """See the token ids that the model runs over one of our sessions, from here on."""
        if id(model) not in self._hooks:
            self._hooks[id(model)] = model.register_forward_pre_hook(_note, with_kwargs=True)


class StoredCache(AlayaCache):
    """A session of a DB: an AlayaCache that knows its token ids. ``close()`` lets go of its tokens only."""

    def __init__(
        self, database: DB, session: Session, config: PretrainedConfig | None, ids: Tensor, device: torch.device
    ) -> None:
        self.database = database
        self._begin(session, config, _TIERED)
        for layer in self.layers:
            if isinstance(layer, AlayaLayer) and layer.number in session.layers:
                layer.dtype = session.layers[layer.number].shape.geometry.dtype
                layer.device, layer.is_initialized = device, True
        self._ids = ids
        self._reused = ids.shape[1]
        self._beside: str | None = None
        """What went into the keys and values beside token ids, if anything did."""
        self._closed = False

    def known_ids(self, given: Tensor | None) -> Tensor:
        """The ids of all tokens held, int64 [rows, length]. Raises InputError where they are not known."""
        length, rows = self.get_query_offset(), max((layer.batch_size for layer in self.layers), default=0)
        self._check_open()
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

    def note(self, arguments: dict[str, Any]) -> None:
        """A forward with these arguments is about to run. Raises InputError, SessionClosed."""
        self._check_open()
        length, ids = self.get_query_offset(), arguments.get("input_ids")
        beside = _beside(arguments, length)
        if beside is not None and self._reused:
            raise InputError(f"{beside}: a stored prefix cannot be reused then; begin with an empty AlayaCache")
        self._beside = self._beside or beside
        if ids is None or self._ids is None or self._ids.shape[1] < length:
            self._ids = None if self._ids is None else self._ids[:, :length]
            return
        known = self._ids[:, :length].to(ids.device)
        rows = max(ids.shape[0], known.shape[0])
        self._ids = torch.cat([known.expand(rows, -1), ids.expand(rows, -1)], 1)

    def close(self) -> None:
        """Let go of all tokens. Other sessions and what is stored are not touched."""
        self._closed = True
        self.session.clear()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._ids, self._reused, self._beside = torch.empty(1, 0, dtype=torch.int64), 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. tokens_to_remove: their negative number, as for DynamicCache."""
        super().crop(tokens_to_remove)
        self._reused = min(self._reused, self.get_query_offset())

    def flush(self) -> None:
        """Not for a session of a database: the other ones' files are in the same place."""
        raise InputError("a session of a database is not flushed but stored: db.store(session)")

    def stats(self) -> Stats:
        """What all sessions of the database did so far."""
        return super().stats()

    def _meet(self, model: PreTrainedModel) -> None:
        self._check_open()
        _check_layers(model.config)
        self.database._engine.store.require(model_of(model.config))
        self.session.most_tokens = positions_of(model.config)
        self.database._watch(model)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this session is closed; create_session() makes a new one")


def _note(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: tells our sessions what is about to run over them."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, StoredCache):
        cache.note({"input_ids": args[0] if args else None} | kwargs)


def _unhook(hooks: dict[int, RemovableHandle]) -> None:
    while hooks:
        hooks.popitem()[1].remove()


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


def _ids(input_ids: Tensor | Sequence[int]) -> Tensor:
    """int64 [rows, tokens], on the CPU."""
    ids = torch.as_tensor(input_ids)
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.ndim not in (1, 2) or not ids.numel():
        raise InputError("input_ids are token ids, integers [rows, tokens] or [tokens], at least one")
    return ids.detach().to("cpu", torch.int64).view(-1, ids.shape[-1])


def _check_layers(config: PretrainedConfig) -> None:
    """Refuse models that keep state which is not keys and values of each token."""
    if config.is_encoder_decoder:
        raise UnsupportedModel("an encoder-decoder's keys depend on the encoder's input: its contexts are not stored")
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in _TIERED:
            raise UnsupportedModel(
                f"layer {number} of this model keeps {type(layer).__name__}, which holds more or less than keys and "
                "values of each token: its contexts cannot be stored; use AlayaCache"
            )


def _chunks(kv: KV) -> Iterator[Chunk]:
    """All of it, chunk by chunk."""
    if isinstance(kv, DynamicCache):
        yield [(layer.keys, layer.values) for layer in kv.layers]  # type: ignore[misc]
    elif isinstance(kv, Sequence) and kv and isinstance(kv[0][0], Tensor):
        yield kv  # type: ignore[misc]
    else:
        yield from kv  # type: ignore[misc]


def _with(first: Chunk, rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from rest
