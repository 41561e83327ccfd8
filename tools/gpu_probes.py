"""The small measurements of `alaya-tiers bench gpu`: copies against the bus, kernels against the memory."""

import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alaya_tiers.devices.base import DOWN, UP
from alaya_tiers.index.codes import Layout, encode
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.device import DeviceTier
from alaya_tiers.tiers.host import HostTier
from alaya_tiers.tiers.lanes import Lanes
from alaya_tiers.tools.baselines import BLOCK_TOKENS, DTYPES
from alaya_tiers.tools.gpu_bench import Bench, NotHere

COPY_BYTES = 256 << 20

TOKENS = {"cuda": 1 << 19, "cpu": 1 << 10}
"""Of a kv head, that kernels are measured over: on a GPU several times its cache."""

ROUNDS = {"cuda": 20, "cpu": 1}


def copies(bench: Bench) -> Iterator[tuple[str, float]]:
    """Bytes a second: one large copy each way, and blocks as the mover copies them, single and in runs."""
    nbytes = min(COPY_BYTES, 64 * bench.shape.layer_token_bytes * 256)
    slot = -(-256 * bench.shape.layer_token_bytes // bench.shape.kv_heads // 4096) * 4096
    count, books, device = max(2, nbytes // slot), Accountant({"device": None, "host": None}), bench.on()
    near, far = DeviceTier(count * slot, slot, books, device), HostTier(count * slot, slot, books, device)
    lanes = Lanes(device, near, far)
    mine, theirs = near.take(count), far.take(count)
    assert mine is not None
    assert theirs is not None
    shuffled = theirs[np.random.default_rng(0).permutation(count)]
    sizes = np.full(count, slot, np.int64)
    big, other = device.slab(count * slot), device.host_slab(count * slot)
    ways: dict[str, Callable[[], object]] = {
        "bus, up": lambda: device.copy(UP, [other], [big]),
        "bus, down": lambda: device.copy(DOWN, [big], [other]),
        "blocks in order, up": lambda: lanes.up(theirs, mine, sizes),
        "blocks in order, down": lambda: lanes.down(mine, theirs, sizes),
        "blocks in disorder, up": lambda: lanes.up(shuffled, mine, sizes),
        "blocks in disorder, down": lambda: lanes.down(mine, shuffled, sizes),
    }

    def through(work: Callable[[], object]) -> None:
        work()
        device.settle()

    try:
        for name, work in ways.items():
            yield name, count * slot / min(bench.clock(partial(through, work)) for _ in range(5))
            bench.check_time()
    finally:
        near.close()
        far.close()


class Share(NamedTuple):
    """A kernel: bytes it must move, read or written once, and seconds of a launch."""

    kernel: str
    nbytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


Work = tuple[str, int, Callable[[], object]]
"""A kernel's name, the bytes it must move, a launch."""


def kernels(bench: Bench) -> Iterator[Share]:
    """Each kernel over one layer of the model, beside a plain copy in the same memory, which is the limit."""
    if importlib.util.find_spec("triton") is None:
        raise NotHere("Triton is not installed")
    if bench.place.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotHere("Triton has no GPU; TRITON_INTERPRET=1 runs the kernels without one")
    s, tokens = bench.shape, TOKENS[bench.place.type]
    slab = torch.randn(
        s.kv_heads, tokens // BLOCK_TOKENS, BLOCK_TOKENS, 2 * s.head_dim, dtype=DTYPES[s.dtype], device=bench.place
    )
    for name, nbytes, launch in (*_attention(bench, slab), *_scans(bench, slab)):
        yield Share(name, nbytes, _seconds(bench, launch))
        bench.check_time()


def _attention(bench: Bench, slab: Tensor) -> Iterator[Work]:
    """slab: keys and values of blocks, [kv_heads, blocks, tokens, 2 head_dim]."""
    from alaya_tiers.devices import kernels

    heads, blocks, size, width = slab.shape
    place, tokens, dim, rows = slab.device, blocks * size, width // 2, bench.shape.heads // heads
    other = torch.empty_like(slab)
    yield "copy", 2 * slab.nbytes, partial(other.copy_, slab)
    at = slab.data_ptr() + slab[0, 0].nbytes * torch.randperm(heads * blocks, device=place).view(heads, blocks)
    counts = torch.full((blocks,), size, dtype=torch.int32, device=place)
    starts = torch.arange(blocks, dtype=torch.int32, device=place) * size
    table = kernels.Table(at, starts, counts, dim, dim, slab.dtype, size)
    q = torch.randn(heads, rows, dim, dtype=slab.dtype, device=place)
    lo, hi = (torch.full((rows,), end, dtype=torch.int32, device=place) for end in (0, tokens))
    yield "attention, blocks", slab.nbytes, partial(kernels.attend_blocks, q, table, 0.1, lo, hi, None)

    few = tokens // 8
    where = (slab.data_ptr() + slab[0, 0, 0].nbytes * torch.randperm(heads * tokens, device=place))[: heads * few]
    first = torch.arange(heads + 1, device=place) * few
    listed = partial(kernels.attend_lists, q, where, first, few, (dim, dim), slab.dtype, 0.1, None)
    yield "attention, single tokens", slab.nbytes // 8, listed

    part = max(1, blocks // 8)
    copied = torch.empty(heads, part * size, width, dtype=slab.dtype, device=place)
    some = at[:, :part], starts[:part], counts[:part], size, 0, part * size
    yield "gather", 2 * copied.nbytes, partial(kernels.gather, *some, copied)


def _scans(bench: Bench, slab: Tensor) -> Iterator[Work]:
    """Of codes of as many blocks; the codes of each head's first, over and over."""
    from alaya_tiers.devices import scan_kernels

    heads, blocks, size, width = slab.shape
    place, dim, rows = slab.device, width // 2, bench.shape.heads // heads
    counts = torch.full((blocks,), size, dtype=torch.int32, device=place)
    for bits in (4, 8):
        layout = Layout(size, dim, dim, bits)
        made = encode(slab[:, 0, :, :dim], slab[:, 0, :, dim:], layout)
        assert made is not None
        slot = -(-layout.nbytes // 64) * 64
        codes = torch.zeros(heads, blocks, slot, dtype=torch.uint8, device=place)
        codes[:, :, : layout.nbytes] = made[:, None]
        names = codes.data_ptr() + slot * torch.arange(heads * blocks, device=place).view(heads, blocks)
        turned = torch.randn(heads, rows, layout.dims, device=place)
        asked = scan_kernels.Asked(
            turned, scan_kernels.rounded(turned, 0.2), names, torch.zeros_like(counts), counts,
            torch.full((heads, rows), 3.0, device=place), torch.full((heads,), 7.0, device=place),
        )  # fmt: skip
        shape = scan_kernels.Shape(layout.dims, dim, layout.rows, bits, layout.codes_at)

        def scan(codes: Tensor = codes, asked: Any = asked, shape: Any = shape) -> None:
            scan_kernels.finish(scan_kernels.begin(asked, shape, 0.1, 0.0, 0.2), asked.start)

        yield f"scan, {bits} bits", heads * blocks * layout.nbytes, scan


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    """Of one launch among many that follow each other; the first, which compiles, is not counted."""
    work()
    rounds = ROUNDS[bench.place.type]

    def often() -> None:
        for _ in range(rounds):
            work()

    return statistics.median(bench.clock(often) for _ in range(3)) / rounds


def waits(bench: Bench, step: Callable[[], Tensor], steps: int) -> dict[str, dict[str, float]]:
    """What a step calls of CUDA that makes the program wait or moves memory: how often, and seconds, in one step."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.place.type == "cuda")
    with profile(activities=activities) as seen:
        for _ in range(steps):
            step()
        bench.settle()
    return {
        each.key: {"calls": each.count / steps, "seconds": each.cpu_time_total / 1e6 / steps}
        for each in seen.key_averages()
        if each.key.startswith("cuda") and ("Synchronize" in each.key or "Memcpy" in each.key or "Launch" in each.key)
    }
