"""The database of contexts, for transformers: sessions are caches, models say who they are."""

import copy
import errno
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from alaya_tiers.config import OnCorrupt, Settings
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ConfigError, InputError, StoreCorrupt, StoreFormat
from alaya_tiers.hf.cache import AlayaCache, model_of, positions_of
from alaya_tiers.hf.stored import StoredCache, check_layers, samples_of, see
from alaya_tiers.hf.weights import weights_digest
from alaya_tiers.identity import Identity, Tokens, model_digest
from alaya_tiers.manifest import Context, Manifest
from alaya_tiers.observe import observe
from alaya_tiers.parts import Chunk, Say, silent
from alaya_tiers.policies import REUSE, Patience, Shares, by_name
from alaya_tiers.recorder import Recorder, recording
from alaya_tiers.retention import Paused, Pin, Retention
from alaya_tiers.seams import SystemDisk
from alaya_tiers.snapshot import Snapshot
from alaya_tiers.stats import Stats
from alaya_tiers.verify import Damage
from alaya_tiers.wear import Usage
from alaya_tiers.weigh import weigh

KV = DynamicCache | Sequence[tuple[Tensor, Tensor]] | Iterable[Chunk]
"""Keys and values: of a DynamicCache, layer by layer [1, kv_heads, tokens, dim], or an iterator of such in chunks."""


Hooks = weakref.WeakKeyDictionary[PreTrainedModel, RemovableHandle]
"""What tells us what a model runs, by model."""


