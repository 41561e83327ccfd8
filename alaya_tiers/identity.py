"""Names of stored tokens: a hash chain over all that must be equal before KV may be used again.

    root = H(key = tenant | format, model, weights, dtype, layout, lossy)      every field tagged and length-prefixed
    name of a segment = H(name of the one before, or root | its token ids)

Two contexts that begin with the same whole segments, computed the same way for the same tenant, have these names in
common; any difference in any field gives names that have nothing in common.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

NAMING = 1
"""Version of the rules above."""

_DIGEST = 32
_BEFORE = b"\6\0\0\0\0\0\0\0before\40\0\0\0\0\0\0\0"
_TOKENS = b"\6\0\0\0\0\0\0\0tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What KV was computed by and how it is laid out.

    model: digest of the config, see ``model_digest``. weights: digest of the parameters. dtype: of keys and values,
    e.g. "float32". lossy: whether attention was approximate while it was computed.
    """

    model: str
    weights: str
    dtype: str
    block_tokens: int
    segment_tokens: int
    lossy: bool

    def root(self, tenant: str = "") -> str:
        """The name that stands before the first segment. tenant: a secret; other tenants never find what has it."""
        key = hashlib.blake2b(tenant.encode(), digest_size=_DIGEST).digest() if tenant else b""
        fields = {"naming": NAMING} | asdict(self)
        return _hash(key, {name: repr(value).encode() for name, value in fields.items()})


def segment_name(before: str, tokens: Tokens) -> str:
    """The name of a segment. before: the name of the segment before it, or the root."""
    ids = np.ascontiguousarray(tokens, "<i8").tobytes()
    fields = b"".join((_BEFORE, bytes.fromhex(before), _TOKENS, len(ids).to_bytes(8, "little"), ids))
    return hashlib.blake2b(fields, digest_size=_DIGEST).hexdigest()  # as _hash of both, in one call


def model_digest(model: Mapping[str, Any] | None) -> str:
    """A digest of what a store says of its model, JSON values."""
    return hashlib.blake2b(json.dumps(model, sort_keys=True).encode(), digest_size=_DIGEST).hexdigest()


def common(a: Tokens, b: Tokens) -> int:
    """How many first tokens are the same."""
    n = min(a.size, b.size)
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _hash(key: bytes, fields: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST, key=key)
    for name, value in fields.items():
        for part in (name.encode(), value):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()
