"""`alaya-tiers ls` and `verify`."""

import json
from pathlib import Path

import pytest

from alaya_tiers.seams import SystemDisk
from tests.test_cli import call
from tests.test_crash import TEXTS, Base


@pytest.fixture
def store(tmp_path: Path) -> Path:
    base = Base(SystemDisk(), str(tmp_path / "store"))
    for text in TEXTS[:3]:
        base.store(text)
    base.close()
    return tmp_path / "store"


def test_ls_lists_contexts_for_people_and_programs(store: Path) -> None:
    result = call("ls", str(store), columns=80)
    assert result.exit_code == 0
    assert "3 contexts" in result.stdout
    assert "…" not in result.stdout
    data = json.loads(call("ls", str(store), "--json").stdout)
    assert [c["tokens"] for c in data["contexts"]] == [len(text) for text in TEXTS[:3]]
    assert data["contexts"][0]["shared_bytes"] == data["contexts"][1]["shared_bytes"] > 0
    assert data["contexts"][2]["shared_bytes"] == 0
    assert data["bytes"] == sum(c["bytes"] for c in data["contexts"]) - data["contexts"][0]["shared_bytes"]


def test_verify_names_what_is_damaged_and_whose_it_is(store: Path) -> None:
    whole = call("verify", str(store))
    assert (whole.exit_code, "3 contexts, all whole" in whole.stdout) == (0, True)
    data = json.loads(call("ls", str(store), "--json").stdout)
    victim = sorted(store.rglob("c/0/0/0"))[-1]
    raw = victim.read_bytes()
    victim.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    result = call("verify", str(store))
    assert result.exit_code == 1
    assert str(victim) in result.stdout.replace("\n", "")
    report = json.loads(call("verify", str(store), "--json").stdout)
    assert report["damaged"]
    assert {d["path"] for d in report["damage"]} == {str(victim)}
    assert set(report["damaged"]) < {c["id"] for c in data["contexts"]}
    victim.write_bytes(raw[:-30] + bytes(30))
    report = json.loads(call("verify", str(store), "--json").stdout)
    assert "index" in report["damage"][0]["problem"]
    victim.write_bytes(raw)
    (victim.parents[3] / "zarr.json").unlink()
    report = json.loads(call("verify", str(store), "--json").stdout)
    assert "metadata" in report["damage"][0]["problem"]


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for command in ("ls", "verify"):
        assert call(command, str(tmp_path)).exit_code == 2
        assert call(command, str(tmp_path / "missing")).exit_code == 2