class DB:
    """Contexts in a directory, and sessions on them. One process writes, any number reads; sessions share its budgets.

    path: the directory, made if need be. read_only: open what is stored now, beside the process that writes; new tokens
    of sessions live in a temporary directory, and what is stored later is seen after ``refresh()``. settings: Settings;
    or its fields as keyword arguments, for example ``device_budget="256MiB", host_budget="2GiB"``. model: that
    of all sessions which are not given one. tenant: a secret text; what is stored under it is found under it only, and
    nothing else is seen, listed or deleted here. shares: a policy by which contexts leave when the ssd budget, or a
    tenant's share of it, is full; without one nothing leaves by itself. patience: the policy of ``pause``.

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
        read_only: bool = False,
        shares: Shares | None = None,
        patience: Patience | None = None,
        **overrides: Any,
    ) -> None:
        base = settings if settings is not None else Settings()
        described = None if model is None else model_of(model.config)
        if read_only and not os.path.isdir(path):
            raise StoreFormat(errno.ENOENT, "there is no store here; open it without read_only=True first", str(path))
        snapshot = Snapshot(path, described, SystemDisk()) if read_only else None
        try:
            own = None if snapshot is not None else os.fspath(path)
            self._engine = Engine(base.replace(**overrides), own, described)
            try:
                self._contexts = Contexts(self._engine, snapshot)
            except BaseException:
                self._engine.close()
                raise
        except BaseException:
            if snapshot is not None:
                snapshot.close()
            raise
        self._model, self._tenant = model, tenant
        self._tenants = {"": tenant}
        self._parent: DB | None = None
        self._known = set[Identity]()
        self._patience = patience if patience is not None else Patience()
        self._retention = Retention(self._contexts, shares, self._tenant_of)
        self._hooks: Hooks = weakref.WeakKeyDictionary()
        weakref.finalize(self, _unhook, self._hooks).atexit = False

    @property
    def model(self) -> PreTrainedModel | None:
        """That of sessions which are not given one."""
        return self._model

    def tenant(self, name: str, secret: str) -> "DB":
        """The same database as one tenant sees it: only what was stored under this secret. name: for ``shares``.

        Both have the same budgets, model and life: closing one closes both. Raises InputError when the name or the
        secret is another tenant's.
        """
        if self._tenants.get(name, secret) != secret or (
            name not in self._tenants and secret in self._tenants.values()
        ):
            raise InputError(f"{name!r} or its secret is another tenant's: each has a name and a secret of its own")
        self._tenants[name] = secret
        made = copy.copy(self)
        made._tenant, made._parent = secret, self
        return made

    # ------------------------------------------------------------------ sessions
    def create_session(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        model: PreTrainedModel | None = None,
        config: PretrainedConfig | None = None,
        on_corrupt: OnCorrupt | None = None,
        reuse: str = "auto",
    ) -> tuple["StoredCache", Tensor]:
        """A cache that holds the longest stored prefix of a prompt, and the tokens that are still to be processed.

        input_ids: [rows, tokens] or [tokens], without padding. At least the last token of each row is left, because
        the model's answer to it is what generation starts from. Give ``generate`` the whole prompt and the session; or
        a forward only the rest. model: who will run; without it the store's only model is meant, and another one is
        refused when it runs. Nothing is read from disk but the records of the segments that are found, unless the
        settings say ``check_on_open``. on_corrupt: what to do about damage that is known, see Settings; None: what the
        settings say. Damage that nobody knows of yet is StoreCorrupt when attention asks for the block; a session made
        after that knows of it.

        reuse: "auto" computes the prefix again where reading it takes longer than a prefill of it did when one was
        measured here (``ssd_rate`` says how fast the disk is); "always" or "never" decide beforehand. ``reuse`` of the
        session tells what was decided and why.

        Raises ConfigError, InputError, UnsupportedModel, StoreError.
        """
        self._engine.check_open()
        ids = _ids(input_ids)
        model = self._model if model is None else model
        config = model.config if config is None and model is not None else config
        weights = None if model is None else weights_digest(model)
        if config is not None:
            self._require(config)
        dtype = None if model is None else str(model.dtype).removeprefix("torch.")
        device = torch.device("cpu") if model is None else model.device
        weigher, policy = by_name(REUSE, reuse), self._engine.settings.on_corrupt if on_corrupt is None else on_corrupt
        while True:
            rows, length, found = self._longest(ids.numpy(), weights, dtype, policy)
            try:
                session = self._contexts.open(rows, length, positions_of(config), device)
                break
            except StoreCorrupt as error:
                if error.segment is None:
                    raise  # else it is known now, and dealt with
        decision = weigh(session, weigher, length * len(ids), self._prefill(weights, found))
        if length and not decision.reused:
            session.clear()
            session, length = self._contexts.open(rows, 0, positions_of(config), device), 0
        if self._engine.recorder is not None:
            for row in ids.numpy():
                self._engine.recorder.request(row, length)
        cache = StoredCache(session, config, ids[:, :length], device, self._contexts, self._meet)
        cache.reuse = decision
        cache.tenant = self._tenant
        cache._weights = found.weights if found is not None and length else weights
        if model is not None:
            self._meet(model)
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
        if not isinstance(session, StoredCache) or session.contexts is not self._contexts:
            raise InputError("only a session of this database can be stored: make it by create_session()")
        if session.tenant != self._tenant:
            raise InputError("the session is another tenant's: store it there")
        ids = session.known_ids(None if input_ids is None else _ids(input_ids))
        if (prefill := self._engine.steps.prefill_rate) is not None and session._weights is not None:
            self._engine.wear.prefill[session._weights] = prefill
        return self._contexts.store(session.session, ids.numpy(), self._identity(session), self._tenant, say)

    @contextmanager
    def record(self, path: str | os.PathLike[str]) -> Iterator[Recorder]:
        """Inside, prompts and what all sessions do are written to a file: a trace that ``alaya-tiers simulate``
        replays. Of prompts only hashes are kept. Raises ConfigError."""
        with recording(self._engine, path, self._engine.store.model) as recorder:
            yield recorder

    # ------------------------------------------------------------------ contexts
    def import_context(
        self,
        input_ids: Tensor | Sequence[int],
        kv: KV,
        *,
        model: PreTrainedModel | None = None,
        lossy: bool = False,
        say: Say = silent,
        keep_every: int = 0,
        queries: Sequence[Tensor] | None = None,
    ) -> str:
        """Store a context that was computed elsewhere; its id.

        input_ids: [tokens] or [1, tokens]. kv: a DynamicCache, keys and values of each layer, or an iterator of such
        in chunks of tokens, of which only one has to fit in memory. model: whose KV it is. lossy: whether it was
        computed by approximate attention. say: told how many tokens were taken, of how many. keep_every: make what is
        there durable after so many tokens, rounded up to whole segments, as a context of its own that goes when the
        import is complete; one that was cut off is given again and writes only what is missing. 0 = all or nothing.
        queries: samples of queries over this context, for each layer [query_heads, n, head_dim] as attention gets them
        (rotated, not scaled). What their heads need is counted once and stored: the first step of a sparse session on
        the context, or on one that goes on from it, is planned as if it had made many before. All keys are read twice.

        Raises InputError, UnsupportedModel, StoreError; nothing was stored then but what ``keep_every`` says.
        """
        self._engine.check_open()
        ids, model = _ids(input_ids), self._model if model is None else model
        if model is None:
            raise InputError("whose keys and values are these? Pass model=, here or to DB()")
        if ids.shape[0] != 1:
            raise InputError(f"one context at a time: input_ids has {ids.shape[0]} rows")
        self._require(model.config)
        samples = None if queries is None else samples_of(model, queries)
        chunks = _chunks(kv)
        first = next(chunks, None)
        if not first:
            raise InputError("there are no keys and values to store")
        dtype = str(first[0][0].dtype).removeprefix("torch.")
        identity = self._identity_of(weights_digest(model), dtype, lossy=lossy)
        if samples is not None:
            samples.fit({n: (k.shape[-3], k.shape[-1]) for n, (k, _) in enumerate(first)})
        kv = _with(first, chunks)
        return self._contexts.load(ids[0].numpy(), kv, identity, self._tenant, say, keep_every, samples)

    def export_context(self, context: str) -> tuple[Tensor, Iterator[Chunk]]:
        """Token ids [tokens] of a context, and its keys and values, segment by segment: what import_context takes."""
        self._engine.check_open()
        self._own(context)
        return torch.from_numpy(self._contexts.tokens(context)), (kv for _, kv in self._contexts.read(context))

    def build_index(self, context: str, *, say: Say = silent) -> None:
        """Make the index of a stored context for sparse sessions, and keep it beside the context.

        Sparse sessions do so when they are stored. Nothing needs it: idle time makes what is missing, for each opening
        anew. It may be interrupted or killed at any point: segments that are whole are kept, and the next call goes on
        after them. say: told how many runs of blocks are done, of how many. Raises ConfigError in exact mode,
        InputError, StoreError.
        """
        self._engine.check_open()
        if self._engine.sparse is None:
            raise ConfigError("an index serves sparse sessions: open the database with mode='sparse'")
        self._own(context)
        self._contexts.index(context, say)

    def contexts(self) -> list[Context]:
        """What is stored, oldest first; of this tenant."""
        self._engine.check_open()
        manifest = self._contexts.manifest
        mine = [c for c in manifest.contexts.values() if self._is_own(manifest, c.id)]
        return sorted(mine, key=lambda c: c.created)

    def delete(self, context: str) -> None:
        """Forget a context and what only it needed. Sessions on it may go on. Raises InputError, StoreError."""
        self._engine.check_open()
        self._own(context)
        self._contexts.delete(context)

    # ------------------------------------------------------------------ what stays
    def pin(self, context: str, *, owner: str, reason: str, seconds: float) -> Pin:
        """Keep a context on disk, whatever the policy would do, for so many seconds or until ``unpin``.

        ``delete`` is not held up. Pins end with the process. Raises InputError, StoreReadOnly.
        """
        self._engine.check_open()
        self._own(context)
        return self._retention.pin(context, owner, reason, seconds)

    def unpin(self, pin: Pin) -> None:
        """Let go of it before its time. Raises InputError when that was done before."""
        self._own(pin.context)
        self._retention.unpin(pin)

    def pins(self) -> list[Pin]:
        """Those of this tenant's contexts that hold now."""
        manifest = self._contexts.manifest
        return [pin for pin in self._retention.pins() if self._is_own(manifest, pin.context)]

    def expire(self) -> list[str]:
        """Forget what was not used for its tenant's time to live, of all tenants; the ids of this tenant's.

        Storing does so as needed. Raises StoreError.
        """
        mine = {c.id for c in self.contexts()}
        return [] if self._contexts.snapshot is not None else [n for n in self._retention.expire() if n in mine]

    def pause(
        self, session: "AlayaCache", *, expected_return: float, reason: str = "paused", say: Say = silent
    ) -> Paused:
        """The session waits, for a tool or for a person: keep it in memory, or store it and let go of its memory.

        expected_return: seconds. The policy weighs what the memory is worth to others against reading it again. Either
        way the session goes on as if nothing had been. What was let go of is pinned for twice the time. Raises as
        ``store`` does.
        """
        self._engine.check_open()
        if not isinstance(session, StoredCache) or not expected_return >= 0:
            raise InputError("a pause is that of a session of this database, for a number of seconds")
        if self._patience.keep(self._retention.paused(session.session, expected_return)):
            return Paused(True, ())
        names = self.store(session, say=say)
        self._retention.let_go(session.session)
        seconds = max(1.0, 2 * expected_return)
        return Paused(
            False, tuple(self.pin(n, owner="pause", reason=reason, seconds=seconds) for n in dict.fromkeys(names))
        )

    def refresh(self) -> bool:
        """With ``read_only``: move to what is stored now; whether that is something else. Sessions keep what they have.

        Raises StoreError, SessionClosed.
        """
        return self._contexts.refresh()

    def collect(self) -> int:
        """Remove files that only readers of older contents needed, which have gone meanwhile; bytes that still wait.

        Every ``delete`` does so too. Raises StoreError.
        """
        return self._contexts.collect()

    def verify(self, *, say: Say = silent) -> list[Damage]:
        """Read all that is stored, of all tenants, and compare it with its digests; what is damaged, and whose it is.

        Of other tenants' contexts no names are given.
        """
        manifest, damage = self._contexts.manifest, self._contexts.verify(say)
        return [d._replace(contexts=tuple(c for c in d.contexts if self._is_own(manifest, c))) for d in damage]

    def stats(self) -> Stats:
        """What all sessions did so far; tokens and kv_bytes are those of what is stored."""
        stored = self._contexts.manifest
        return observe(self._engine, sum(s.tokens for s in stored.segments.values()), sum(stored.files.values()))

    def usage(self) -> Usage:
        """What the disk had to take: bytes written by day, and by stored context."""
        return self._engine.wear.usage(self._contexts.manifest)

    # ------------------------------------------------------------------ life
    def close(self) -> None:
        """End all sessions, remove what was not stored, unlock the directory. Twice is fine."""
        _unhook(self._hooks)
        self._engine.close()
        self._contexts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside
    def _is_own(self, manifest: Manifest, context: str) -> bool:
        root = manifest.root(context)
        return root in manifest.identities and manifest.identities[root].root(self._tenant) == root

    def _own(self, context: str) -> None:
        """Raises InputError for what is another tenant's as for what is not there."""
        manifest = self._contexts.manifest
        if context not in manifest.contexts or not self._is_own(manifest, context):
            raise InputError(f"there is no context {context!r} in this store; contexts() lists them")

    def _tenant_of(self, root: str) -> str:
        """The name of the tenant a root belongs to; a name of its own for one that was not named here."""
        identities = [self._contexts.manifest.identities.get(root), *self._known]
        for identity in filter(None, identities):
            for name, secret in self._tenants.items():
                if identity.root(secret) == root:
                    return name
        return f"root {root[:16]}"

    def _prefill(self, weights: str | None, found: Identity | None) -> float | None:
        """Seconds a token of a prompt takes this model: in this process, or when a context was stored."""
        measured = self._engine.steps.prefill_rate
        if measured is None and (weights is not None or found is not None):
            return self._engine.wear.prefill.get(weights or (found.weights if found else ""))
        return measured

    def _longest(
        self, ids: Tokens, weights: str | None, dtype: str | None, on_corrupt: OnCorrupt
    ) -> tuple[list[list[str]], int, Identity | None]:
        """The chains of segments that hold the longest stored prefix of every row, its length, and who computed it."""
        s = self._engine.settings
        found: list[tuple[int, list[list[str]], Identity]] = []
        for root, identity in self._contexts.manifest.identities.items():
            fits = weights in (None, identity.weights) and dtype in (None, identity.dtype)
            fits &= (identity.block_tokens, identity.segment_tokens) == (s.block_tokens, s.segment_tokens)
            fits &= s.mode == "sparse" or not identity.lossy
            if fits and identity.root(self._tenant) == root:
                chains = [self._contexts.find(root, row[:-1], on_corrupt) for row in ids]
                found.append((min(n for _, n in chains), [names for names, _ in chains], identity))
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
        made = Identity(
            model=model_digest(self._contexts.shelf.model),
            weights=weights,
            dtype=dtype,
            block_tokens=s.block_tokens,
            segment_tokens=s.segment_tokens,
            lossy=lossy,
        )
        self._known.add(made)
        return made

    def _require(self, config: PretrainedConfig) -> None:
        check_layers(config)
        self._contexts.shelf.require(model_of(config))

    def _meet(self, model: PreTrainedModel) -> None:
        """A model is about to run over one of our sessions: from here on that session sees its token ids."""
        self._require(model.config)
        if model not in self._hooks:
            self._hooks[model] = model.register_forward_pre_hook(see, with_kwargs=True)


def _unhook(hooks: Hooks) -> None:
    while hooks:
        hooks.popitem()[1].remove()


def _ids(input_ids: Tensor | Sequence[int]) -> Tensor:
    """int64 [rows, tokens], on the CPU."""
    ids = torch.as_tensor(input_ids)
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.ndim not in (1, 2) or not ids.numel():
        raise InputError("input_ids are token ids, integers [rows, tokens] or [tokens], at least one")
    return ids.detach().to("cpu", torch.int64).view(-1, ids.shape[-1])


def _chunks(kv: KV) -> Iterator[Chunk]:
    """All of it, chunk by chunk."""
    if isinstance(kv, DynamicCache):
        layers: list[Any] = list(kv.layers)
        yield [(layer.keys, layer.values) for layer in layers]
    elif isinstance(kv, Sequence) and kv and isinstance(kv[0][0], Tensor):
        yield cast("Chunk", kv)
    else:
        yield from cast("Iterable[Chunk]", kv)


def _with(first: Chunk, rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from rest
