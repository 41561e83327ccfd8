"""Any damage to any file of a store is found before it is used; repair and salvage keep what is undamaged.

More cases than usual: ALAYA_TIERS_MUTATIONS=125 (of each kind of damage to each kind of file), and of flipped bits
ALAYA_TIERS_FLIPS=1250.
"""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import AlayaError, StoreFormat
from alaya_tiers.repair import Examined, examine, repair, salvage
from alaya_tiers.seams import SystemDisk
from tests.test_cli import call
from tests.test_crash import MODEL, SETTINGS, TEXTS, Base, check_kv

CASES = int(os.environ.get("ALAYA_TIERS_MUTATIONS", "1"))
FLIPS = int(os.environ.get("ALAYA_TIERS_FLIPS", str(CASES)))
DISK = SystemDisk()


class Sparse(Base):
    """The same with codes beside the records."""

    def __init__(self, path: str) -> None:
        settings = replace(SETTINGS, mode="sparse", sink_tokens=1, recent_tokens=1, device_budget=64 * 4096)
        self.engine = Engine(settings, path, MODEL)
        try:
            self.contexts = Contexts(self.engine)
        except BaseException:
            self.engine.close()
            raise


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three contexts that share, a stranger, and codes. Beside it: the same before the last came, and another store."""
    path = tmp_path_factory.mktemp("written")
    for name, texts in (("other", [[5] * 30, [*range(40, 60)]]), ("older", TEXTS[:3]), ("store", TEXTS[3:])):
        if name == "store":
            shutil.copytree(path / "older", path / "store")
        base = Sparse(str(path / name))
        for text in texts:
            base.store(text)
        base.close()
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "store", tmp_path / "store"))


def found(store: Path) -> Examined:
    return examine(DISK, str(store), lambda done, of: None)


def readable(store: Path) -> tuple[set[str], set[str]]:
    """Contexts that read as they were stored, and those that are refused; AssertionError where one reads as another."""
    whole, refused = set[str](), set[str]()
    base = Base(SystemDisk(), str(store))
    try:
        for name in base.contexts.manifest.contexts:
            try:
                check_kv(base, name)
                whole.add(name)
            except AlayaError:
                refused.add(name)
    finally:
        base.close()
    return whole, refused


def files(store: Path, kind: str) -> list[Path]:
    patterns = {
        "shard": "**/c/0/0/0", "array": "**/layer_*/zarr.json", "record": "segments/*/zarr.json", "codes": "**/index",
        "manifest": "generations/*/zarr.json", "root": "zarr.json", "group": "segments/zarr.json",
        "session": "session-*/zarr.json",
    }  # fmt: skip
    return sorted(p for p in store.glob(patterns[kind]) if p.is_file() and not (kind == "record" and p.parent == store))


KINDS = ["shard", "array", "record", "codes", "manifest", "root", "group", "session"]


def change(rng: random.Random, how: str, file: Path, written: Path, kind: str) -> None:
    """Damage one file."""
    raw = file.read_bytes()
    data, at = bytearray(raw), rng.randrange(len(raw))
    match how:
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "noise":
            data[at : at + 64] = rng.randbytes(64)[: len(raw) - at]
        case "zeros":
            sector = at // 512 * 512
            data[sector : sector + 512] = bytes(len(data[sector : sector + 512]))
        case "cut":
            del data[at:]
        case "longer":
            data += rng.randbytes(rng.choice([1, 100, 5000]))
        case "swap":
            size = 4096 if kind == "shard" else max(1, len(data) // 4)
            one, two = sorted(rng.sample(range(max(2, len(data) // size)), 2))
            a, b = data[one * size : (one + 1) * size], data[two * size : (two + 1) * size]
            data[one * size : one * size + len(b)], data[two * size : two * size + len(a)] = b, a
        case "replay":
            older = files(written / "older", kind)
            data[:] = rng.choice(older).read_bytes()
        case "foreign":
            data[:] = rng.choice(files(written / "other", kind)).read_bytes()
        case "other":
            data[:] = rng.choice(files(written / "store", kind)).read_bytes()
        case "gone":
            file.unlink()
            return
    file.write_bytes(data)


DAMAGES = ["flip", "noise", "zeros", "cut", "longer", "swap", "replay", "foreign", "other", "gone"]


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("kind", KINDS)
def test_all_damage_is_found_or_harmless(written: Path, tmp_path: Path, kind: str) -> None:
    """Found by verify; never read as something else; and repair leaves a store without damage, and what was whole."""
    rng = random.Random(kind)
    count = {"found": 0, "harmless": 0}
    for how in DAMAGES:
        for n in range(FLIPS if how == "flip" else CASES):
            store = Path(shutil.copytree(written / "store", tmp_path / "store"))
            file = rng.choice(files(store, kind))
            before = file.read_bytes()
            change(rng, how, file, written, kind)
            same = file.exists() and file.read_bytes() == before
            name = f"{how} of {file.relative_to(store)}, case {n}"
            try:
                seen = found(store)
            except StoreFormat:
                assert kind == "root", name
                shutil.rmtree(store)
                count["found"] += 1
                continue
            count["found" if seen.damage else "harmless"] += 1
            assert not (same and seen.damage), name
            copy = Path(shutil.copytree(store, tmp_path / "copy"))
            try:
                whole, refused = readable(copy)
                assert seen.damage or not refused, name
                cut = {c for d in seen.damage if d.kind == "shard" for c in d.contexts}  # perhaps in a block's padding
                assert whole >= (seen.left.contexts.keys() & seen.manifest.contexts.keys()) - cut, name
            except AlayaError:
                assert seen.damage, name
            repair(DISK, str(store), seen)
            left = found(store)
            assert not left.damage, name
            assert left.manifest.contexts.keys() == seen.left.contexts.keys(), name
            assert readable(store) == (set(seen.left.contexts), set()), name
            shutil.rmtree(store)
            shutil.rmtree(copy)
    assert count["found"] > (2 if CASES < 10 else 5) * CASES, count


# ---------------------------------------------------------------------- what is lost and what is not


def damaged(store: Path, pattern: str, at: int = 0) -> Path:
    file = sorted(store.glob(pattern))[0]
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    return file


def test_salvage_keeps_whole_contexts_and_the_whole_segments_before_damage(store: Path, tmp_path: Path) -> None:
    seen = found(store)
    assert not seen.damage
    manifest = seen.manifest
    victim = next(name for name, entry in manifest.segments.items() if entry.start and entry.start + entry.tokens == 29)
    (store / manifest.segments[victim].files[0] / "c/0/0/0").unlink()
    seen = found(store)
    assert seen.lost
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    saved = salvage(DISK, str(store), seen, str(tmp_path / "saved"), lambda done, of: None)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before, "the old store was changed"
    assert saved.contexts.keys() == seen.left.contexts.keys()
    assert not found(tmp_path / "saved").damage
    assert readable(tmp_path / "saved") == (set(saved.contexts), set())
    assert manifest.segments[victim].before in saved.contexts, "the first 16 tokens are whole"
    assert len(list((tmp_path / "saved").glob("segments/*/index"))) == len(saved.segments)


def test_a_lost_manifest_is_made_again_from_records(store: Path) -> None:
    """What was stored after the generation before, which only the damaged manifest named, is there again."""
    every = found(store).manifest
    newest = max(store.glob("generations/*/zarr.json"), key=lambda p: int(p.parent.name))
    newest.write_bytes(newest.read_bytes()[:-40])
    seen = found(store)
    assert {d.kind for d in seen.damage} == {"manifest"}
    assert not seen.counts
    repair(DISK, str(store), seen)
    again = found(store)
    assert not again.damage
    assert again.manifest.contexts.keys() == every.contexts.keys()
    assert again.manifest.files == every.files
    assert readable(store) == (set(every.contexts), set())


def test_a_repaired_store_serves_and_stores_as_before(store: Path) -> None:
    damaged(store, "session-*/s*/layer_000/c/0/0/0")
    damaged(store, "segments/*/index", 5000)
    damaged(store, "zarr.json", 40)
    repair(DISK, str(store), found(store))
    base = Base(SystemDisk(), str(store))
    names = [base.store(text) for text in TEXTS]
    assert set(names) <= base.contexts.manifest.contexts.keys()
    for name in names:
        check_kv(base, name)
    assert not base.contexts.verify()
    base.close()


# ---------------------------------------------------------------------- the command


def test_verify_on_the_command_line_repairs_and_salvages(store: Path, tmp_path: Path) -> None:
    assert call("verify", str(store)).exit_code == 0
    damaged(store, "segments/*/zarr.json", 200)
    result = call("verify", str(store))
    assert result.exit_code == 1
    assert "tokens are whole" in result.stdout
    refused = call("verify", str(store), "--repair")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    saved = json.loads(call("verify", str(store), "--salvage", str(tmp_path / "saved"), "--json").stdout)
    assert saved["salvaged"]
    assert call("verify", str(store), "--salvage", str(tmp_path / "saved")).exit_code == 2
    assert call("verify", str(store), "--salvage", str(tmp_path / "b"), "--repair").exit_code == 2
    report = json.loads(call("verify", str(store), "--repair", "--yes", "--json").stdout)
    assert report["left"] == []
    assert report["lost"]
    assert call("verify", str(store)).exit_code == call("verify", str(tmp_path / "saved")).exit_code == 0
    damaged(store, "segments/*/index", 10)
    assert "mends the rest" in call("verify", str(store)).stdout
    assert "whole now" in call("verify", str(store), "--repair").stdout


def test_gc_removes_leftovers_and_nothing_else(store: Path) -> None:
    (store / "session-00000000" / "s0000-00000").mkdir(parents=True)
    (store / "session-00000000" / "s0000-00000" / "x").write_bytes(bytes(10_000))
    (store / "segments" / ("0" * 64)).mkdir()
    before = {p for p in store.rglob("*") if p.is_file()}
    would = json.loads(call("gc", str(store), "--dry-run", "--json").stdout)
    assert sorted(would["paths"]) == [f"segments/{'0' * 64}", "session-00000000"]
    assert would["bytes"] >= 10_000
    assert {p for p in store.rglob("*") if p.is_file()} == before
    assert "2 leftovers removed" in call("gc", str(store)).stdout
    assert "Nothing" in call("gc", str(store)).stdout
    assert call("verify", str(store)).exit_code == 0
    base = Base(SystemDisk(), str(store))
    assert call("gc", str(store)).exit_code == 2, "another process has it"
    base.close()
