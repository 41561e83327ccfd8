"""The script for GPUs runs to its end over the simulated device, tiny: that it measures what it says, not how fast."""

import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alaya_tiers.tools import cli, gpu, gpu_probes, quality
from alaya_tiers.tools.baselines import Shape
from alaya_tiers.tools.gpu_bench import Bench
from alaya_tiers.tools.gpu_report import Decode

TINY = ["--layers", "2", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32"]


@pytest.mark.slow
@pytest.mark.leaks("matplotlib keeps the fonts it has read open")
@pytest.mark.parametrize("device", ["simulated"])
def test_the_whole_report(device: str, tmp_path: Path) -> None:
    out, picture = tmp_path / "gpu.json", tmp_path / "gpu.png"
    drawing = importlib.util.find_spec("matplotlib") is not None
    options = ["--device", device, "--contexts", "1K,2500", "--json", str(out)]
    options += ["--plot", str(picture)] if drawing else []
    result = CliRunner().invoke(cli.app, ["bench", "gpu", *TINY, *options, "--directory", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    kernels = importlib.util.find_spec("triton") is not None
    assert found["left_out"] == ([] if kernels else ["kernels: Triton is not installed"])
    assert len(found["copies"]) == 6
    assert all(rate > 0 for rate in found["copies"].values())
    ran = {(each["name"], each["tokens"]) for each in found["decode"] if each["seconds"]}
    assert ran == {(w, n) for w in ("full, GPU", "ours, GPU", "ours, host", "ours, ssd") for n in (1024, 2500)}
    assert [each["name"] for each in found["decode"] if each["skipped"]] == ["offloaded", "offloaded"]
    assert [each["tokens"] for each in found["first"]] == [1024, 2500]
    assert all(seconds > 0 for each in found["first"] for seconds in each["seconds"].values())
    assert set(found["prefill"]) == {"DynamicCache", "ours, GPU", "ours, ssd"}
    assert found["failed"] == {}
    if kernels:  # interpreted, in tests
        named = [each["kernel"] for each in found["kernels"]]
        assert named == [
            "copy", "attention, blocks", "attention, single tokens", "gather", "scan, 4 bits", "scan, 8 bits",
        ]  # fmt: skip
        assert all(each["seconds"] > 0 for each in found["kernels"])
    assert not drawing or picture.stat().st_size > 1000
    assert "a decode step" in result.output
    assert "offloads from CUDA only" in result.output
    assert not list(tmp_path.glob("bench-alaya-*"))


def test_time_that_is_used_up_is_said(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--contexts", "600", "--seconds", "0", "--directory", str(tmp_path)]
    result = CliRunner().invoke(cli.app, ["bench", "gpu", *TINY, *options])
    assert result.exit_code == 0, result.output
    assert "left out: decode, 600 tokens: no time" in result.output


def test_a_part_that_fails_is_said_and_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are in the file while the next part runs."""
    out, kept = tmp_path / "gpu.json", list[dict[str, Any]]()

    def broken(bench: Bench) -> Iterator[Any]:
        yield gpu_probes.Share("copy", 2, 1.0)
        raise RuntimeError("an illegal\nmemory access")

    def looking(*args: Any) -> Iterator[tuple[str, Any]]:
        kept.append(json.loads(out.read_text()))
        yield "decode", Decode("full, GPU", 600, seconds=[0.1])

    monkeypatch.setattr(gpu_probes, "kernels", broken)
    monkeypatch.setattr(gpu, "_decodes", looking)
    monkeypatch.setattr(gpu, "_firsts", lambda *args: iter(()))
    monkeypatch.setattr(gpu, "_prefills", lambda *args: iter([("prefill", {"DynamicCache": 1.0})]))
    options = ["--device", "cpu", "--contexts", "600", "--directory", str(tmp_path), "--json", str(out)]
    result = CliRunner().invoke(cli.app, ["bench", "gpu", *TINY, *options])
    assert result.exit_code == 1
    assert "failed: kernels: RuntimeError: an illegal memory access" in result.output
    assert list(kept[0]["failed"]) == ["kernels"]
    assert len(kept[0]["copies"]) == 6
    assert kept[0]["kernels"] == [{"kernel": "copy", "nbytes": 2, "seconds": 1.0}]
    assert json.loads(out.read_text())["prefill"] == {"DynamicCache": 1.0}


def test_every_part_has_its_share_of_the_time(tmp_path: Path) -> None:
    bench = Bench(Shape(2, 64, 4, 2, 16), (32 << 10, 128 << 10, 512 << 10, 1 << 20), "cpu", 540, tmp_path, print)
    parts = gpu.parts_of(bench, tmp_path)
    assert [part.name for part in parts] == [
        "copies", "kernels", "decode, 131,072 tokens", "decode, 32,768 tokens", "the first token, 32,768 tokens",
        "the first token, 131,072 tokens", "prefill", "quality", "decode, 524,288 tokens", "decode, 1,048,576 tokens",
    ]  # fmt: skip
    every = sum(part.weight for part in parts)
    shares = {part.name: 540 * part.weight / every for part in parts}
    assert shares["copies"] > 10
    assert shares["decode, 131,072 tokens"] > 30
    assert shares["decode, 1,048,576 tokens"] > 150


def test_what_waits_is_counted(tmp_path: Path) -> None:
    bench, done = Bench(Shape(2, 64, 4, 2, 16), (600,), "cpu", 540, tmp_path, print), list[int]()

    def step() -> torch.Tensor:
        done.append(1)
        return torch.ones(3) + 1

    assert gpu_probes.waits(bench, step, 2) == {}, "nothing of CUDA"
    assert len(done) == 2


@pytest.mark.slow
def test_quality_of_a_trained_model(tmp_path: Path) -> None:
    bench = Bench(Shape(2, 64, 4, 2, 16), (600,), "cpu", 540, tmp_path, lambda text: None)
    ((_, rows),) = itertools.islice(gpu._quality(bench, quality.MODEL), 1)
    assert rows[0]["way"] == "DynamicCache"
    assert any(row["way"].startswith("DIPR") for row in rows)


def test_no_gpu_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(cli.app, ["bench", "gpu"])
    assert result.exit_code == 2
    assert "--device simulated" in " ".join(result.output.split())
