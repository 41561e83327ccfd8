"""torch's flash attention with its logsumexp. For CUDA's operators stand ones that want what those want."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alaya_tiers import flash
from alaya_tiers.attention import attend_naive

CLOSE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Operators:
    """What torch 2.13 asks of tensors for CUDA, and what it gives back."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def check(self, *tensors: Tensor) -> None:
        for x in tensors:
            assert x.ndim == 4
            assert x.dtype in flash.HALVES
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == 0
            assert x.shape[-1] <= 256

    def _scaled_dot_product_flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool, *, scale: float
    ) -> tuple[Any, ...]:
        self.called.append("flash")
        self.check(q, k, v)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert not causal or q.shape[2] == k.shape[2], "where the diagonal ends is another's convention"
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if causal else None
        part = attend_naive(q[0], k[0], v[0], scale, mask)
        return part.out.to(q.dtype)[None], part.lse[None], None, None, q.shape[2], k.shape[2], None, None, None

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lse: bool, dropout: float, causal: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        self.called.append("efficient")
        self.check(q, k, v)
        assert lse
        assert not causal
        assert bias.shape == (1, q.shape[1], q.shape[2], k.shape[2])
        assert bias.dtype == q.dtype
        assert bias.stride(-1) == 1
        assert bias.stride(-2) % 8 == 0
        part = attend_naive(q[0], k[0], v[0], scale, bias[0])
        long = torch.full((1, q.shape[1], math.ceil(q.shape[2] / 32) * 32), 7.0)
        long[..., : q.shape[2]] = part.lse.masked_fill(part.lse == -torch.inf, torch.inf)  # blind rows: anything
        return part.out.masked_fill(part.lse[..., None] == -torch.inf, torch.nan).to(q.dtype)[None], long, q, q


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (20, 13), (8, 24)])
def test_the_operators_for_cuda_get_what_they_want(
    dtype: torch.dtype, k_dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = Operators()
    monkeypatch.setattr(flash, "_aten", operators)
    wide = -(-max(k_dim, v_dim) // 8) * 8
    rows = torch.randn(2, 37, k_dim + v_dim).to(dtype)  # keys and values as they lie in tiles
    q, k, v = torch.randn(2, 45, k_dim).to(dtype), rows[..., :k_dim], rows[..., k_dim:]
    seen = torch.rand(1, 45, 37) < 0.7
    seen[:, 3] = False
    cases: list[tuple[Tensor, Tensor | None, bool]] = [
        (q, None, False), (q[:, :37], None, True), (q, seen, False), (q, torch.randn(2, 45, 37), False),
    ]  # fmt: skip
    for some, mask, causal in cases:
        out, lse = flash.on_cuda(some, k, v, wide, 0.3, mask, causal=causal)
        shown = torch.ones(37, 37, dtype=torch.bool).tril() if causal else mask
        want = attend_naive(some, k, v, 0.3, shown)
        assert out.dtype == lse.dtype == torch.float32
        torch.testing.assert_close(out, want.out, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        torch.testing.assert_close(lse, want.lse, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert operators.called == ["flash", "flash", "efficient", "efficient"]


def test_the_operators_for_cuda_take_these_arguments() -> None:
    """By their schemas, and as far as torch knows their results without running them."""
    q, k = (torch.empty(1, 2, n, 64, dtype=torch.bfloat16, device="meta") for n in (45, 37))
    aten: Any = torch.ops.aten
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, k, 0.0, False, False, scale=0.3)
    assert (out.shape, lse.shape, lse.dtype) == ((1, 2, 45, 64), (1, 2, 45), torch.float32)
    bias = torch.empty(1, 2, 45, 40, dtype=torch.bfloat16, device="meta")[..., :37]
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, k, bias, True, 0.0, False, scale=0.3)
    assert (out.shape, lse.dtype) == ((1, 2, 45, 64), torch.float32)
    assert lse.shape[-1] >= 45


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CLOSE)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = torch.randn(2, 370, 128, device="cuda").to(dtype)
    q, k, v = torch.randn(2, 450, 64, device="cuda").to(dtype), rows[..., :64], rows[..., 64:]
    seen = torch.rand(1, 450, 370, device="cuda") < 0.7
    seen[:, 3] = False
    assert flash.can(q, k, v)
    for some, mask, causal in ((q, None, False), (q[:, :370], None, True), (q, seen, False)):
        out, lse = flash.flash(some, k, v, 0.3, mask, causal=causal)
        shown = torch.ones(370, 370, dtype=torch.bool, device="cuda").tril() if causal else mask
        want = attend_naive(some, k, v, 0.3, shown)
        torch.testing.assert_close(out, want.out, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        torch.testing.assert_close(lse, want.lse, rtol=CLOSE[dtype], atol=CLOSE[dtype])
