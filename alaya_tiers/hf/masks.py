"""Masks that stay functions: nothing of the context's length is built for tiered layers."""

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers.masking_utils import causal_mask_function, sdpa_mask

from alaya_tiers.cache import Visible
from alaya_tiers.errors import UnsupportedModel
from alaya_tiers.hf.handles import _plain

_ARITHMETIC = {"add", "add_", "sub", "mul", "rsub"}
"""A mask of ours says True where a key is seen. Code that computes with it means numbers: 0, and -inf where not."""


class MaskSpec(Tensor):
    """What the mask interface hands to attention instead of a [rows, 1, queries, length] bool tensor: no storage.

    Tiered layers ask for ``visible``; other layers for ``dense``, which is what stock sdpa would have got.
    """

    arguments: dict[str, Any]

    @staticmethod
    def __new__(cls, arguments: dict[str, Any]) -> Self:
        if isinstance(offset := arguments["q_offset"], Tensor):  # a static cache counts on in place after this
            arguments = arguments | {"q_offset": offset.clone()}
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        spec: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool)
        spec.arguments, spec._dense, spec._visible = arguments, {}, {}
        return spec

    _dense: dict[bool, Tensor | None]
    _visible: dict[int, Visible]

    def dense(self, *, skip_causal: bool = True) -> Tensor | None:
        """The real mask; None where stock sdpa needs none (only with ``skip_causal``). Built once a forward."""
        if skip_causal not in self._dense:
            changes = {} if skip_causal else {"allow_is_causal_skip": False}
            self._dense[skip_causal] = sdpa_mask(**(self.arguments | changes))
        return self._dense[skip_causal]

    def visible(self, row: int) -> Visible:
        """What the queries of a row see."""
        if row not in self._visible:
            self._visible[row] = self._of_row(row)
        return self._visible[row]

    def _of_row(self, row: int) -> Visible:
        a = self.arguments
        first, queries, padding = int(a["q_offset"]), a["q_length"], a["attention_mask"]
        lo, hi, extra = 0, a["kv_length"], None
        if padding is not None:
            seen = padding[row].nonzero().flatten()
            lo, hi = (int(seen[0]), int(seen[-1]) + 1) if seen.numel() else (0, 0)
            extra = padding[row] if seen.numel() != hi - lo else None
        function: Any = a["mask_function"]
        low, high = np.full(queries, lo, np.int32), np.full(queries, hi, np.int32)
        if function is causal_mask_function:
            high = np.minimum(high, np.arange(first + 1, first + queries + 1, dtype=np.int32))
            if extra is None:
                return Visible(low, high)
            holes = extra
            return Visible(low, high, lambda positions: _at(holes, positions)[None, None].expand(1, queries, -1))
        query_at = torch.arange(first, first + queries)[None, None, :, None]
        index = torch.tensor([row])[:, None, None, None]

        def evaluate(positions: Tensor) -> Tensor:
            seen: Tensor = function(index, torch.zeros_like(index), query_at, positions[None, None, None])[0]
            seen = seen.expand(1, queries, positions.numel())
            return seen if extra is None else seen & _at(extra, positions)

        return Visible(low, high, evaluate)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MaskSpec(shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:  # generate asks this of masks for compiled caches, which need the real one
            return args[0].dense(skip_causal=False)
        return _plain(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (name := str(func).split(".")[1]) in _ARITHMETIC:
            raise UnsupportedModel(
                f"the model's own attention takes a mask of numbers ({name}): keep its attn_implementation"
            )
        args, kwargs = pytree.tree_map_only(MaskSpec, lambda m: m.dense(skip_causal=False), (args, kwargs or {}))
        return func(*args, **kwargs)


def _at(mask: Tensor, positions: Tensor) -> Tensor:
    """mask[positions], False beyond its end."""
    return functional.pad(mask, (0, max(0, int(positions.max()) + 1 - mask.numel())))[positions]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a tensor without storage cannot be traced
def alaya_mask(**arguments: Any) -> MaskSpec:
    """The mask function registered as "alaya"."""
    for name in ("config", "dtype"):
        arguments.pop(name, None)
    return MaskSpec(arguments)
