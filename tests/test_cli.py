"""The command line: what it prints, where, and how it ends."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner, Result

from alaya_tiers.errors import OutOfSpace
from alaya_tiers.tools import cli, demo

SMALL = ("demo", "--tokens", "500", "--questions", "2", "--answer-tokens", "4")
KEYS = {
    "model",
    "source",
    "tokens",
    "plan",
    "answers",
    "new_tokens",
    "speed",
    "reading",
    "asking",
    "dynamic",
    "summary",
}


def call(*arguments: str, columns: int = 100) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": str(columns), "TERM": "dumb"})


def commands(group: Any, *before: str) -> list[tuple[str, ...]]:
    """The words of every command, subcommands included."""
    found = [before]
    for name, command in group.commands.items():
        words = (*before, name)
        found += commands(command, *words) if isinstance(command, TyperGroup) else [words]
    return found


@pytest.mark.parametrize("words", commands(get_command(cli.app)), ids=" ".join)
def test_every_help_has_an_example(words: tuple[str, ...]) -> None:
    """Its own, or that of the group it is in."""
    results = [call(*words[:count], "--help") for count in range(min(1, len(words)), len(words) + 1)]
    assert [result.exit_code for result in results] == [0] * len(results)
    assert any("Example" in result.stdout for result in results)


def test_the_version_is_that_of_the_package() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, version("alaya-tiers") + "\n")


@pytest.fixture(scope="module")
def report() -> demo.Report:
    return demo.run(demo.Options(tokens=500, questions=2, answer_tokens=4))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_demo_prints_answers_tiers_and_a_verdict(
    columns: int, report: demo.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run", lambda *arguments: report)
    result = call(*SMALL, columns=columns)
    assert result.exit_code == 0, result.stderr
    for words in ("read 500 tokens", "the text says", "device", "host", "ssd", "first token after"):
        assert words in result.stdout
    assert "2 of 2 continuations exact; identical to DynamicCache: 2 of 2." in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= min(columns, cli.WIDEST)
    assert "\x1b" not in result.output


def test_words_that_look_like_markup_are_shown(report: demo.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = replace(report.answers[0], continuation="raw[i:j] [/bold]", truth="raw[i:j] [/bold]", prompt="a [red] x[0]")
    monkeypatch.setattr(demo, "run", lambda *arguments: replace(report, answers=(odd, *report.answers[1:])))
    result = call(*SMALL)
    assert result.stdout.count("raw[i:j] [/bold]") == 2
    assert "…a [red] x[0]" in result.stdout


@pytest.mark.slow
def test_json_is_all_there_is_on_stdout() -> None:
    result = call(*SMALL, "--json", "--no-compare", "--threads", "2")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found) >= KEYS
    assert found["summary"]["exact"] == 2
    assert found["summary"]["identical"] is None
    assert found["dynamic"] is None
    assert "reading" in result.stderr


@pytest.mark.slow
def test_a_differing_token_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    really = demo.read_and_answer

    def confused(*arguments: Any) -> demo.Run:
        run = really(*arguments)
        replies = tuple(demo.Reply((*r.tokens[:-1], 0), r.first_seconds, r.other_seconds) for r in run.replies)
        return run if run.reading else demo.Run(replies, run.speed, None, None)

    monkeypatch.setattr(demo, "read_and_answer", confused)
    result = call(*SMALL)
    assert result.exit_code == 1
    assert "NOT identical to DynamicCache: 0 of 2." in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "missing.txt"), "cannot read missing.txt: No such file"),
        (("--host-budget", "1KiB"), "the host budget of 1,024 bytes is too small"),
        (("--device-budget", "1KiB"), "the device budget of 1,024 bytes is too small"),
        (("--host-budget", "much"), "cannot read 'much' as a size"),
        (("--model", "./nope"), "there is no folder ./nope"),
        (("--path", "file"), "the store's path is not a directory"),
        (("--tokens", "30"), "shorter than a passage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = call(*SMALL, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert result.stderr.endswith(f"{line}\n")


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [(KeyboardInterrupt(), 130, "stopped"), (OutOfSpace(28, "no space", "/x"), 2, "error: [Errno 28] no space: '/x'")],
)
def test_ctrl_c_and_a_full_disk_end_cleanly(
    raised: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise raised

    monkeypatch.setattr(demo, "prefill", stop)
    result = call(*SMALL)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output
