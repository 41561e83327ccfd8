"""Every kernel compiled for a GPU that is not there, exactly as the library launches it: to machine code, never run.

    TRITON_INTERPRET=0 python -m tests.compiled [all]

prints one JSON line for each: the kernel, what for, registers of a thread, spilled and shared bytes, how it reads.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime.jit import JITFunction

from alaya_tiers.devices import kernels, scan_kernels
from alaya_tiers.index.codes import Layout

HOPPER = 90


class Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", HOPPER, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Stands where kernels are launched: they are compiled and described instead."""

    def __init__(self) -> None:
        self.label = ""
        self._seen: set[str] = set()
        self._run: Any = JITFunction.run
        triton.runtime.driver.set_active(Driver())
        JITFunction.run = lambda kernel, *args, **options: self.compile(kernel, args, options)

    def compile(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Instead of a launch."""
        made = self._run(kernel, *args, **(options | {"warmup": True}))
        if made.hash not in self._seen:
            self._seen.add(made.hash)
            print(json.dumps({"kernel": kernel.__name__, "label": self.label, **described(made)}), flush=True)


def described(made: Any) -> dict[str, Any]:
    """What machine code needs, and how it reads memory and multiplies."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"\b(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    ptx = made.asm["ptx"]
    return {
        "registers": int(numbers["REG"]), "stack": int(numbers["STACK"]), "shared": made.metadata.shared,
        "by_16_bytes": bool(re.search(r"ld\.global[.\w]*\.v4\.b32|cp\.async\.cg", ptx)),
        "by_2_bytes": "ld.global.b16" in ptx, "tensor_cores": "mma" in ptx,
    }  # fmt: skip


def attention(compiler: Compiler, dtype: torch.dtype, k_dim: int, v_dim: int, rows: int) -> None:
    """What the device tier of a model with such heads launches."""
    compiler.label = f"{str(dtype)[6:]} {k_dim}+{v_dim} x{rows}"

    def some(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    longs, q, ends = torch.int64, some(8, rows, k_dim, of=dtype), some(rows)
    table = kernels.Table(some(8, 600, of=longs), some(600), some(600), k_dim, v_dim, dtype, 256)
    kernels.attend_blocks(q, table, 0.1, ends, ends, None, torch.zeros(8, rows))
    kernels.attend_lists(q, some(8000, of=longs), some(9, of=longs), 1000, (k_dim, v_dim), dtype, 0.1, None)
    kernels.gather(table.addresses, table.starts, table.counts, 256, 0, 512, some(8, 512, k_dim + v_dim, of=dtype))
    kernels.write_rows(some(8, 9, k_dim, of=dtype), some(8, 9, v_dim, of=dtype), some(8, of=longs))


def scanning(compiler: Compiler, k_dim: int, bits: int, rows: int, margin: float) -> None:
    """What a scan of such codes launches."""
    compiler.label, layout = f"{bits} bits {k_dim} x{rows} {margin}", Layout(256, k_dim, k_dim, bits)
    q = torch.randn(8, rows, layout.dims)
    table, counts = torch.zeros(8, 600, dtype=torch.int64), torch.zeros(600, dtype=torch.int32)
    asked = scan_kernels.Asked(
        q, scan_kernels.rounded(q, margin), table, counts, counts, torch.zeros(8, rows), torch.zeros(8)
    )
    shape = scan_kernels.Shape(layout.dims, layout.v_dim, layout.rows, bits, layout.codes_at)
    scan_kernels.finish(scan_kernels.begin(asked, shape, 0.1, 0.0, margin), torch.zeros(8, rows))


def growing(compiler: Compiler) -> None:
    """A context that becomes longer: nothing of this may compile anew with every block."""
    compiler.label, q = "growing", torch.zeros(8, 4, 128, dtype=torch.bfloat16)
    layout, turned = Layout(256, 128, 128, 4), torch.randn(8, 4, 128)
    shape = scan_kernels.Shape(layout.dims, layout.v_dim, layout.rows, 4, layout.codes_at)
    ends, rounded = torch.zeros(4, dtype=torch.int32), scan_kernels.rounded(turned, 0.2)
    for n in (2, 16, 37, 600, 1201):
        table, counts = torch.zeros(8, n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
        blocks = kernels.Table(table, counts, counts, 128, 128, torch.bfloat16, 256)
        kernels.attend_blocks(q, blocks, 0.1, ends, ends, None)
        where, first = torch.zeros(8 * n, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
        kernels.attend_lists(q, where, first, n, (128, 128), torch.bfloat16, 0.1, None)
        asked = scan_kernels.Asked(turned, rounded, table, counts, counts, torch.zeros(8, 4), torch.zeros(8))
        scan_kernels.finish(scan_kernels.begin(asked, shape, 0.1, 0.0, 0.2), torch.zeros(8, 4))


if __name__ == "__main__":
    compiler, widely = Compiler(), sys.argv[1:] == ["all"]
    attention(compiler, torch.bfloat16, 128, 128, 4)
    scanning(compiler, 128, 4, 4, 0.2)
    growing(compiler)
    if widely:
        for dtype in kernels.DTYPES:
            for k_dim, v_dim, rows in (
                (64, 64, 7),
                (96, 96, 32),
                (80, 80, 1),
                (256, 256, 64),
                (192, 128, 16),
                (17, 9, 3),
            ):
                attention(compiler, dtype, k_dim, v_dim, rows)
        for k_dim, bits, rows, margin in (
            (128, 8, 8, 1.0),
            (64, 4, 7, 0.2),
            (256, 8, 32, 0.2),
            (80, 4, 1, 1.0),
            (17, 8, 3, 1.0),
        ):
            scanning(compiler, k_dim, bits, rows, margin)
