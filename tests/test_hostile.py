"""Stores of strangers: errors of ours, no file outside, no program run, no more memory or time than a good one takes.

More than usual: ALAYA_TIERS_HOSTILE=20000 (whole stores) and ALAYA_TIERS_FUZZ=2000000 (files into parsers).
``python -m tests.fuzz`` goes on for as long as one likes, with atheris if it is installed.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alaya_tiers.errors import StoreCorrupt, StoreError
from alaya_tiers.repair import examine
from alaya_tiers.seams import SystemDisk
from alaya_tiers.store import Store
from tests.fuzz import GOLDEN, KINDS, changed, one, seeds
from tests.hostile import use
from tests.test_cli import call

STORES = int(os.environ.get("ALAYA_TIERS_HOSTILE", "10"))
FILES = int(os.environ.get("ALAYA_TIERS_FUZZ", "1500"))
SEEDS = seeds()


@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_no_bytes_get_anything_but_errors_of_ours_out_of_a_parser(kind: str, data: bytes) -> None:
    one(kind, data)


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_no_change_to_a_real_file_does() -> None:
    rng, seen = random.Random(0), {"refused": 0, "taken": 0}
    assert all(one(kind, data) == "taken" for kind in ("root", "manifest", "record", "shard") for data in SEEDS[kind])
    for _ in range(FILES):
        kind = rng.choice(KINDS)
        seen[one(kind, changed(rng, rng.choice(SEEDS[kind])))] += 1
    assert min(seen.values()) > FILES / 100, "the changes are too coarse, or too fine, to test anything"


@pytest.mark.slow
@pytest.mark.timeout(48 * 3600)
def test_a_stranger_s_store_cannot_reach_out(tmp_path: Path, root: Path) -> None:
    """In a process with little memory to spare, watched by an audit hook."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", str(tmp_path), str(STORES), "1"], cwd=root, capture_output=True,
        text=True, check=False, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert not report["bad"]
    assert report["seen"]["StoreCorrupt"] > STORES / 10
    assert report["seen"]["used"] > STORES / 2
    assert report["slowest"] < 5, "seconds of processor time for one store"
    assert report["grown"] < 128 << 20, "bytes"


@pytest.mark.parametrize("place", ["segments", "generations", "session"])
def test_a_folder_that_is_a_link_is_refused_before_anything_is_touched(tmp_path: Path, place: str) -> None:
    """Opening removes what it does not know in these folders: a link to somebody's home would have it emptied."""
    home, store = tmp_path / "home", tmp_path / "store"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    Store(store, {"a": 1}, SystemDisk()).close()
    store.mkdir(exist_ok=True)
    (store / ("session-00000000" if place == "session" else place)).symlink_to(home)
    with pytest.raises(StoreCorrupt, match="link"):
        Store(store, None, SystemDisk())
    with pytest.raises(StoreCorrupt, match="link"):
        examine(SystemDisk(), str(store), lambda done, of: None)
    for command in ("ls", "show", "verify", "gc"):
        assert call(command, str(store)).exit_code == 2
    assert (home / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("what", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_opened(tmp_path: Path, what: Callable[[Path], None]) -> None:
    """A read from a pipe waits for ever, in io_submit too; and a folder that was opened must be closed again."""
    what(tmp_path / "odd")
    before = len(os.listdir("/proc/self/fd"))
    for attempt in (lambda: SystemDisk().fetch(str(tmp_path / "odd"), 100), lambda: opened(tmp_path / "odd")):
        with pytest.raises(OSError, match=r"not a regular|Is a directory"):
            attempt()
    assert len(os.listdir("/proc/self/fd")) == before


def opened(path: Path) -> int:
    return SystemDisk().open(str(path), create=False, direct=False)


def test_a_pipe_in_place_of_keys_is_damage_to_a_sparse_session(tmp_path: Path) -> None:
    """Single pages of blocks are read by another way than whole blocks."""
    store = Path(shutil.copytree(GOLDEN, tmp_path / "store"))
    for shard in store.glob("**/c/0/0/0"):
        shard.unlink()
        os.mkfifo(shard)
    for mode in ("sparse", "exact"):
        with pytest.raises(StoreError):
            use(store, mode)
