"""Makes the golden store of the present format: python -m tests.golden

It goes to tests/data/stores/format-N, is committed once for each format that was released, and never made again: what
it holds can be computed, so that a later version can be asked for it, bit for bit.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alaya_tiers.config import Settings
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.identity import Identity, Tokens, model_digest
from alaya_tiers.tiers.zarr_format import FORMAT

FOLDER = Path(__file__).parent / "data" / "stores"
MODEL = {"model_type": "golden", "hidden_size": 16}
LAYERS, HEADS, DIM, BLOCK, SEGMENT = 2, 2, 8, 8, 16
TEXT = np.arange(3, 24, dtype=np.int64) ** 2
TEXTS = {
    "float32": [TEXT, np.concatenate([TEXT[:18], TEXT[:5]]), np.arange(1, 14, dtype=np.int64)],
    "bfloat16": [TEXT[:13]],
    "float16": [TEXT[:13]],
}
"""By dtype. More than a segment; one that parts from it inside its tail; one with codes: its keys are plain numbers."""

DTYPES = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}
SETTINGS = Settings(
    device_budget=1 << 20, host_budget=1 << 20, mode="sparse", sink_tokens=1, recent_tokens=1, io="buffered",
    block_tokens=BLOCK, segment_tokens=SEGMENT,
)  # fmt: skip


def who(dtype: str) -> Identity:
    return Identity(
        model=model_digest(MODEL),
        weights="golden",
        dtype=dtype,
        block_tokens=BLOCK,
        segment_tokens=SEGMENT,
        lossy=False,
    )


def kv(tokens: Tokens, layer: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens, [1, heads, n, dim]: bit patterns made from token, position, layer, head and place.

    All kinds of numbers are among them: negative zeros, infinities, numbers too small to be normal, NaN with payloads.
    """
    bits = np.iinfo(np.int32 if dtype == "float32" else np.int16).bits
    n, head, place = np.ogrid[: tokens.size, :HEADS, : 2 * DIM]
    seed = np.cumsum(tokens * (layer + 1))[:, None, None] * 1_000_003 + head * 7919 + place * 104_729 + n
    made = (seed.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - bits)).astype(f"u{bits // 8}")
    made[0, :, 0] = 1 << (bits - 1)  # -0.0
    made[0, :, 1] = 1  # the smallest number
    if tokens[0] == 1:
        made = (
            torch.from_numpy((seed % 1009 / 8 - 60).astype("f4")).to(getattr(torch, dtype)).view(DTYPES[dtype]).numpy()
        )
    rows = torch.from_numpy(made.view(f"i{bits // 8}").transpose(1, 0, 2).copy())[None].view(getattr(torch, dtype))
    return rows[..., :DIM], rows[..., DIM:]


def bits(x: Tensor) -> Tensor:
    """Numbers as they are in memory: NaN is equal to itself, 0.0 and -0.0 are not."""
    return x.contiguous().view(torch.uint8)


def make(path: Path) -> None:
    engine = Engine(SETTINGS, str(path), MODEL)
    contexts = Contexts(engine)
    for dtype in DTYPES:
        if dtype != next(iter(DTYPES)):  # one dtype a layer and opening
            engine.close()
            engine = Engine(replace(SETTINGS, mode="exact"), str(path), MODEL)
            contexts = Contexts(engine)
        for text in TEXTS[dtype]:
            contexts.load(text, [[kv(text, layer, dtype) for layer in range(LAYERS)]], who(dtype))
    engine.close()


if __name__ == "__main__":
    target = FOLDER / f"format-{FORMAT}"
    shutil.rmtree(target, ignore_errors=True)
    make(target)
    print(f"{target}: {sum(p.stat().st_size for p in target.rglob('*') if p.is_file()):,} bytes")
