"""torch's own flash attention, with the logsumexp that parts are merged by: the operators behind sdpa, which keeps it.

    on the CPU    _scaled_dot_product_flash_attention_for_cpu, with or without a mask
    on CUDA       fp16 and bf16, from compute capability 8.0 on: _scaled_dot_product_flash_attention without a mask,
                  _scaled_dot_product_efficient_attention with one

For everything else there is attention.attend_naive. FlexAttention also returns it, but compiles for each mask and
shape, which change with every tile; varlen_attn would have to be given the batch in another layout.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HALVES = (torch.float16, torch.bfloat16)

MOST_WIDE = 256
"""Numbers of a key that flash attention takes on CUDA."""

EIGHT = 8
"""Of these operators on CUDA: numbers of a key, and of a row of a mask in memory, come in eights."""

TOGETHER = 32
"""Rows of a logsumexp that the operator with a mask rounds up to."""

_aten: Any = torch.ops.aten


def can(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``flash`` takes these tensors. Without rows or keys the operators die of SIGFPE, or make no sense."""
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point() or min(q.numel(), k.numel()) == 0:
        return False
    if q.device.type == "cuda":
        return q.dtype in HALVES and max(k.shape[-1], v.shape[-1]) <= MOST_WIDE and _ampere(q.device)
    return q.is_cpu


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """out [kv_heads, rows, v_dim] and lse [kv_heads, rows], float32; rows that see nothing: 0 and -inf.

    q: [kv_heads, rows, k_dim]; k, v: [kv_heads, n, k_dim or v_dim], on one device, of one dtype. mask: as for
    attention.attend_dense. causal: without a mask, and as many rows as keys: row i sees keys up to i.
    """
    wide, v_dim = max(k.shape[-1], v.shape[-1]), v.shape[-1]
    if q.device.type == "cuda":
        return on_cuda(q, k, v, -(-wide // EIGHT) * EIGHT, scale, mask, causal=causal)
    bias = None if mask is None else as_bias(mask, q.dtype, q.shape[1], k.shape[1])
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *_batch(q, k, v, wide), is_causal=causal, attn_mask=_all_heads(bias, q), scale=scale
    )
    return _seeing(out[0, ..., :v_dim].float(), lse[0].float(), bias)


def on_cuda(
    q: Tensor, k: Tensor, v: Tensor, wide: int, scale: float, mask: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The same there. wide: numbers of a key, filled up."""
    rows, n, v_dim = q.shape[1], k.shape[1], v.shape[-1]
    if mask is None:
        found = _aten._scaled_dot_product_flash_attention(*_batch(q, k, v, wide), 0.0, causal, False, scale=scale)
        return found[0][0, ..., :v_dim].float(), found[1][0, :, :rows].float()
    bias = as_bias(mask, q.dtype, rows, n)
    filled = functional.pad(bias, (0, -n % EIGHT))[..., :n]  # each row of it begins at 16 bytes
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        *_batch(q, k, v, wide), _all_heads(filled, q), True, 0.0, False, scale=scale
    )
    return _seeing(out[0, ..., :v_dim].float(), lse[0, :, :rows].float(), bias)


def as_bias(mask: Tensor, dtype: torch.dtype, rows: int, n: int) -> Tensor:
    """A mask as something to add to scores, [.., rows, n]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype).expand(*mask.shape[:-2], rows, n)


def _ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _batch(q: Tensor, k: Tensor, v: Tensor, wide: int) -> list[Tensor]:
    """Each with its last dimension filled up with zeros to ``wide``: they change no score and no wanted output."""
    return [(x if x.shape[-1] == wide else functional.pad(x, (0, wide - x.shape[-1])))[None] for x in (q, k, v)]


def _all_heads(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(q.shape[0], *bias.shape[-2:])[None]


def _seeing(out: Tensor, lse: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that see nothing, put right: the operators give them any number."""
    if bias is None:
        return out, lse
    blind = (bias == -torch.inf).all(-1).expand(lse.shape)
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
