"""Plans: what fits, what goes where, and settings that a cache really takes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alaya_tiers import AlayaCache, Settings
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools.costs import Costs
from alaya_tiers.tools.plan import Plan, Room, plan
from alaya_tiers.tools.shapes import NAMED, Shape, shape_of
from tests.test_cli import call
from tests.test_profile import KNOWN, written

GIB = 1 << 30
SMALL = Shape("small", 4, 256, 8, 4, 64, 512, 1000, number_bytes=4)


def planned(tokens: int, host: int, ssd: int = 1 << 40, device: int = 0, mode: str = "auto") -> Plan:
    return plan(SMALL, tokens, Room(device, host, ssd), KNOWN, mode)


def test_what_a_step_costs_by_hand() -> None:
    shape = Shape("hand", 2, 8, 4, 2, 64, 16, 10, number_bytes=4)
    costs = Costs(replace(KNOWN, weights=1.0, scan=2.0, pick=3.0, attend={"float32/64": 4.0}), shape)
    layer = 2 * 8 * 64 * (4 + 2) + 3 * 8 * 16
    assert costs.model() == KNOWN.step + 2 * KNOWN.layer + 4 * (2 * layer + 80)
    assert costs.exact(10) == 10 * 2 * 2 * 2 * 64 * 4 / 4
    assert costs.sparse(10, 4, 3) == 2 * KNOWN.look + costs.exact(4) + 2 * 2 * 6 * 64 / 2 + 2 * 2 * 3 * (3 + 512 / 4)
    assert costs.disk(6e8, 16 << 10) == 2
    assert costs.disk(0, 16 << 10) == 0


def test_everything_in_memory_is_exact_and_reads_nothing() -> None:
    found = planned(4096, 8 * GIB)
    assert (found.mode, found.fits) == ("exact", True)
    assert {part.where: part.nbytes for part in found.parts}["ssd"] == 0
    assert list(found.terms.values())[2] == 0
    assert found.tpot == pytest.approx(sum(found.terms.values()))


def test_more_than_memory_is_sparse_and_the_rest_is_on_disk() -> None:
    tokens = 1 << 20
    found = planned(tokens, 4 * GIB)
    kv = tokens * SMALL.token_bytes
    assert (found.mode, found.fits) == ("sparse", True)
    assert sum(part.nbytes for part in found.parts if part.what.startswith("KV")) == pytest.approx(kv, rel=1e-6)
    assert sum(part.nbytes for part in found.parts if part.where != "ssd") <= 4 * GIB
    assert planned(tokens, 6 * GIB).tpot < found.tpot, "more memory is never slower"
    assert planned(tokens, 4 * GIB, mode="exact").tpot > found.tpot


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (planned(1 << 20, 1 << 20), "weights"),
        (planned(1 << 20, 10 << 20), "beside the weights"),
        (planned(1 << 20, 2 * GIB, ssd=GIB), "pass through the SSD"),
        (planned(1 << 20, 2 * GIB, device=1 << 20), "do not fit into the device memory"),
    ],
    ids=["weights", "tiers", "ssd", "device"],
)
def test_what_does_not_fit_is_named(found: Plan, word: str) -> None:
    assert not found.fits
    assert any(word in problem for problem in found.missing)


@pytest.mark.parametrize(("host", "mode"), [(64 << 20, "sparse"), (1 << 30, "exact")])
def test_a_cache_takes_the_settings_and_holds_such_a_context(tmp_path: Path, host: int, mode: str) -> None:
    path, tokens = tmp_path / "settings.toml", 8192
    found = planned(tokens, host)
    assert (found.mode, found.fits) == (mode, True)
    path.write_text(found.toml())
    settings = Settings.from_toml(path)
    assert settings.mode == mode
    with AlayaCache(settings=settings, max_tokens=None) as cache:
        for layer in range(SMALL.layers):
            for _ in range(0, tokens, 2048):
                k = torch.zeros(1, SMALL.kv_heads, 2048, SMALL.head_dim)
                cache.update(k, k, layer)
        assert cache.get_seq_length() == tokens
        used = cache.stats().tiers
        assert used["ssd"].used <= next(p.nbytes for p in found.parts if p.where == "ssd") * 1.2 + (64 << 20)


@pytest.mark.alone
def test_the_command_answers_in_a_second_and_writes_settings(tmp_path: Path) -> None:
    out, began = tmp_path / "s.toml", time.perf_counter()
    words = ("plan", "--model", "llama-3.1-8b", "--context", "128K", "--host-memory", "24GiB", "--ssd", "1TiB")
    rates = ("--profile", str(written(tmp_path / "p.toml")))
    result = call(*words, *rates, "-o", str(out))
    assert time.perf_counter() - began < 5
    assert result.exit_code == 0, result.output
    assert "fits." in result.stdout
    assert "TPOT, the sum" in result.stdout
    assert Settings.from_toml(out).mode == "sparse"
    report = json.loads(call(*words, *rates, "--json").stdout)
    assert report["fits"] is True
    assert report["settings"]["read_rate"] == 2e10
    assert sum(report["terms"].values()) == pytest.approx(report["tpot"])
    bad = call(*words[:-1], "1GiB")
    assert (bad.exit_code, "does not fit" in bad.stdout) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "many"), "cannot read 'many'"),
        (("--context", "8K,9K"), "one number of tokens"),
        (("--host-memory", "much"), "cannot read 'much'"),
        (("--mode", "some"), "unknown mode 'some'"),
        (("--mode", "sparse", "--device-memory", "80GiB"), "on the CPU so far"),
        (("--model", "nothing"), "no model 'nothing'"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_bad_requests_say_what_is_wrong(words: tuple[str, ...], message: str) -> None:
    given = {"--model": "llama-3.1-8b", "--context": "8K", "--host-memory": "64GiB", "--ssd": "1TiB"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    result = call("plan", *(word for pair in given.items() for word in pair))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_named_models_are_what_they_are_named() -> None:
    """Parameters of all layers, embedding and output, in billions."""
    for name, billions in (("llama-3.1-8b", 8.0), ("llama-3.1-70b", 70.6), ("qwen3-8b", 8.2)):
        shape = NAMED[name]
        assert (shape.weights + 2 * shape.hidden * shape.vocab) / 1e9 == pytest.approx(billions, rel=0.01)
    with pytest.raises(ConfigError, match="no model"):
        shape_of("nothing")
