"""Stores of every format that was released open, and hold what they held."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from alaya_tiers.commit import load_manifest
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import StoreFormat, StoreMismatch
from alaya_tiers.repair import examine
from alaya_tiers.seams import SystemDisk
from alaya_tiers.store import Store
from alaya_tiers.tiers.zarr_format import FORMAT
from tests.golden import DIM, DTYPES, FOLDER, LAYERS, MODEL, SETTINGS, TEXTS, bits, kv, make, who

STORES = sorted(FOLDER.glob("format-*"))


def check(path: Path, dtype: str) -> None:
    """Everything of one dtype is found by its tokens and is what it was; and one can go on from it."""
    engine = Engine(SETTINGS.replace(mode="exact"), str(path), MODEL)
    try:
        contexts = Contexts(engine)
        for text in TEXTS[dtype]:
            names, length = contexts.match(who(dtype).root(), text)
            assert length == text.size
            assert contexts.tokens(names[-1]).tolist() == text.tolist()
            session = contexts.open([names], length, None, torch.device("cpu"))
            for layer in range(LAYERS):
                k, v = session.read(layer, 0, length)
                want = kv(text, layer, dtype)
                assert bits(k).equal(bits(want[0]))
                assert bits(v).equal(bits(want[1]))
            session.clear()
        longer = np.concatenate([TEXTS[dtype][0]] * 2)
        contexts.load(longer, [[kv(longer, layer, dtype) for layer in range(LAYERS)]], who(dtype))
        assert contexts.match(who(dtype).root(), longer)[1] == longer.size
        assert not contexts.verify()
    finally:
        engine.close()


def test_there_is_one_of_the_present_format() -> None:
    assert f"format-{FORMAT}" in [path.name for path in STORES], "run: python -m tests.golden"


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_golden_store_opens_and_holds_what_it_held(path: Path, dtype: str, tmp_path: Path) -> None:
    check(Path(shutil.copytree(path, tmp_path / "store")), dtype)


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_a_golden_store_is_whole_and_has_codes(path: Path) -> None:
    found = examine(SystemDisk(), str(path), lambda done, of: None)
    assert not found.damage
    assert len(found.manifest.contexts) == sum(map(len, TEXTS.values()))
    assert list(path.glob("segments/*/index"))


def test_what_is_made_today_is_what_is_read(tmp_path: Path) -> None:
    make(tmp_path / "store")
    check(tmp_path / "store", "bfloat16")


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.name)
def test_any_zarr_reader_finds_keys_and_values_of_a_golden_store(path: Path) -> None:
    manifest = load_manifest(SystemDisk(), str(path))
    for dtype in DTYPES:
        root = who(dtype).root()
        for text in TEXTS[dtype]:
            ends = [c.id for c in manifest.contexts.values() if manifest.root(c.id) == root and c.tokens == text.size]
            names = next(c for c in map(manifest.chain, ends) if _tokens(path, c) == text.tolist())
            for layer in range(LAYERS):
                parts = [_rows(path, name, layer) for name in names]
                rows = torch.from_numpy(np.concatenate(parts, 1))
                for n, want in enumerate(kv(text, layer, dtype)):
                    assert rows[..., n * DIM : (n + 1) * DIM].equal(want[0].contiguous().view(DTYPES[dtype]))


def _record(path: Path, name: str) -> Any:
    return zarr.open_group(str(path / "segments" / name), mode="r").attrs["alaya_tiers"]


def _tokens(path: Path, names: list[str]) -> list[int]:
    return [t for n in names for t in np.frombuffer(base64.b64decode(_record(path, n)["tokens"]), "<i8").tolist()]


def _rows(path: Path, name: str, layer: int) -> np.ndarray[Any, Any]:
    """Of one layer of a segment, as docs/format.md says: each run from the file that has it."""
    record = _record(path, name)
    blocks, length = record["layers"][str(layer)], len(_tokens(path, [name]))
    size, parts = blocks["block_tokens"], []
    for run, place in enumerate(blocks["where"]):
        array: Any = zarr.open_array(str(path / blocks["files"][place]), mode="r")
        rows = np.asarray(array[:, run * size : min(length, (run + 1) * size)])
        parts.append(rows.view(f"i{rows.itemsize}"))
    return np.concatenate(parts, 1)


def test_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = Path(shutil.copytree(FOLDER / f"format-{FORMAT}", tmp_path / "store"))
    root = store / "zarr.json"
    for version in (FORMAT + 1, 99):
        data = json.loads((FOLDER / f"format-{FORMAT}" / "zarr.json").read_text())
        data["attributes"]["alaya_tiers"]["format"] = version
        root.write_text(json.dumps(data))
        before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
        with pytest.raises(StoreFormat, match="upgrade"):
            Store(store, None, SystemDisk())
        with pytest.raises(StoreFormat, match="upgrade"):
            examine(SystemDisk(), str(store), lambda done, of: None)
        assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    store = Path(shutil.copytree(FOLDER / f"format-{FORMAT}", tmp_path / "store"))
    with pytest.raises(StoreMismatch, match="hidden_size is 16 there and 17 here"):
        Store(store, MODEL | {"hidden_size": 17}, SystemDisk())
