"""bench compression runs tiny here: that it is lossless and counts right."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alaya_tiers.tools import cli
from alaya_tiers.tools.compression import BLOCK, CODECS, Compressed, blocks_of, measure


def test_blocks_are_rows_of_key_and_value() -> None:
    k, v = torch.randn(1, 2, 2 * BLOCK + 5, 4), torch.randn(1, 2, 2 * BLOCK + 5, 8)
    parts = blocks_of(k, v)
    assert parts["keys"].shape == (4, BLOCK, 4)
    assert parts["values"].shape == (4, BLOCK, 8)
    rows = torch.cat([k[0, 1, BLOCK : 2 * BLOCK], v[0, 1, BLOCK : 2 * BLOCK]], 1)
    assert (parts["rows of key and value"][3] == rows.numpy()).all()
    assert blocks_of(k.bfloat16(), v.bfloat16())["keys"].dtype == np.int16


def test_what_repeats_gets_small_and_noise_does_not() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, BLOCK, 64), np.uint8)
    for blocks, low, high in ((noise, 0.9, 1.01), (np.zeros_like(noise), 20, 1e6)):
        found = list(measure("", "", blocks, 1))
        assert [one.codec for one in found] == list(CODECS)
        for one in found:
            assert low < one.ratio < high
            assert one.block_bytes == BLOCK * 64
            assert min(one.encode, one.decode) > 0


def test_a_slow_codec_or_a_fast_disk_gains_nothing() -> None:
    one = Compressed("", "", 1, "", ratio=1.5, encode=1.0, decode=1e9)
    assert one.gain(disk=0.5e9) == 1.5
    assert one.gain(disk=0.8e9) == pytest.approx(1.25)
    assert one.gain(disk=2e9) == 0.5


@pytest.mark.slow
def test_the_command_reports_both_models(root: Path, tmp_path: Path) -> None:
    words = ["bench", "compression", "--model", str(root / "tests/data/recall"), "--tokens", "512", "--rounds", "1"]
    done = CliRunner().invoke(cli.app, [*words, "--dir", str(tmp_path), "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "found.json").read_text())
    assert len(data["rows"]) == 2 * 3 * len(CODECS)
    assert {row["data"] for row in data["rows"]} == {"recall", "computed model"}
    assert all(row["ratio"] > 0.99 for row in data["rows"])
