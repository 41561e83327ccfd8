"""Pictures of recorded runs: what they are drawn from by hand, and that they are drawn."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from alaya_tiers.tools import inspect
from alaya_tiers.tools.recorded import open_recording
from tests.test_cli import call
from tests.test_profile import KNOWN
from tests.test_record import FOUND, HEAD, OWN, PUT, READ, SHAPE

LINES = [
    HEAD.replace("{}", '{"mode": "sparse", "block_tokens": 16, "sink_tokens": 0, "recent_tokens": 8}'),
    SHAPE, OWN, PUT, FOUND, READ,
    '{"put": [0, 1, 1], "t": 2.0}', FOUND.replace("8, 40]", "8, 41]"), '{"read": [0, 1, 41, 4], "t": 2.5, "s": 0.25}',
]  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    (tmp_path / "t.jsonl").write_text("".join(line + "\n" for line in LINES))
    return tmp_path / "t.jsonl"


def test_what_heads_attend_is_counted(trace: Path) -> None:
    seen = inspect.look(open_recording(trace))
    assert seen.tokens == 41
    assert seen.heads == [(0, 0), (0, 1)]
    assert seen.sizes == {(0, 1): [2, 2], (0, 0): [-1, -1]}
    assert {i: n for i, n in enumerate(seen.attended[0, 1]) if n} == {9: 2, 12: 2}
    assert seen.steps == [[(0, 1.5, 0.01)], [(0, 2.5, 0.25)]]


def test_residency_is_all_the_kv(trace: Path) -> None:
    found = inspect.residency(open_recording(trace), KNOWN)
    assert [sum(nbytes) for nbytes in found.nbytes] == [3 * 16 * 2 * 16 * 4] * 2, "three blocks of two heads"
    assert found.times == sorted(found.times)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.leaks("matplotlib keeps its fonts open")
def test_pictures_are_drawn(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    result = call("inspect", str(trace), "-o", str(page), "--step", "1")
    assert result.exit_code == 0, result.output
    assert "41 tokens, 2 steps, 2 heads" in " ".join(result.stdout.split())
    assert page.read_text().count("data:image/png;base64,") == len(inspect.PICTURES)
    png = tmp_path / "p.png"
    assert call("inspect", str(trace), "-o", str(png), "--only", "heat, timeline").exit_code == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    exact = tmp_path / "e.jsonl"
    exact.write_text("".join(line + "\n" for line in (HEAD, SHAPE, OWN, PUT, READ)))
    assert call("inspect", str(exact), "-o", str(png)).exit_code == 0, (
        "exact attention has nothing to show, and says so"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "p.gif"), "not '.gif'"),
        (("--only", "sound"), "no picture 'sound'"),
        (("-o", "no/such/folder/p.html"), "no/such/folder is not a directory"),
    ],
    ids=["kind", "picture", "folder"],
)
@pytest.mark.leaks("matplotlib keeps its fonts open")
def test_bad_requests_say_what_is_wrong(trace: Path, words: tuple[str, ...], message: str) -> None:
    pytest.importorskip("matplotlib")
    result = call("inspect", str(trace), *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_without_matplotlib_it_says_what_to_install(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    assert "alaya-tiers[plots]" in call("inspect", str(trace)).stderr
