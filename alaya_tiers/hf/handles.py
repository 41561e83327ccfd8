"""Tensors without storage: what ``update`` returns, and what stands for a mask.

A model that hands them on to attention untouched never sees that they are empty. Anything else that looks inside gets
the real tensor: gathered from the tiers, slow, counted, and warned about once. A wrong setting is slow, never wrong.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from alaya_tiers.cache import Visible
from alaya_tiers.errors import StaleHandle


class TieredLayer(Protocol):
    """What a handle needs of the layer it came from."""

    version: int

    def gather(self, role: str) -> Tensor:
        """All of K ("k") or V ("v")."""
        ...

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
        """Attention of query [rows, query_heads, n, k_dim]; visible: by row; latent: see Session.attention."""
        ...


class GatheredWarning(UserWarning):
    """Some code looked inside the cache's keys or values, which had to be gathered from all tiers."""


_warned: set[str] = set()


def _plain(func: Any, args: Any, kwargs: Any) -> Any:
    """Call with results as plain tensors: subclass results must not leak into the model."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class KVHandle(Tensor):
    """K or V of a layer: the logical shape [rows, kv_heads, length, dim], no storage."""

    layer: TieredLayer
    role: str
    version: int

    @staticmethod
    def __new__(
        cls, layer: TieredLayer, role: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Self:
        handle: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        handle.layer, handle.role, handle.version = layer, role, layer.version
        return handle

    def check(self) -> None:
        """Raises StaleHandle when the layer has moved on since this handle was made."""
        if self.version != self.layer.version:
            raise StaleHandle("keys or values of an earlier forward were used after the cache was updated")

    def materialize(self) -> Tensor:
        """The real tensor."""
        self.check()
        return self.layer.gather(self.role)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({self.role}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is functional.scaled_dot_product_attention
            and (out := _scaled_dot_product(*args, **kwargs)) is not None
        ):
            return out
        return _plain(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(KVHandle, KVHandle.materialize, (args, kwargs or {}))
        name = str(func)
        if name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"{name} looked inside the cache's keys or values: all of them were gathered, which is slow and takes "
                "memory beyond the budgets. model.set_attn_implementation('alaya') avoids it where the model allows.",
                GatheredWarning,
                stacklevel=2,
            )
        return func(*args, **kwargs)


def intact(key: Tensor, value: Tensor) -> KVHandle | None:
    """The key handle, if key and value are what one ``update`` returned; None if the model changed either."""
    if (
        isinstance(key, KVHandle)
        and isinstance(value, KVHandle)
        and key.layer is value.layer
        and (key.role, value.role) == ("k", "v")
    ):
        key.check()
        return key
    return None


def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """F.scaled_dot_product_attention over handles: the models' stock "sdpa" implementation. None where it cannot."""
    handle = intact(key, value)
    n, length = query.shape[2], key.shape[2]
    if handle is None or dropout_p or isinstance(query, KVHandle) or (is_causal and n != length):
        return None
    visible = dense_visible(attn_mask, n, length, causal=is_causal)
    return handle.layer.attend(query, visible, query.shape[-1] ** -0.5 if scale is None else scale)


def dense_visible(mask: Tensor | None, queries: int, length: int, *, causal: bool) -> Callable[[int], Visible]:
    """Visibility by row from a mask that is a real tensor, [rows or 1, heads or 1, queries, >= length], or None.

    causal: without a mask, the last query sees everything and each one before it a token less.
    """
    if mask is None:
        everything = Visible.causal(length - queries, queries) if causal else Visible.all(length, queries)
        return lambda row: everything
    four = mask if mask.ndim == 4 else mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))

    def of_row(row: int) -> Visible:
        mine = four[row % four.shape[0]]
        return Visible.all(length, queries, lambda positions: mine[..., positions].expand(-1, queries, -1))

    return of_row
