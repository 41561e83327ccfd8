"""The store is a Zarr v3 directory: any Zarr reader opens it and finds K and V, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from torch import Tensor

from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.engine import Engine

LAYERS, HEADS, K_DIM, V_DIM = 2, 2, 24, 8


def bits(x: Tensor) -> npt.NDArray[Any]:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()


def attributes(group: zarr.Group) -> Any:
    """What we say of a group."""
    return group.attrs["alaya_tiers"]


def filled(
    path: Path, dtype: torch.dtype, tokens: int, **settings: Any
) -> tuple[Engine, Session, list[Tensor], list[Tensor]]:
    defaults = {"device_budget": LAYERS * HEADS * 4096, "host_budget": 4 * HEADS * 4096, "block_tokens": 16}
    engine = Engine(Settings.from_dict(defaults | {"segment_tokens": 64} | settings), str(path))
    session = Session(engine)
    keys = [torch.randn(1, HEADS, tokens, K_DIM).to(dtype) for _ in range(LAYERS)]
    values = [torch.randn(1, HEADS, tokens, V_DIM).to(dtype) for _ in range(LAYERS)]
    keys[0][0, 0, 0, :3] = torch.tensor([-0.0, float("nan"), float("inf")]).to(dtype)
    for start in range(0, tokens, 23):
        for layer in range(LAYERS):
            session.update(layer, keys[layer][:, :, start : start + 23], values[layer][:, :, start : start + 23])
    return engine, session, keys, values


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zarr_opens_a_flushed_context_bit_for_bit(tmp_path: Path, dtype: torch.dtype, io: str) -> None:
    tokens, stored = 203, 192
    engine, session, keys, values = filled(tmp_path, dtype, tokens, io=io, block_tokens=16)
    session.flush()
    root = zarr.open_group(str(tmp_path), mode="r")
    assert attributes(root)["format"] == 3
    group = next(g for name, g in root.groups() if name == engine.store.session)
    (context,) = attributes(group)["contexts"]
    assert (context["tokens"], context["stored_tokens"]) == (tokens, stored)
    for layer in range(LAYERS):
        parts = []
        for folder in context["layers"][str(layer)]:
            array = zarr.open_array(str(tmp_path / engine.store.session / folder / f"layer_{layer:03d}"), mode="r")
            assert array.attrs["dtype"] == str(dtype).removeprefix("torch.")
            assert (array.attrs["k_dim"], array.attrs["v_dim"]) == (K_DIM, V_DIM)
            parts.append(np.asarray(array[:]))
        rows = np.concatenate(parts, 1)
        assert rows.shape == (HEADS, stored, K_DIM + V_DIM)
        raw = rows.view(f"i{rows.itemsize}")
        assert np.array_equal(raw[..., :K_DIM], bits(keys[layer][0, :, :stored]))
        assert np.array_equal(raw[..., K_DIM:], bits(values[layer][0, :, :stored]))
    engine.close()


def test_full_segments_are_readable_before_any_flush(tmp_path: Path) -> None:
    engine, session, keys, _ = filled(tmp_path, torch.float32, 400)
    session.attention(0, torch.randn(1, HEADS, 1, K_DIM), [Visible.causal(399, 1)], 1.0)
    found = sorted((tmp_path / engine.store.session).glob("s*/layer_000/zarr.json"))
    assert found
    array = zarr.open_array(str(found[0].parent), mode="r")
    assert array.shape == (HEADS, 64, K_DIM + V_DIM)
    assert np.array_equal(np.asarray(array[:, 1:, :K_DIM]), keys[0][0, :, 1:64].numpy())
    engine.close()


def test_forked_contexts_name_the_segments_they_share(tmp_path: Path) -> None:
    engine, session, keys, _ = filled(tmp_path, torch.float32, 100, device_budget=2 * LAYERS * HEADS * 4096)
    for layer in range(LAYERS):
        session.select(layer, [0, 0])
    k = torch.randn(2, HEADS, 100, K_DIM)
    for layer in range(LAYERS):
        session.update(layer, k, torch.randn(2, HEADS, 100, V_DIM))
    session.flush()
    group = zarr.open_group(str(tmp_path / engine.store.session), mode="r")
    first, second = attributes(group)["contexts"]
    assert first["layers"]["0"][0] == second["layers"]["0"][0]
    assert first["layers"]["0"][-1] != second["layers"]["0"][-1]
    got, _ = session.gather(0)
    assert torch.equal(got[:, :, 100:], k)
    assert torch.equal(got[:, :, 1:100], keys[0].expand(2, -1, -1, -1)[:, :, 1:])
    engine.close()
