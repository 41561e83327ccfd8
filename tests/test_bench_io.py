"""bench io runs tiny here: that it moves what it says and counts right, never how fast anything is."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from alaya_tiers.errors import ConfigError, StoreCorrupt
from alaya_tiers.tools import cli, disk, transfers
from alaya_tiers.tools.baselines import Shape
from alaya_tiers.tools.rawdisk import transfer
from alaya_tiers.tools.transfers import AT_RANDOM, Blocks, Transfer

KIB = 1 << 10


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, 8 * KIB, 2, 128 * KIB, direct=False)
    try:
        assert blocks.write() > 0
        before = Path(blocks.path).read_bytes()[: 128 * KIB]
        for slot in range(16):
            blocks._host.tensor(slot).zero_()
        assert blocks.read(np.arange(16)) > 0, "every block is compared with its digest"
        assert b"".join(blocks._host.tensor(slot).numpy().tobytes() for slot in range(16)) == before
        with open(blocks.path, "r+b") as file:
            file.seek(3 * 8 * KIB + 5)
            file.write(bytes([before[3 * 8 * KIB + 5] ^ 1]))
        with pytest.raises(StoreCorrupt):
            blocks.read(np.array([3]))
    finally:
        blocks.close()


def test_plain_transfers_move_every_byte(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(7)
    assert transfer(tmp_path / "file", order * 4 * KIB, 4 * KIB, 3, direct=False, write=True).rate > 0
    assert os.path.getsize(tmp_path / "file") == 7 * 4 * KIB
    assert transfer(tmp_path / "file", order * 4 * KIB, 4 * KIB, 3, direct=False).rate > 0
    with pytest.raises(OSError, match="cut short"):
        transfer(tmp_path / "file", np.array([7]) * 4 * KIB, 4 * KIB, 1, direct=False)


def test_a_ratio_is_of_neighbours_in_time() -> None:
    assert Transfer("", 1, 1, ours=[8.0, 1.0, 90.0], plain=[10.0, 1.0, 100.0]).ratio == 0.9


def test_random_reads_have_no_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    read = Blocks.read

    def noted(self: Blocks, order: transfers.Order) -> float:
        asked.append(order.tolist())
        return read(self, order)

    monkeypatch.setattr(Blocks, "read", noted)
    found = list(transfers.transfers(tmp_path, [4 * KIB], [1], 64 * KIB, 2, direct=False, say=lambda text: None))
    assert [t.what for t in found] == ["write", "read, in order", AT_RANDOM]
    assert all(len(t.ours) == len(t.plain) == 2 for t in found)
    assert asked[0] == list(range(16))
    assert sorted(asked[2]) == list(range(0, 16, 2)) != asked[2]


@pytest.mark.slow
def test_the_three_ways_of_a_prefill_do_what_they_say(tmp_path: Path) -> None:
    shape = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16)
    kept, behind, spilled = disk.prefills(tmp_path, shape, 4096, 512, 1, lambda text: None)
    kv = 4096 * shape.token_bytes
    assert (kept.written, kept.read) == (0, 0)
    assert behind.read == 0
    assert behind.written >= kv // 2
    assert spilled.written >= kv // 2
    assert spilled.read > 0
    found = disk.Found({}, True, prefills=[replace(kept, seconds=[2.0, 4.0]), replace(behind, seconds=[3.0, 6.0])])
    assert found.slowdown(found.prefills[1]) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_command_reports_all_of_it(tmp_path: Path) -> None:
    words = ["bench", "io", "--quick", "--sizes", "4,64", "--depths", "2", "--tokens", "0", "--dir", str(tmp_path)]
    done = CliRunner().invoke(cli.app, [*words, "--json", str(tmp_path / "io.json")])
    assert done.exit_code == 0, done.output
    assert "read, at random" in done.output
    data = json.loads((tmp_path / "io.json").read_text())
    assert [(t["what"], t["size"]) for t in data["transfers"]] == [
        (what, size * KIB) for size in (4, 64) for what in ("write", "read, in order", AT_RANDOM)
    ]
    assert data["floors"]["reads"]["value"] == min(t["ratio"] for t in data["transfers"] if t["what"] == AT_RANDOM)
    assert not list(tmp_path.glob("bench-*"))


@pytest.mark.parametrize(
    "words",
    [("--sizes", "5"), ("--sizes", "a"), ("--depths", "0"), ("--sizes", "2048", "--mib", "1"), ("--sizes", "4096")],
)
def test_options_that_make_no_sense_are_refused(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "io", *words])
    assert done.exit_code == 2
    assert "error: --" in done.output


def test_depths_are_numbers() -> None:
    with pytest.raises(ConfigError, match="--depths"):
        disk._numbers("--depths", "1,x")
