"""Which stored contexts leave the SSD, and what becomes of a session that pauses.

Share       what one tenant (or category) is sure of, and the most it may have
Shares      who leaves when room is needed: what has expired, then the longest unused of whoever has more than is
            his; a tenant that floods the store pays with its own contexts, never with another's floor
Patience    keep a paused session in memory or let go of it: by what its memory is worth to others meanwhile
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alaya_tiers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Share:
    """floor: bytes that nobody else's contexts push out. most: bytes it may have, None = any number. ttl: seconds
    without use after which a context may leave at once, None = never."""

    floor: int = 0
    most: int | None = None
    ttl: float | None = None

    def __post_init__(self) -> None:
        if (
            self.floor < 0
            or (self.most is not None and self.most < self.floor)
            or (self.ttl is not None and self.ttl < 0)
        ):
            raise ConfigError(f"a share has 0 <= floor <= most and a ttl of 0 seconds or more: {self}")


@dataclass(frozen=True, slots=True)
class StoredView:
    """Stored contexts, one element a context, and who has how much.

    tenant: label of each. nbytes: what would be free if this one alone left, int64. unused: seconds since its last use,
    float64. held: whether a session or a pin keeps it, bool. used_bytes: by tenant, shared files
    counted once for each tenant. asking: for whom room is made; one that has nothing when a forward needs room.
    """

    tenant: tuple[str, ...]
    nbytes: npt.NDArray[np.int64]
    unused: npt.NDArray[np.float64]
    held: npt.NDArray[np.bool_]
    used_bytes: Mapping[str, int]
    asking: str


@dataclass(frozen=True, slots=True)
class Shares:
    """Least recently used of those who have more than their floor. named: by tenant; others: everybody else's."""

    named: Mapping[str, Share] = field(default_factory=dict)
    others: Share = Share()

    def share(self, tenant: str) -> Share:
        """What a tenant has."""
        return self.named.get(tenant, self.others)

    def admits(self, tenant: str, nbytes: int) -> bool:
        """Whether a context of this size may be stored at all."""
        most = self.share(tenant).most
        return most is None or nbytes <= most

    def expired(self, view: StoredView) -> list[int]:
        """Contexts whose time is over, longest unused first."""
        ttl = np.array([np.inf if (t := self.share(name).ttl) is None else t for name in view.tenant])
        return [i for i in self._order(view) if view.unused[i] > ttl[i] and not view.held[i]]

    def leave(self, view: StoredView, need: int, new: int) -> list[int]:
        """Contexts that leave so that ``need`` bytes are free and the asking tenant has room for ``new`` more.

        All of them, or none where it cannot be done: nobody loses anything in vain.
        """
        left, chosen = dict(view.used_bytes), list[int]()
        most, freed = self.share(view.asking).most, 0
        over = 0 if most is None else left.get(view.asking, 0) + new - most
        for i in [*self.expired(view), *self._order(view)]:
            tenant, nbytes = view.tenant[i], int(view.nbytes[i])
            own = tenant == view.asking
            if (freed >= need and over <= 0) or view.held[i] or i in chosen or (freed >= need and not own):
                continue
            expired = self.share(tenant).ttl is not None and view.unused[i] > (self.share(tenant).ttl or 0)
            if own or expired or left[tenant] - nbytes >= self.share(tenant).floor:
                chosen.append(i)
                freed, left[tenant] = freed + nbytes, left[tenant] - nbytes
                over -= nbytes if own else 0
        return chosen if freed >= need and over <= 0 else []

    @staticmethod
    def _order(view: StoredView) -> list[int]:
        return [int(i) for i in np.argsort(-view.unused, kind="stable")]


@dataclass(frozen=True, slots=True)
class PauseView:
    """A session that waits for something. expected: seconds until it goes on. nbytes: memory it takes. memory: bytes
    of all tiers in memory. full: share of them that is in use. read_rate: bytes a second from the SSD."""

    expected: float
    nbytes: int
    memory: int
    full: float
    read_rate: float


@dataclass(frozen=True, slots=True)
class Patience:
    """Keep a session in memory as long as that costs others less than it costs to read it again.

    While it waits, ``nbytes / memory`` of what the tiers could do for others is not done; ``roomy``: memory filled less
    than this has nobody who wants it.
    """

    roomy: float = 0.8

    def keep(self, view: PauseView) -> bool:
        """Whether it stays in memory."""
        if view.full < self.roomy or not view.nbytes:
            return True
        return view.expected * view.nbytes / view.memory <= view.nbytes / view.read_rate
