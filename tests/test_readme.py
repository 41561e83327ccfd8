"""The examples of README, docs/using.md and docs/sparse.md run as written, but for the names of model and book."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.core import TyperGroup
from typer.main import get_command

import alaya_tiers
from alaya_tiers.tools import cli


def python_block(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(block)


def small_model(folder: Path) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    tokenizer = Tokenizer(models.WordLevel({"?": 0} | {w: i + 1 for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_the_example_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model(tmp_path)
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over a lazy dog " * 60)
    code = python_block((root / "README.md").read_text())
    assert len(code.splitlines()) <= 9
    code = code.replace("Qwen/Qwen2.5-0.5B", str(tmp_path)).replace('open("book.txt")', 'Path("book.txt")')
    code = code.replace(".read()", ".read_text()")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"Path": Path}
    exec(code, names)
    cache, output = names["cache"], names["output"]
    assert isinstance(cache, alaya_tiers.AlayaCache)
    assert output.shape == (1, 9 * 60 + 50)  # type: ignore[attr-defined]
    assert cache.get_seq_length() == 9 * 60 + 49
    cache.close()


@pytest.mark.parametrize("page", ["using.md", "sparse.md"])
def test_every_way_in_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """All blocks of a page, one after the other, in a folder with a model of that name."""
    small_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / page).read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, f"docs/{page}", "exec"), names)


def test_the_file_tree_tells_the_truth(root: Path) -> None:
    text = (root / "README.md").read_text()
    tree = text.split("## Find your way")[1].split("```")[1]
    for file in sorted((root / "alaya_tiers").glob("*.py")):
        if file.name != "__init__.py":
            assert file.name in tree, f"{file.name} is missing in the README's file tree"
    for name in re.findall(r"(\w+\.(?:py|c|md))\b", tree):
        assert list(root.rglob(name)), f"the README names {name}, which does not exist"
    for link in re.findall(r"\]\(([^)h][^)]*)\)", text):
        assert os.path.exists(root / link.partition("#")[0]), f"the README links to {link}, which does not exist"


def calls(text: str) -> Iterator[list[str]]:
    """The words of every call of the command that a page shows, in blocks and in sentences, without its name."""
    for block, inline in re.findall(r"```(?:sh)?\n(.*?)```|`([^`\n]+)`", text, re.DOTALL):
        for line in (block or inline).splitlines():
            found = re.match(r"(?:sh )?(?:[\w.]*/)*(?:alaya-tiers(?![\w\[-])|(?=demo\b))(.*)", line.partition("#")[0])
            if found:
                yield found[1].split()


def test_every_command_that_is_shown_exists_and_has_the_options(root: Path) -> None:
    seen = 0
    for page in (root / "README.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md", *(root / "docs").rglob("*.md")):
        for words in calls(page.read_text()):
            command: Any = get_command(cli.app)
            left, seen = list(words), seen + 1
            while left and isinstance(command, TyperGroup) and not left[0].startswith("-"):
                assert left[0] in command.commands, f"{page.name} shows {words}: there is no {left[0]}"
                command = command.commands[left.pop(0)]
            options = {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
            unknown = {word.partition("=")[0] for word in left if word.startswith("-")} - options
            assert not unknown, f"{page.name} shows {words}: it has no {unknown}"
    assert seen > 40
