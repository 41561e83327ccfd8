"""The script for GPUs runs to its end over the simulated device, tiny: that it measures what it says, not how fast."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alaya_tiers.tools import cli

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
    assert found["left_out"] == []
    assert len(found["copies"]) == 6
    assert all(rate > 0 for rate in found["copies"].values())
    ran = {(each["name"], each["tokens"]) for each in found["decode"] if each["seconds"]}
    assert ran == {(w, n) for w in ("full, GPU", "ours, GPU", "ours, host", "ours, ssd") for n in (1024, 2500)}
    assert [each["name"] for each in found["decode"] if each["skipped"]] == ["offloaded", "offloaded"]
    assert [each["tokens"] for each in found["first"]] == [1024, 2500]
    assert all(seconds > 0 for each in found["first"] for seconds in each["seconds"].values())
    assert set(found["prefill"]) == {"DynamicCache", "ours, GPU", "ours, ssd"}
    assert not drawing or picture.stat().st_size > 1000
    assert "a decode step" in result.output
    assert "offloads from CUDA only" in result.output
    assert not list(tmp_path.glob("bench-alaya-*"))


def test_time_that_is_used_up_is_said(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--contexts", "600", "--seconds", "0", "--directory", str(tmp_path)]
    result = CliRunner().invoke(cli.app, ["bench", "gpu", *TINY, *options])
    assert result.exit_code == 0, result.output
    assert "left out, no time: decode, 600 tokens" in result.output


def test_no_gpu_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(cli.app, ["bench", "gpu"])
    assert result.exit_code == 2
    assert "--device simulated" in " ".join(result.output.split())
