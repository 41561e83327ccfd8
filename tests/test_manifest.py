"""Manifests, records and names: equal things have equal names, and nothing that is read is believed."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alaya_tiers.commit import load_manifest
from alaya_tiers.errors import StoreCorrupt, StoreError
from alaya_tiers.identity import Identity, common, model_digest, segment_name
from alaya_tiers.manifest import Manifest, _digest
from alaya_tiers.seams import SystemDisk
from tests.test_crash import TEXTS, WHO, Base, check_kv

# ---------------------------------------------------------------------- names

IDENTITIES = st.builds(
    Identity,
    model=st.text(max_size=3),
    weights=st.text(max_size=3),
    dtype=st.sampled_from(["float32", "float16"]),
    block_tokens=st.sampled_from([1, 2, 12]),
    segment_tokens=st.sampled_from([2, 21, 1]),
    lossy=st.booleans(),
)
TENANTS = st.text(max_size=3)
TOKENS = st.lists(st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1)), max_size=5)


@given(IDENTITIES, TENANTS, IDENTITIES, TENANTS)
def test_roots_are_equal_when_everything_is(a: Identity, one: str, b: Identity, other: str) -> None:
    assert (a.root(one) == b.root(other)) == ((a, one) == (b, other))


@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_segments_have_equal_names_when_they_and_all_before_are_equal(
    a: list[int], b: list[int], c: list[int], d: list[int]
) -> None:
    """However the tokens are cut: (1)(2 3) and (1 2)(3) are different chains."""
    root = WHO.root()

    def name(*parts: list[int]) -> str:
        found = root
        for part in parts:
            found = segment_name(found, np.array(part, np.int64))
        return found

    assert (name(a, b) == name(c, d)) == ((a, b) == (c, d))
    assert name(a) != name(a, b)


@given(TOKENS, TOKENS)
def test_what_is_in_common_is_what_a_loop_finds(a: list[int], b: list[int]) -> None:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    assert common(np.array(a, np.int64), np.array(b, np.int64)) == n


def test_the_names_of_this_version_stay() -> None:
    """Another value means that no store of before is found again: raise NAMING and say so."""
    who = replace(WHO, model="m")
    assert who.root() == "9e5d7c119341b5e35b8cc9139bd3b2b96594bfca471e1ccd01ab5b00b296ac38"
    assert who.root("secret") == "5eec17477a3feda507086285e51eefb9a21182e8596379bc79c458b64f195ce5"
    assert segment_name(who.root(), np.arange(3)) == "01cdba7410e492a156063e48b671b1d1feab03a80075908f006b587082cf0407"
    assert model_digest({"b": 1, "a": [None]}) == model_digest({"a": [None], "b": 1})


# ---------------------------------------------------------------------- what is read


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some contexts."""
    path = tmp_path_factory.mktemp("written") / "store"
    base = Base(SystemDisk(), str(path))
    for text in TEXTS[:3]:
        base.store(text)
    base.close()
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "store"))


def newest(store: Path) -> Path:
    return max(store.glob("generations/*/zarr.json"), key=lambda p: int(p.parent.name))


def use(store: Path) -> None:
    """Everything one can do with what is listed."""
    base = Base(SystemDisk(), str(store))
    try:
        for name in base.contexts.manifest.contexts:
            check_kv(base, name)
        if damage := base.contexts.verify():
            raise StoreCorrupt(5, damage[0].problem, damage[0].path)
    finally:
        base.close()


def test_it_reads_what_it_wrote(store: Path) -> None:
    use(store)
    manifest = load_manifest(SystemDisk(), str(store))
    assert manifest.generation == 3
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit what is ours in a zarr.json; a manifest's digest is made to fit."""
    data = json.loads(path.read_text())
    ours = data["attributes"]["alaya_tiers"]
    edit(ours)
    if "manifest" in ours:
        ours["digest"] = _digest(ours["manifest"])
    path.write_text(json.dumps(data))


