"""Who may have how much of the SSD, what is pinned, and what leaves when room is needed.

Pins and last uses live as long as the process that writes; after a restart, a context was last used when it was stored.
"""

import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from alaya_tiers.cache import Session
from alaya_tiers.contexts import Contexts
from alaya_tiers.errors import InputError, OutOfSpace
from alaya_tiers.layer import Layer
from alaya_tiers.ledger import Ids
from alaya_tiers.manifest import Manifest
from alaya_tiers.policies import PauseView, Shares, StoredView

NOBODY = "\0"
"""The tenant that asks when none does: it has nothing and is named by no policy."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A context that stays, by whom, why and until when: seconds since 1970."""

    number: int
    context: str
    owner: str
    reason: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Paused:
    """What became of a session that waits. kept: in memory. pins: of what was let go of and is read again."""

    kept: bool
    pins: tuple[Pin, ...]


class Retention:
    """The stored contexts of all tenants, as the policy sees them. Thread-safe.

    shares: the policy; None = nothing ever leaves by itself. tenant_of: the label of the tenant a root belongs to.
    """

    def __init__(self, contexts: Contexts, shares: Shares | None, tenant_of: Callable[[str], str]) -> None:
        self.contexts, self.shares, self._tenant_of = contexts, shares, tenant_of
        self._pins: dict[int, Pin] = {}
        self._numbers = itertools.count(1)
        self._offset = time.time() - contexts.engine.clock.monotonic()
        self._lock = threading.Lock()
        contexts.keeper.make_room, contexts.engine.on_full = self.make_room, self.spill

    @property
    def now(self) -> float:
        """Seconds since 1970, by the engine's clock."""
        return self._offset + self.contexts.engine.clock.monotonic()

    # ------------------------------------------------------------------ pins
    def pin(self, context: str, owner: str, reason: str, seconds: float) -> Pin:
        """Keep a context for so long. Raises InputError, StoreReadOnly."""
        self.contexts.writing()
        if context not in self.contexts.manifest.contexts or not seconds > 0:
            raise InputError(f"there is no context {context!r} to pin, or for no time: {seconds} seconds")
        with self._lock:
            made = Pin(next(self._numbers), context, owner, reason, self.now + seconds)
            self._pins[made.number] = made
        return made

    def unpin(self, pin: Pin) -> None:
        """Let go of it. Raises InputError when that was done before."""
        with self._lock:
            if self._pins.pop(pin.number, None) is None and pin.deadline > self.now:
                raise InputError(f"this pin was let go of before: {pin}")

    def pins(self) -> list[Pin]:
        """Those that hold now."""
        with self._lock:
            now, there = self.now, self.contexts.manifest.contexts
            self._pins = {n: pin for n, pin in self._pins.items() if pin.deadline > now and pin.context in there}
            return list(self._pins.values())

    # ------------------------------------------------------------------ pauses
    def paused(self, session: Session, expected: float) -> PauseView:
        """A session that waits so many seconds, as a policy sees it."""
        engine, nbytes = self.contexts.engine, 0
        if not engine.started:
            return PauseView(expected, 0, 1, 0.0, engine.settings.ssd_rate)
        mover = engine.mover
        with mover.lock:
            for state in session.layers.values():
                ids = _blocks([state])
                nbytes += int(np.count_nonzero(mover.ledger.readable(ids))) * state.shape.nbytes
            free = mover.device.free + mover.host.free
        total = mover.device.capacity + mover.host.capacity
        return PauseView(expected, nbytes, total * mover.host.slot_bytes, 1 - free / total, engine.settings.ssd_rate)

    def let_go(self, session: Session) -> int:
        """Free the memory of a session's blocks that are on disk and nobody reads; how many blocks that was."""
        return self.contexts.engine.let_go(_blocks(list(session.layers.values())))

    # ------------------------------------------------------------------ room
    def make_room(self, root: str, nbytes: int, unwritten: int) -> None:
        """Before a tenant stores so much, part of which has no place yet. Raises OutOfSpace; nothing has left then."""
        if self.shares is not None:
            with self.contexts.lock:
                self._make_room(self.shares, root, nbytes, unwritten)

    def _make_room(self, shares: Shares, root: str, nbytes: int, unwritten: int) -> None:
        books, tenant = self.contexts.engine.accountant, self._tenant_of(root)
        if not shares.admits(tenant, nbytes):
            raise OutOfSpace(
                errno.EDQUOT, f"{nbytes:,} bytes are more than the {shares.share(tenant).most:,} this tenant may have"
            )
        limit = books.limits["ssd"]
        need = 0 if limit is None else max(0, books.used["ssd"] + unwritten - limit)
        names, view = self.view(tenant)
        chosen = shares.leave(view, need, nbytes)
        self._drop([names[i] for i in chosen])
        most = shares.share(tenant).most
        if not chosen and (need or (most is not None and view.used_bytes.get(tenant, 0) + nbytes > most)):
            raise OutOfSpace(
                errno.EDQUOT,
                f"{nbytes:,} bytes more are needed; what is stored is in use, pinned, or another tenant's floor. "
                "Raise ssd_budget or the tenant's share, delete contexts, or close sessions",
            )

    def spill(self) -> bool:
        """In the middle of a forward: let go of the context that is the first to leave; whether there was one."""
        if self.shares is None or self.contexts.snapshot is not None:
            return False
        with self.contexts.lock:
            names, view = self.view(NOBODY)
            chosen = self.shares.leave(view, 1, 0)
            self._drop([names[i] for i in chosen])
        return bool(chosen)

    def expire(self) -> list[str]:
        """Forget the contexts whose time is over; their ids."""
        if self.shares is None:
            return []
        with self.contexts.lock:
            names, view = self.view(NOBODY)
            gone = [names[i] for i in self.shares.expired(view)]
            self._drop(gone)
        return gone

    def view(self, asking: str) -> tuple[list[str], StoredView]:
        """What the policy is shown, and the ids of the contexts in its order."""
        manifest, now = self.contexts.manifest, self.now
        names, chains = list(manifest.contexts), {name: manifest.chain(name) for name in manifest.contexts}
        files = {name: manifest.files_of(name) for name in names}
        users: dict[str, int] = {}
        for of_context in files.values():
            for file in of_context:
                users[file] = users.get(file, 0) + 1
        pinned = {pin.context for pin in self.pins()}
        last = self.contexts.last_used
        used = [max(manifest.contexts[n].created, *(last.get(p, 0.0) + self._offset for p in chains[n])) for n in names]
        tenants = tuple(self._tenant_of(manifest.root(name)) for name in names)
        return names, StoredView(
            tenants,
            np.array([sum(manifest.files[f] for f in files[n] if users[f] == 1) for n in names], np.int64),
            np.array([max(0.0, now - at) for at in used], np.float64),
            np.array([n in pinned or self.contexts.in_use(chains[n]) for n in names], bool),
            dict(_bytes_by_tenant(manifest, tenants, [files[n] for n in names])),
            asking,
        )

    def _drop(self, names: list[str]) -> None:
        if names:
            self.contexts.forget(self.contexts.manifest.without(*names))


def _blocks(layers: list[Layer]) -> Ids:
    """All blocks of some layers, each once."""
    ids = [state.ids(row.first).ravel() for state in layers for row in state.rows]
    return np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)


def _bytes_by_tenant(manifest: Manifest, tenants: tuple[str, ...], files: list[set[str]]) -> Iterator[tuple[str, int]]:
    for tenant in set(tenants):
        theirs = set().union(*(f for f, of in zip(files, tenants, strict=True) if of == tenant))
        yield tenant, sum(manifest.files[f] for f in theirs)
