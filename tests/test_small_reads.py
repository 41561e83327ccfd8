"""Small blocks that lie apart are read by one call, and each that fails is the error it would be by itself."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from alaya_tiers import coded
from alaya_tiers.blocks import PAGE
from alaya_tiers.errors import IOFailed, StoreCorrupt
from alaya_tiers.index.codes import Layout
from alaya_tiers.seams import SystemDisk, read_into
from alaya_tiers.testing_world import Fault, SimDisk
from tests.test_ssd import HEADS, RUNS, Stored, disk

__all__ = ["disk"]  # the fixture

APART = np.arange(0, HEADS * RUNS, 2)


def read_blocks(stored: Stored, blocks: npt.NDArray[np.int64]) -> None:
    """Into their places in memory, which is emptied first, by one job."""
    stored.memory[:] = 0
    stored.tier._threads = 1
    (job,) = stored.tier.read_jobs(
        stored.files[blocks], stored.offsets[blocks], stored.addresses[blocks], stored.digests[blocks]
    )
    job()


def test_what_lies_apart_is_read_by_one_call(
    tmp_path: Path, disk: SystemDisk | SimDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, calls = Stored(disk, str(tmp_path), 64), list[int]()
    read_pages = disk.read_pages

    def counted(handles: Any, *arguments: Any) -> Any:
        calls.append(len(handles))
        return read_pages(handles, *arguments)

    monkeypatch.setattr(disk, "read_pages", counted)
    stored.tier.files[0].known[:] = False
    read_blocks(stored, APART)
    assert calls == [len(APART)]
    assert np.array_equal(stored.memory[APART], stored.data[APART])
    assert not stored.memory[1::2].any()
    assert stored.tier.files[0].known.tolist() == [i % 2 == 0 for i in range(HEADS * RUNS)]
    read_blocks(stored, np.arange(HEADS * RUNS))
    assert calls == [len(APART)], "neighbours are one large read"
    assert np.array_equal(stored.memory, stored.data)


@pytest.mark.parametrize("n", [1, 3])
def test_one_that_fails_is_an_error_and_one_that_is_short_is_completed(n: int) -> None:
    disk = SimDisk(random.Random(0))
    stored = Stored(disk, "/store", 64)
    disk.faults.append(Fault("read", n))
    with pytest.raises(IOFailed):
        read_blocks(stored, APART)
    disk.faults[:] = [Fault("read", n, "short")]
    read_blocks(stored, APART)
    assert np.array_equal(stored.memory[APART], stored.data[APART])
    disk.faults[:] = [Fault("read", n, "flip")]
    with pytest.raises(StoreCorrupt, match="damaged"):
        read_blocks(stored, APART)
    disk.faults[:] = [Fault("open")]
    stored.tier._handles.close()
    with pytest.raises(IOFailed):
        read_blocks(stored, APART)


def test_a_file_that_ends_early_is_said_to(tmp_path: Path) -> None:
    stored = Stored(SystemDisk(), str(tmp_path), 64)
    path = Path(stored.tier.files[0].path)
    path.write_bytes(path.read_bytes()[: int(stored.offsets[APART[-1]]) + 5])
    with pytest.raises(StoreCorrupt, match="ends before"):
        read_blocks(stored, APART)


def test_codes_that_are_neighbours_are_read_together_and_bad_ones_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(64, 8, 8, 8)
    data = np.random.default_rng(0).integers(0, 256, (10, 2 * layout.nbytes), np.uint8)
    digests = tuple(xxhash.xxh3_64_intdigest(run.tobytes()) for run in data)
    codes = coded.LayerCodes(layout, 2, 0, digests, (0,) * 10).of_codes
    damaged = data.copy()
    damaged[6, 3] ^= 1
    (tmp_path / "codes").write_bytes(damaged.tobytes()[: 9 * codes.nbytes + 5])
    monkeypatch.setattr(coded, "TOGETHER", 3 * codes.nbytes)
    disk = SystemDisk()
    handle, sizes, take = disk.open(str(tmp_path / "codes"), create=False, direct=False), list[int](), read_into

    def noted(disk: Any, handle: int, buffer: memoryview, offset: int) -> int:
        sizes.append(len(buffer) // codes.nbytes)
        return take(disk, handle, buffer, offset)

    monkeypatch.setattr(coded, "read_into", noted)
    wanted = [0, 2, 3, 4, 5, 6, 7, 9]
    room = np.zeros((40, layout.nbytes), np.uint8)
    places = np.array([[0, 1], [4, 5], [6, 7], [8, 9], [30, 20], [12, 13], [14, 15], [16, 17]])
    try:
        good = coded.runs_into(disk, handle, codes, wanted, room.ctypes.data + places * layout.nbytes)
    finally:
        disk.close(handle)
    assert sizes == [1, 3, 3, 1]
    assert good.tolist() == [run not in (6, 9) for run in wanted]
    for run, place in zip(np.array(wanted)[good], places[good], strict=True):
        assert np.array_equal(room[place].ravel(), data[run])
    assert not np.delete(room, places[good].ravel(), 0).any()  # what is not good is nowhere


def test_what_a_file_says_of_its_pages_comes_with_the_first_of_them(
    tmp_path: Path, disk: SystemDisk | SimDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, calls = Stored(disk, str(tmp_path), 64), list[int]()
    stored.tier.write_index(0)
    file, read_pages = stored.tier.files[0], disk.read_pages

    def counted(handles: Any, *arguments: Any) -> Any:
        calls.append(len(handles))
        return read_pages(handles, *arguments)

    monkeypatch.setattr(disk, "read_pages", counted)
    file.known[:], file.told, file.pages[:] = False, False, 0
    blocks = np.array([0, 3, 7])
    stored.read(blocks, np.array([1, 0, 1]))
    stored.read(blocks, np.array([0, 1, 0]))
    assert calls == [len(blocks) + 1, len(blocks)]
    assert file.known.tolist() == [i in blocks for i in range(HEADS * RUNS)]
    assert np.array_equal(stored.memory[3, PAGE : 2 * PAGE], stored.data[3, PAGE : 2 * PAGE])