def of_file(name: str) -> Callable[[Any], Any]:
    def edit(data: Any) -> None:
        data["manifest"]["files"][0][0] = name

    return edit


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "above the store": of_file("session-00000000/s0000-00000/../../../etc/layer_000"),
    "absolute": of_file("/etc/passwd"),
    "dots": of_file("../s0000-00000/layer_000"),
    "new line": of_file("session-00000000/s0000-00000/layer_000\n"),
    "no file": lambda d: d["manifest"]["files"].clear(),
    "huge file": lambda d: d["manifest"]["files"][0].__setitem__(1, 1 << 62),
    "negative file": lambda d: d["manifest"]["files"][0].__setitem__(1, -4096),
    "small file": lambda d: d["manifest"]["files"][0].__setitem__(1, 1),
    "float file": lambda d: d["manifest"]["files"][0].__setitem__(1, 4096.0),
    "huge generation": lambda d: d["manifest"].__setitem__("generation", 1 << 80),
    "other generation": lambda d: d["manifest"].__setitem__("generation", 2),
    "true for a number": lambda d: d["manifest"].__setitem__("generation", True),
    "no identities": lambda d: d["manifest"]["identities"].clear(),
    "no segments": lambda d: d["manifest"]["segments"].clear(),
    "segments a list": lambda d: d["manifest"].__setitem__("segments", []),
    "contexts missing": lambda d: d["manifest"].pop("contexts"),
    "a context's length": lambda d: next(iter(d["manifest"]["contexts"].values())).__setitem__("tokens", 3),
    "a segment's start": lambda d: list(d["manifest"]["segments"].values())[-1].__setitem__("start", 3),
    "a segment's digest": lambda d: next(iter(d["manifest"]["segments"].values())).__setitem__("digest", "0" * 64),
    "a name that is a path": lambda d: d["manifest"]["segments"].__setitem__(
        "../" * 21 + "x", next(iter(d["manifest"]["segments"].values()))
    ),
    "a circle": lambda d: d["manifest"]["segments"].update(
        {n: e | {"before": n} for n, e in d["manifest"]["segments"].items()}
    ),
    "no digest": lambda d: d.pop("manifest"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_made_to_deceive_is_corrupt(store: Path, name: str) -> None:
    path = newest(store)
    change(path, HOSTILE[name])
    with pytest.raises(StoreCorrupt):
        use(store)


@given(st.data())
def test_no_json_gets_through_as_anything_but_a_sound_manifest(data: st.DataObject) -> None:
    """Parts of a real manifest replaced by anything: a ValueError, or a manifest that says the same when written."""
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    manifest = copy.deepcopy(SOUND)
    here: Any = manifest["manifest"]
    while isinstance(here, dict | list) and here:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if data.draw(st.booleans()):
            here[key] = data.draw(junk)
            break
        here = here[key]
    manifest["digest"] = _digest(manifest["manifest"])
    try:
        found = Manifest.from_json(manifest)
    except ValueError:
        return
    assert Manifest.from_json(found.to_json()) == found
    for name in found.contexts:
        assert found.chain(name)


SOUND: dict[str, Any] = Manifest(
    3, {WHO.root(): WHO}, {}, {}, {"session-0123abcd/s0000-00000/layer_000": 4096}
).to_json()


@pytest.mark.parametrize("kind", ["generations", "segments"])
def test_every_flipped_bit_of_a_manifest_or_record_is_noticed(store: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    paths = [newest(store)] if kind == "generations" else sorted(store.glob("segments/*/zarr.json"))
    for _ in range(60):
        path = paths[rng.integers(len(paths))]
        raw = path.read_bytes()
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            use(store)
        except StoreCorrupt:
            pass
        else:  # white space, or a name of ours that another reader needs
            before, after = json.loads(raw), json.loads(damaged)
            assert before["attributes"] == after["attributes"]
        finally:
            path.write_bytes(raw)
    use(store)


def test_manifests_of_another_size_or_kind_are_not_read(store: Path) -> None:
    path = newest(store)
    raw = path.read_bytes()
    for content in (b"", b"[" * 100_000, b"{}", raw[:-20], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(StoreCorrupt):
            use(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError):
        use(store)
    path.unlink()
    (store / "elsewhere").write_bytes(raw)
    path.symlink_to(store / "elsewhere")
    with pytest.raises(StoreError):
        use(store)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreCorrupt):
        use(store)


def test_records_swapped_for_others_are_noticed(store: Path) -> None:
    one, two = sorted(store.glob("segments/*/zarr.json"))[:2]
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    with pytest.raises(StoreCorrupt):
        use(store)


@pytest.mark.parametrize("level", range(6))
def test_links_out_of_the_store_are_not_followed(store: Path, tmp_path: Path, level: int) -> None:
    """Blocks are read through no link, whichever part of the path is one."""
    file = next(store.rglob("c/0/0/0"))
    place = [file, *file.parents][level]
    moved = tmp_path / "outside"
    place.rename(moved)
    place.symlink_to(moved)
    with pytest.raises(StoreCorrupt):
        use(store)


def test_a_record_that_fits_its_digest_but_lies_is_corrupt(store: Path) -> None:
    """Somebody who can write the manifest cannot make us read out of bounds or take much memory."""
    path = next(iter(sorted(store.glob("segments/*/zarr.json"))))
    raw, manifest = path.read_bytes(), newest(store).read_bytes()
    lies: list[tuple[str, Any]] = [
        ("kv_heads", 1 << 40), ("kv_heads", 0), ("k_dim", 1 << 50), ("block_tokens", 0), ("block_tokens", 1 << 39),
        ("dtype", "no_grad"), ("dtype", "__dict__"), ("digests", "AAAA"), ("where", [99]), ("where", []),
        ("files", ["../x"]), ("files", []), ("digests", "A" * (1 << 22)),
    ]  # fmt: skip
    for field, value in lies:

        def lie(data: Any, field: str = field, value: Any = value) -> None:
            next(iter(data["layers"].values()))[field] = value

        def agree(data: Any) -> None:
            data["manifest"]["segments"][path.parent.name]["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()

        change(path, lie)
        change(newest(store), agree)
        with pytest.raises(StoreError):
            use(store)
        base = Base(SystemDisk(), str(store))
        assert base.contexts.verify(), f"{field}={value}"
        base.close()
        path.write_bytes(raw)
        newest(store).write_bytes(manifest)
