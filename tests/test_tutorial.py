"""docs/tuning.md: every command runs as it is written, but for fewer tokens and trials."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from alaya_tiers import Settings
from tests.test_cli import call
from tests.test_traces import chat

FEWER = {
    "--tokens 16000": "--tokens 3000 --questions 1 --answer-tokens 3",
    "--trials 20": "--trials 4",
    "--trials 10": "--trials 2",
    "--limit 400": "--limit 40",
    "profile -o": "profile --quick -o",
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.leaks("matplotlib keeps its fonts open")
def test_every_command_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    drawing = importlib.util.find_spec("matplotlib") is not None
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text(
        "".join(chat(i * 1000, 2048, [i % 9 * 4 + j for j in range(4)]) + "\n" for i in range(60))
    )
    text = (root / "docs" / "tuning.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        for long, short in FEWER.items():
            command = command.replace(long, short)
        words = shlex.split(command)
        if not drawing and words[1] == "inspect":
            continue
        if not drawing and "--plot" in words:
            at = words.index("--plot")
            del words[at : at + 2]
        assert words[0] == "alaya-tiers"
        result = call(*words[1:], columns=200)
        assert result.exit_code in (0, 1 if words[1] == "tune" else 0), f"{command}\n{result.output}"
    for name in ("first.toml", "settings.toml", "service.toml"):
        Settings.from_toml(name)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "docs/tuning.md", "exec"), {})
    if drawing:
        assert {"pictures.html", "front.png"} <= {path.name for path in tmp_path.iterdir()}
