"""What a machine can do: measured, written, read again, refused."""

import json
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from alaya_tiers import Settings
from alaya_tiers.errors import ConfigError, OtherMachine
from alaya_tiers.tools import profile, toml
from alaya_tiers.tools.profile import Profile, Transfer
from tests.test_cli import call
from tests.test_traces import chat

SSD = (Transfer(16 << 10, 1, 3e8, 2e8, 5e-5), Transfer(1 << 20, 4, 2e9, 1e9, 1e-3))
KNOWN = Profile(
    identity=profile.identity(), versions={"python": "3"}, date="today", memory_read=3e10, memory_copy=1.5e10,
    attend={"float32/64": 2.5e10, "float32/128": 3e10, "bfloat16/128": 2e10}, scan=1e10, pick=5e-8, encode=1e8,
    weights=1.5e10, flops=1e11, step=1e-3, layer=5e-4, look=4e-4, load=3e-4, digest=8e9, ssd=SSD,
)  # fmt: skip


def written(path: Path, **changes: Any) -> Path:
    replace(KNOWN, **changes).save(path)
    return path


@pytest.mark.slow
def test_this_machine_is_measured_and_the_file_says_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    result = call("profile", "--quick", "-o", str(path), "--json")
    assert result.exit_code == 0, result.output
    shown, found = json.loads(result.stdout), profile.load(path)
    assert found.identity == profile.identity() == shown["identity"]
    assert shown["memory_read"] == pytest.approx(found.memory_read, rel=1e-3)
    assert 1e8 < found.memory_read < 1e13
    assert {one.size for one in found.ssd} == {16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20}
    assert all(one.read > 1e5 and one.write > 1e5 and 0 < one.latency < 10 for one in found.ssd)
    assert list(tmp_path.iterdir()) == [path], "what was measured with was left behind"
    Settings.from_dict(dict(found.settings()))


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    assert profile.load(written(tmp_path / "p.toml")) == KNOWN


def test_rates_are_of_the_nearest_that_was_measured() -> None:
    assert KNOWN.attend_rate("float32", 80) == 2.5e10
    assert KNOWN.attend_rate("float32", 256) == 3e10
    assert KNOWN.attend_rate("bfloat16", 64) == 2e10
    assert KNOWN.transfer(20_000, 4) is SSD[0]
    assert KNOWN.transfer(4 << 20, 1) is SSD[1]
    few, many = (replace(SSD[0], depth=4, size=size, read=rate) for size, rate in ((1 << 16, 1e9), (1 << 20, 3e9)))
    between = replace(KNOWN, ssd=(many, few, replace(few, depth=1, read=5e8), replace(many, depth=1, read=5e8)))
    rates = between.rates_of([1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 30], deep=True)
    assert rates.tolist() == pytest.approx([1e9, 1e9, 2e9, 3e9, 3e9])
    assert between.rates_of([1 << 18], deep=False).tolist() == [5e8]
    assert KNOWN.machine(layers=3) == {
        "ssd_read": 2e9, "ssd_write": 1e9, "pcie": 1.5e10, "flops": 1e11, "device_read": KNOWN.weights,
        "step": KNOWN.step + 3 * KNOWN.layer,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: "", "not a whole one \\('profile'"),
        (lambda t: "[[", "cannot read a profile"),
        (lambda t: t[: t.index("[rates]")], "not a whole one \\('attend'"),
        (lambda t: t.replace("version = 1", "version = 9"), "version 9"),
        (lambda t: t.replace("pick = 5e-08", 'pick = "fast"'), "pick of a profile"),
        (lambda t: t.replace("scan = 10000000000.0", "scan = nan"), "scan of a profile"),
        (lambda t: t.replace("latency", "lateness"), "lateness"),
        (lambda t: t.replace("float32_64 = 25000000000.0", "float32_64 = -1"), "above 0"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    path = written(tmp_path / "p.toml")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ConfigError, match=message):
        profile.load(path)


def test_a_profile_of_another_machine_counts_only_when_told(tmp_path: Path) -> None:
    path = written(tmp_path / "p.toml", identity=profile.identity() | {"cores": 4096})
    with pytest.raises(OtherMachine, match="cores is 4096 there"):
        profile.load(path)
    assert profile.load(path, any_machine=True).identity["cores"] == 4096
    trace = tmp_path / "t.jsonl"
    trace.write_text(chat(0, 600, [0, 1]) + "\n")
    words = ("simulate", str(trace), "--policy", "lru", "--json", "--profile", str(path))
    refused = call(*words)
    assert (refused.exit_code, "another machine" in " ".join(refused.stderr.split())) == (2, True)
    report = json.loads(call(*words, "--any-machine", "--ssd-read", "5GB/s").stdout)
    assert report["runs"][0]["machine"]["flops"] == KNOWN.flops
    assert report["runs"][0]["machine"]["ssd_read"] == 5e9, "an option counts more than the file"


def test_toml_is_read_as_it_was_written() -> None:
    tables: dict[str, Any] = {
        "a": {"s": 'quote " and \\ and ü', "n": 1, "f": 1e-7, "t": True, "l": [1, 2]},
        "b": [{"x": 1}, {"x": 2}],
    }
    assert tomllib.loads(toml.text(tables, "two\nlines")) == tables
    assert tomllib.loads(toml.text({"a": {"gone": None, "here": 1}})) == {"a": {"here": 1}}
    assert asdict(KNOWN)["ssd"][0]["size"] == 16 << 10


def test_machines_nobody_here_has_can_be_planned_with(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(chat(0, 600, [0, 1]) + "\n")
    words = ("simulate", str(trace), "--policy", "lru", "--json", "--machine")
    machine = json.loads(call(*words, "h100-80+object-store").stdout)["runs"][0]["machine"]
    assert (machine["flops"], machine["ssd_read"], machine["ssd"]) == (400e12, 1.2e9, 64 << 40)
    assert "known are" in call(*words, "h100-80+tape").stderr
    plan = ("plan", "--model", "llama-3.2-1b", "--context", "1M", "--host-memory", "16GiB", "--ssd", "1TiB", "--json")
    seconds = {name: json.loads(call(*plan, "--what-if", name).stdout)["tpot"] for name in ("gen5-ssd", "object-store")}
    assert seconds["gen5-ssd"] < json.loads(call(*plan).stdout)["tpot"] < seconds["object-store"]
    assert "no profile 'tape'" in call(*plan, "--what-if", "tape").stderr
