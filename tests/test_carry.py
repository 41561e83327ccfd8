"""`alaya-tiers show`, `export` and `import`."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alaya_tiers.commit import load_manifest
from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.repair import examine
from alaya_tiers.seams import SystemDisk
from alaya_tiers.tiers.zarr_format import FORMAT
from alaya_tiers.tools import carry
from alaya_tiers.tools.cli import CANCELLED
from tests.golden import DTYPES, FOLDER, LAYERS, MODEL, SETTINGS, TEXTS, bits, kv, who
from tests.test_cli import call

GOLDEN = FOLDER / f"format-{FORMAT}"


def test_an_import_that_was_cut_off_goes_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had kept is not written again."""
    text, file, other = TEXTS["float32"][0], tmp_path / "context.st", tmp_path / "other"
    assert call("export", str(store), name_of(store, "float32", text.size), str(file)).exit_code == 0
    chunks = carry.chunks

    def torn(*arguments: Any) -> Iterator[Any]:
        for n, chunk in enumerate(chunks(*arguments)):
            if n == 1:
                raise KeyboardInterrupt
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(carry, "chunks", torn)
        stopped = call("import", str(other), str(file), "--keep-every", "16")
        assert stopped.exit_code == CANCELLED
    kept = load_manifest(SystemDisk(), str(other))
    assert [c.tokens for c in kept.contexts.values()] == [16]
    assert call("import", str(other), str(file), "--keep-every", "16").exit_code == 0
    whole = load_manifest(SystemDisk(), str(other))
    assert text.size in [c.tokens for c in whole.contexts.values()]
    assert whole.files.items() >= kept.files.items(), "it was written again"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "store"))


def name_of(store: Path, dtype: str, tokens: int) -> str:
    manifest = load_manifest(SystemDisk(), str(store))
    root = who(dtype).root()
    return next(c.id for c in manifest.contexts.values() if (manifest.root(c.id), c.tokens) == (root, tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_goes_through_a_file_bit_for_bit(store: Path, tmp_path: Path, dtype: str) -> None:
    text = TEXTS[dtype][0]
    file, other = tmp_path / "context.st", tmp_path / "other"
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    assert call("export", str(store), name_of(store, dtype, text.size)[:20], str(file)).exit_code == 0
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert load_file(file)["000000.tokens"].tolist() == text[:16].tolist(), "any reader of safetensors opens it"
    result = call("import", str(other), str(file))
    assert result.exit_code == 0, result.stderr
    assert f"{text.size} tokens stored" in result.stdout
    again = call("import", str(other), str(file))
    assert again.exit_code == 0
    assert not list(tmp_path.glob("*.partial"))
    engine = Engine(SETTINGS.replace(mode="exact"), str(other), MODEL)
    contexts = Contexts(engine)
    names, length = contexts.match(who(dtype).root(), text)
    assert length == text.size
    session = contexts.open([names], length, None, torch.device("cpu"))
    for layer in range(LAYERS):
        for got, want in zip(session.read(layer, 0, length), kv(text, layer, dtype), strict=True):
            assert bits(got).equal(bits(want))
    engine.close()
    assert not examine(SystemDisk(), str(other), lambda done, of: None).damage


def test_under_a_tenant_it_is_the_tenants(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXTS["float32"][0]
    assert call("export", str(store), name_of(store, "float32", text.size), str(tmp_path / "f")).exit_code == 0
    monkeypatch.setenv("ALAYA_TIERS_TENANT", "secret")
    assert call("import", str(tmp_path / "other"), str(tmp_path / "f")).exit_code == 0
    manifest = load_manifest(SystemDisk(), str(tmp_path / "other"))
    assert list(manifest.identities) == [who("float32").root("secret")]


def test_a_damaged_file_stores_nothing(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "context.st"
    assert call("export", str(store), name_of(store, "float32", 21), str(file)).exit_code == 0
    raw, rng = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(9), *rng.sample(range(9, header), 25), *rng.sample(range(header, len(raw)), 10)]
    for at in places:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << rng.randrange(7)
        file.write_bytes(damaged)
        target = tmp_path / f"store-{at}"
        result = call("import", str(target), str(file))
        manifest = load_manifest(SystemDisk(), str(target))
        assert result.exit_code == 2, at
        assert "error:" in result.stderr
        assert not manifest.contexts
    file.write_bytes(raw[:-1])
    assert call("import", str(tmp_path / "cut"), str(file)).exit_code == 2


def test_other_files_and_other_models_are_refused(store: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "plain.safetensors")
    result = call("import", str(tmp_path / "a"), str(tmp_path / "plain.safetensors"))
    assert (result.exit_code, "not written by alaya-tiers" in result.stderr) == (2, True)
    assert call("export", str(store), name_of(store, "float32", 21), str(tmp_path / "f")).exit_code == 0
    engine = Engine(SETTINGS.replace(mode="exact"), str(tmp_path / "b"), MODEL | {"hidden_size": 1})
    text = np.arange(9)
    Contexts(engine).load(text, [[kv(text, 0, "float32")]], who("float32"))
    engine.close()
    result = call("import", str(tmp_path / "b"), str(tmp_path / "f"))
    assert result.exit_code == 2
    assert "another model" in result.stderr
    assert call("export", str(store), "0000", str(tmp_path / "g")).exit_code == 2
    assert call("export", str(store), "", str(tmp_path / "g")).exit_code == 2
    assert not (tmp_path / "g").exists()


def test_export_of_damaged_blocks_leaves_no_file(store: Path, tmp_path: Path) -> None:
    for shard in store.rglob("c/0/0/0"):
        shard.write_bytes(bytes(shard.stat().st_size))
    result = call("export", str(store), name_of(store, "float32", 21), str(tmp_path / "f"))
    assert result.exit_code == 2
    assert "damaged" in result.stderr
    assert not list(tmp_path.glob("f*"))


def test_show_tells_what_is_where(store: Path) -> None:
    whole = call("show", str(store), columns=100)
    assert whole.exit_code == 0
    assert "█▌" in whole.stdout
    report = json.loads(call("show", str(store), "--json").stdout)
    assert len(report["contexts"]) == 5
    assert report["model"] == MODEL
    name = name_of(store, "float32", 21)
    (one,) = json.loads(call("show", str(store), name[:10], "--json").stdout)["contexts"]
    assert (one["id"], one["tokens"], one["tail_tokens"], one["shared_tokens"]) == (name, 21, 5, 16)
    assert [s["shared"] for s in one["segments"]] == [2, 1]
    assert one["segments"][0]["key_bytes"] == one["segments"][0]["value_bytes"] == LAYERS * 2 * 16 * 8 * 4
    assert one["bytes"] == (16 + 8) // 8 * 2 * LAYERS * 4096
    plain = next(c for c in report["contexts"] if c["index_bytes"])
    assert plain["tokens"] == 13
    assert "shared by 2" in call("show", str(store), name, columns=120).stdout
    (store / "segments" / name / "zarr.json").unlink()
    assert "unreadable" in call("show", str(store), name, columns=120).stdout
    assert call("show", str(store), "zzz").exit_code == 2
