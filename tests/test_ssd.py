"""The ssd tier by itself: single pages of blocks, and the digests that let them be believed."""

import random
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash

from alaya_tiers import digest
from alaya_tiers.blocks import PAGE, BlockShape, Geometry, round_up
from alaya_tiers.errors import StoreCorrupt, StoreError
from alaya_tiers.seams import SystemDisk
from alaya_tiers.testing_world import Fault, SimDisk
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.ssd import SsdTier

HEADS, RUNS = 3, 4


class Stored:
    """Blocks of one segment on a disk, and what is in them."""

    def __init__(self, disk: SystemDisk | SimDisk, directory: str, width: int) -> None:
        shape = BlockShape(Geometry(HEADS, width // 2, width - width // 2, torch.float32), 64)
        self.tier = SsdTier(directory, disk, Accountant({"ssd": None}), 64 * RUNS, 3, direct=False)
        self.stride = round_up(shape.nbytes, PAGE)
        self.data = np.zeros((HEADS * RUNS, self.stride), np.uint8)
        self.data[:, : shape.nbytes] = np.random.default_rng(0).integers(0, 256, (HEADS * RUNS, shape.nbytes))
        self.nbytes, self.memory = shape.nbytes, _aligned(self.data.shape)
        self.memory[:] = self.data
        places = [self.tier.place(0, shape, 0, 64 * run, head) for head in range(HEADS) for run in range(RUNS)]
        weakref.finalize(self, self.tier.close)
        self.files = np.array([n for n, _ in places], np.int32)
        self.offsets = np.array([at for _, at in places], np.int64)
        self.digests = np.zeros(len(places), np.uint64)
        for job in self.tier.write_jobs(self.files, self.offsets, self.addresses):
            members, found = job()
            self.digests[members] = found

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        start = int(self.memory.__array_interface__["data"][0])
        return start + np.arange(HEADS * RUNS) * self.stride

    def read(self, blocks: npt.NDArray[np.int64], pages: npt.NDArray[np.int64]) -> None:
        """Into their place in memory, which is emptied first."""
        self.memory[:] = 0
        offsets, addresses = self.offsets[blocks] + pages * PAGE, self.addresses[blocks] + pages * PAGE
        for job in self.tier.page_jobs(self.files[blocks], offsets, addresses, self.digests[blocks]):
            job()


def _aligned(shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    nbytes = shape[0] * shape[1]
    raw = np.zeros(nbytes + PAGE, np.uint8)
    start = -raw.__array_interface__["data"][0] % PAGE
    return raw[start : start + nbytes].reshape(shape)


@pytest.fixture(params=["system", "simulated"])
def disk(request: pytest.FixtureRequest) -> SystemDisk | SimDisk:
    return SystemDisk() if request.param == "system" else SimDisk(random.Random(0))


@pytest.mark.parametrize("width", [64, 37], ids=["whole pages", "a last page that is shorter"])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_pages_are_read_where_they_belong_and_nothing_else(
    tmp_path: Path, disk: SystemDisk | SimDisk, width: int, share: float
) -> None:
    stored, rng = Stored(disk, str(tmp_path), width), np.random.default_rng(1)
    pages = stored.stride // PAGE
    wanted = rng.permutation(HEADS * RUNS * pages)[: max(1, int(share * HEADS * RUNS * pages))]
    stored.read(*np.divmod(wanted, pages))
    expected = np.zeros_like(stored.data).reshape(-1, PAGE)
    expected[wanted] = stored.data.reshape(-1, PAGE)[wanted]
    assert np.array_equal(stored.memory.reshape(-1, PAGE), expected)


def test_more_neighbours_than_one_read_takes(tmp_path: Path) -> None:
    stored = Stored(SystemDisk(), str(tmp_path), 512)
    pages = stored.stride // PAGE
    every = np.arange(HEADS * RUNS * pages)
    assert every.size > 256
    stored.read(*np.divmod(every, pages))
    assert np.array_equal(stored.memory, stored.data)


def test_every_flipped_bit_of_a_page_is_found(tmp_path: Path) -> None:
    stored, rng = Stored(SystemDisk(), str(tmp_path), 37), np.random.default_rng(2)
    path = stored.tier.files[0].path
    whole = Path(path).read_bytes()
    for _ in range(100):
        block, byte = int(rng.integers(HEADS * RUNS)), int(rng.integers(stored.nbytes))
        torn = bytearray(whole)
        torn[stored.offsets[block] + byte] ^= 1 << int(rng.integers(8))
        Path(path).write_bytes(torn)
        with pytest.raises(StoreCorrupt, match="damaged"):
            stored.read(np.array([block]), np.array([byte // PAGE]))


def test_a_file_that_ends_early_or_is_gone(tmp_path: Path) -> None:
    stored = Stored(SystemDisk(), str(tmp_path), 64)
    path, last = Path(stored.tier.files[0].path), np.array([HEADS * RUNS - 1, 0])
    path.write_bytes(path.read_bytes()[: int(stored.offsets[-1])])
    with pytest.raises(StoreCorrupt, match="ends before"):
        stored.read(last, np.array([0, 0]))
    stored.tier.remove(str(path))
    with pytest.raises(StoreCorrupt, match="missing"):
        stored.read(last, np.array([0, 0]))


def _opened_again(stored: Stored) -> None:
    """Another process has the file now: of its pages it knows what the file says."""
    file = stored.tier.files[0]
    file.known[:], file.pages[:], file.told = False, 0, False


def test_a_file_tells_the_digests_of_its_pages(tmp_path: Path, disk: SystemDisk | SimDisk) -> None:
    stored = Stored(disk, str(tmp_path), 37)
    stored.tier.write_index(0)
    pages = stored.tier.files[0].pages.copy()
    _opened_again(stored)
    stored.read(np.array([1, 7, 7]), np.array([0, 1, 2]))
    assert np.array_equal(stored.memory[7, PAGE : 3 * PAGE], stored.data[7, PAGE : 3 * PAGE])
    assert stored.tier.learned() == PAGE, "all digests, and no block whole"
    assert np.array_equal(stored.tier.files[0].pages, pages)
    assert np.flatnonzero(stored.tier.files[0].known).tolist() == [1, 7], (
        "believed where they hash to the block's digest"
    )
    stored.read(np.array([2]), np.array([0]))
    assert stored.tier.learned() == 0


@pytest.mark.parametrize("how", ["no digests", "cut off", "damaged", "of other blocks"])
def test_what_a_file_tells_wrong_is_not_believed(tmp_path: Path, how: str) -> None:
    stored = Stored(SystemDisk(), str(tmp_path), 37)
    file, path = stored.tier.files[0], Path(stored.tier.files[0].path)
    if how == "of other blocks":
        file.pages[:] = file.pages[::-1].copy()
    if how != "no digests":
        stored.tier.write_index(0)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[: file.data_bytes + 100])
    if how == "damaged":
        data = bytearray(path.read_bytes())
        data[file.data_bytes + 8 * file.pages.shape[1] * 7] ^= 1
        path.write_bytes(data)
    _opened_again(stored)
    for _ in range(2):
        stored.read(np.array([7]), np.array([1]))
        assert np.array_equal(stored.memory[7, PAGE : 2 * PAGE], stored.data[7, PAGE : 2 * PAGE])
    assert stored.tier.learned() == PAGE + stored.stride, "once, the block was read whole"
    data = bytearray(path.read_bytes())
    data[int(stored.offsets[7]) + PAGE] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="damaged"):
        stored.read(np.array([7]), np.array([1]))
    _opened_again(stored)
    with pytest.raises(StoreCorrupt, match="damaged"):
        stored.read(np.array([7]), np.array([1]))


@pytest.mark.parametrize(
    ("kind", "persistent", "heals"),
    [("error", False, True), ("error", True, False), ("short", False, True), ("flip", False, False)],
)
def test_faults_of_the_disk(kind: str, persistent: bool, heals: bool) -> None:
    disk = SimDisk(random.Random(3))
    stored = Stored(disk, "store", 64)
    wanted = np.arange(HEADS * RUNS), np.full(HEADS * RUNS, 1)
    disk.faults.append(Fault("read", 2, kind, persistent=persistent))
    if not heals:
        with pytest.raises(StoreError):
            stored.read(*wanted)
        disk.faults.clear()
    stored.read(*wanted)  # what failed or came short is read once more by itself
    assert np.array_equal(stored.memory[:, PAGE : 2 * PAGE], stored.data[:, PAGE : 2 * PAGE])


def test_digests_are_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(4).integers(0, 256, 3 * PAGE + 100, np.uint8)
    by_hand = [xxhash.xxh3_64_intdigest(data[at : at + PAGE].tobytes()) for at in range(0, data.size, PAGE)]
    address = np.array([data.__array_interface__["data"][0]])
    assert digest.pages_at(address, data.size).tolist() == [by_hand] == [digest.pages_of(data.tobytes()).tolist()]
    monkeypatch.setattr(digest, "_xxh3", lambda: None)
    assert digest.pages_at(address, data.size).tolist() == [by_hand]
    whole = xxhash.xxh3_64_intdigest(np.array(by_hand, "<u8").tobytes())
    assert digest.of_pages(np.array([by_hand], np.uint64)).tolist() == [whole]
