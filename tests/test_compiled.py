"""The kernels become machine code of a Hopper GPU, here, without one: what the interpreter would never notice."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'alaya-tiers[gpu]'")

SHARED = 227 << 10
"""Bytes of shared memory that a program may have there."""

WIDELY = os.environ.get("ALAYA_COMPILE") == "all"
"""Every dtype and many shapes: minutes."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles(root: Path, tmp_path: Path) -> None:
    surroundings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    made = subprocess.run(
        [sys.executable, "-m", "tests.compiled", *(["all"] if WIDELY else [])],
        cwd=root, env=surroundings, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-4000:]
    found: list[dict[str, Any]] = [json.loads(line) for line in made.stdout.splitlines()]
    names = {each["kernel"] for each in found}
    assert names == {
        "_attend_blocks", "_attend_lists", "_merge", "_gather", "_write_rows", "_begin", "_finish", "_pack",
    }  # fmt: skip
    anew = Counter(each["kernel"] for each in found if each["label"] == "growing")
    assert set(anew) <= {"_merge"}, "a context that grows makes the program wait for the compiler"
    assert anew["_merge"] <= 4
    for each in found:
        assert each["shared"] <= SHARED, each
        if each["label"] in ("bfloat16 128+128 x4", "4 bits 128 x4 0.2"):  # Llama's heads
            assert each["kernel"] == "_finish" or each["stack"] <= 64, each
            assert each["kernel"] == "_pack" or each["by_16_bytes"] or each["kernel"] == "_write_rows", each
            assert not each["by_2_bytes"], each
            assert each["tensor_cores"] == (each["kernel"] in ("_attend_blocks", "_attend_lists", "_begin", "_finish"))
