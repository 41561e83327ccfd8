"""The attention function registered as "alaya"."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alaya_tiers.attention import attend_dense, with_sinks
from alaya_tiers.cache import Visible
from alaya_tiers.errors import UnsupportedModel
from alaya_tiers.hf.handles import KVHandle, dense_visible, intact
from alaya_tiers.hf.masks import MaskSpec
from alaya_tiers.hf.switch import OWN_ATTENTION

_OWN_SPARSE = ("indices", "block_indices", "sinks")


def alaya_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over tiered handles where they are intact; over plain tensors exactly what "sdpa" does.

    query: [rows, query_heads, n, dim]. Returns ([rows, n, query_heads, v_dim], None): like sdpa, no weights.
    """
    if getattr(getattr(module, "config", None), "model_type", None) in OWN_ATTENTION:
        raise UnsupportedModel(
            f"{type(module).__name__} attends in a way of its own: keep attn_implementation='sdpa' or 'eager' for it"
        )
    if used := [name for name in _OWN_SPARSE if kwargs.get(name) is not None]:
        raise UnsupportedModel(
            f"{type(module).__name__} brings its own sparse attention ({', '.join(used)}): "
            "keep attn_implementation='sdpa' for it"
        )
    handle = intact(key, value)
    if handle is not None and not dropout:
        return _over_tiers(module, query, handle, attention_mask, scaling, kwargs), None
    key, value = (x.materialize() if isinstance(x, KVHandle) else x for x in (key, value))
    mask = attention_mask.dense() if isinstance(attention_mask, MaskSpec) else attention_mask
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])[
            None, None
        ]
    return _plain_tensors(query, key, value, mask, scaling, kwargs), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # only the tiered path breaks a compiled graph; plain tensors stay traceable
def _over_tiers(
    module: nn.Module,
    query: Tensor,
    handle: KVHandle,
    mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    queries, length = query.shape[2], handle.shape[2]
    if isinstance(mask, MaskSpec):
        visible: Callable[[int], Visible] = mask.visible
    else:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        visible = dense_visible(mask, queries, length, causal=bool(causal))
    if (bias := kwargs.get("position_bias")) is not None:
        visible = _biased(visible, bias)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if handle.shape[-1] == getattr(module, "kv_lora_rank", None):
        return _over_latents(module, query, handle, visible, scale)
    out = handle.layer.attend(query, visible, scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    return out.transpose(1, 2).contiguous()


def _over_latents(
    module: Any, query: Tensor, handle: KVHandle, visible: Callable[[int], Visible], scale: float
) -> Tensor:
    """MLA in latent space: the expansion of keys is moved into the query, that of values behind the sum.

    The cache holds (latent [kv_lora_rank], rotary key) for one head; no latent is ever expanded. Source: DeepSeek-V2
    (arXiv 2405.04434), 2.1.2.
    """
    weight = module.kv_b_proj.weight.view(query.shape[1], -1, module.kv_lora_rank)
    nope = module.qk_nope_head_dim
    q_nope, q_rotary = query[..., :nope], query[..., nope:]
    q = torch.cat([torch.einsum("bhqd,hdr->bhqr", q_nope, weight[:, :nope]), q_rotary], -1)
    out = handle.layer.attend(q, visible, scale, latent=True)
    return torch.einsum("bhqr,hvr->bqhv", out, weight[:, nope:]).contiguous()


def _biased(visible: Callable[[int], Visible], bias: Tensor) -> Callable[[int], Visible]:
    """Visibility with an additive bias [rows or 1, query_heads, queries, length] (T5)."""

    def of_row(row: int) -> Visible:
        base, mine = visible(row), bias[row % bias.shape[0]].float()

        def extra(positions: Tensor) -> Tensor:
            added = mine[..., positions]
            if base.extra is None:
                return added
            mask = base.extra(positions)
            return added.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else added + mask

        return Visible(base.lo, base.hi, extra)

    return of_row


def _plain_tensors(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, kwargs: dict[str, Any]
) -> Tensor:
    """Soft-capped scores or sinks over plain tensors (sliding layers of Gemma2, gpt-oss), which sdpa has not."""
    rows, heads, n, dim = query.shape
    kv_heads = key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    sinks, out = kwargs.get("s_aux"), []
    for r in range(rows):
        seen = None if mask is None else mask[r % mask.shape[0]].expand(-1, n, -1)
        if seen is not None and seen.shape[0] == 1:
            seen = seen.repeat(1, heads // kv_heads, 1)
        elif seen is not None:
            seen = seen.reshape(kv_heads, heads // kv_heads * n, -1)
        q = query[r].reshape(kv_heads, heads // kv_heads * n, dim)
        part = attend_dense(q, key[r], value[r], scale, seen, kwargs.get("softcap"))
        if sinks is not None:
            part = with_sinks(part, sinks.float().view(kv_heads, -1, 1).expand(-1, -1, n).reshape(kv_heads, -1))
        out.append(part.out.view(heads, n, -1).to(query.dtype))
    return torch.stack(out).transpose(1, 2).contiguous()
