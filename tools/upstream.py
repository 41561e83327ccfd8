"""transformers' own tests with our cache in place of ``DynamicCache``: a pytest plugin, and what compares two runs.

    python -m alaya_tiers.tools.upstream CHECKOUT --models llama mistral --mode alaya
    python -m pytest -p alaya_tiers.tools.upstream --alaya-mode stock CHECKOUT/tests/models/llama

CHECKOUT is the source tree of transformers, best of the version that is installed: its tests are not in the wheel. The
first command runs its generation tests with ``DynamicCache`` (mode off) and again with ours, and lists the tests that
pass only with the former. Modes: stock = the models keep their attention; alaya = "alaya" is the default attention.

Needs the extra "dev", and what their tests import: ``pip install parameterized pytest-xdist pillow httpx requests``.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer

from alaya_tiers.cache import Session
from alaya_tiers.config import parse_bytes
from alaya_tiers.hf import AlayaCache
from alaya_tiers.hf.switch import hand_on_latents
from alaya_tiers.ledger import Ledger

MODES = ("off", "stock", "alaya")
ONLY_STOCK_PASSES, CANNOT_SAY = 1, 2
"""Exit codes, beside 0."""

MODELS = (
    *("llama", "mistral", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "gpt_neox", "gpt_oss"),
    *("deepseek_v3", "phi3", "olmo2", "cohere2", "gpt2", "falcon", "bloom", "t5"),
)
"""What is run when no models are named."""

BLOCK_TOKENS, DEVICE_BUDGET, HOST_BUDGET = 4, "768KiB", "256KiB"
"""Small enough that tests of 20 tokens spill, large enough for their batches."""

SECONDS = 300
"""A test that takes longer has failed."""

COUNTS: Counter[str] = Counter()
"""Of this process: caches, offloaded (which are not ours), gathers, demoted and written blocks."""


# ---------------------------------------------------------------------- the cache that is put in place
class _AlsoStock(type):
    """isinstance and issubclass against the substitute say what they said against DynamicCache."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, DynamicCache) if cls is Substitute else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, DynamicCache) if cls is Substitute else super().__subclasscheck__(subclass)


class Substitute(AlayaCache, metaclass=_AlsoStock):
    """AlayaCache with the signature of DynamicCache. One that shall offload is a DynamicCache: that is a rival."""

    settings: dict[str, Any] = {}  # noqa: RUF012 - set once, by install

    def __new__(cls, *args: Any, offloading: bool = False, **kwargs: Any) -> Any:
        if offloading:
            COUNTS["offloaded"] += 1
            return DynamicCache(*args, offloading=True, **kwargs)  # type: ignore[misc]
        return super().__new__(cls)

    def __init__(
        self, ddp_cache_data: Any = None, config: Any = None, offloading: bool = False, **ignored: object
    ) -> None:
        COUNTS["caches"] += 1
        super().__init__(ddp_cache_data, config, max_tokens=None, **self.settings)


def small(block_tokens: int, device_budget: int | str, host_budget: int | str) -> dict[str, Any]:
    """Settings for tests of few tokens."""
    return {
        "block_tokens": block_tokens,
        "segment_tokens": 16 * block_tokens,
        "sink_tokens": block_tokens,
        "device_budget": parse_bytes(device_budget),
        "host_budget": parse_bytes(host_budget),
        "io": "buffered",
        "io_threads": 1,
    }


def install(mode: str, settings: dict[str, Any]) -> None:
    """Put the substitute wherever transformers has DynamicCache, and count. For good: this process is for one run."""
    if mode == "off":
        return
    Substitute.settings = settings
    transformers.DynamicCache  # noqa: B018 - a lazy name: it is there from its first use on
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and vars(module).get("DynamicCache") is DynamicCache:
            setattr(module, "DynamicCache", Substitute)  # noqa: B010 - mypy: a class cannot be assigned to
    _count(Session, "gather", "gathers", lambda *args: 1)
    _count(Ledger, "demoted", "demoted", lambda ids, *args: ids.size)
    _count(Ledger, "written", "written", lambda ids, *args: ids.size)
    if mode == "alaya":
        _prefer_alaya()


def _count(owner: type, method: str, name: str, amount: Callable[..., int]) -> None:
    original = getattr(owner, method)

    @functools.wraps(original)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        COUNTS[name] += amount(*args)
        return original(self, *args, **kwargs)

    setattr(owner, method, counting)


def _prefer_alaya() -> None:
    """Models made without naming an attention get "alaya", under the conditions of AlayaCache.for_model."""
    choose: Any = PreTrainedModel.get_correct_attn_implementation
    made: Any = PreTrainedModel.post_init

    @functools.wraps(choose)
    def choose_ours(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        found: str = choose(self, requested_attention, *args, **kwargs)
        return "alaya" if requested_attention is None and _can_alaya(self) else found

    @functools.wraps(made)
    def made_ours(self: Any) -> None:
        made(self)
        hand_on_latents(self)

    setattr(PreTrainedModel, "get_correct_attn_implementation", choose_ours)  # noqa: B010 - mypy, as above
    setattr(PreTrainedModel, "post_init", made_ours)  # noqa: B010


def _can_alaya(model: Any) -> bool:
    if not model._can_set_attn_implementation():
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError:  # the config of an encoder, of images for example: it has no cache
        return True
    return not any(isinstance(layer, DynamicIndexedLayer) for layer in layers)


# ---------------------------------------------------------------------- the plugin
def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alaya", "alaya_tiers in place of DynamicCache")
    group.addoption("--alaya-mode", choices=MODES, default="stock", help="off: change nothing, only report")
    group.addoption("--alaya-block-tokens", type=int, default=BLOCK_TOKENS)
    group.addoption("--alaya-device-budget", default=DEVICE_BUDGET)
    group.addoption("--alaya-host-budget", default=HOST_BUDGET)
    group.addoption("--alaya-generation", action="store_true", help="only tests of generation and of caches")
    group.addoption("--alaya-report", metavar="FILE", help="write outcomes there, one JSON object a line")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest.py, and so before any modeling file, is imported."""
    chosen = early_config.known_args_namespace
    install(
        chosen.alaya_mode,
        small(chosen.alaya_block_tokens, chosen.alaya_device_budget, chosen.alaya_host_budget),
    )


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("alaya_report"):
        config.pluginmanager.register(Reporter(Path(path)), "alaya-reporter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("alaya_generation"):
        out = [item for item in items if not _about_generation(item)]
        items[:] = [item for item in items if _about_generation(item)]
        config.hook.pytest_deselected(items=out)


def _about_generation(item: pytest.Item) -> bool:
    marked = item.get_closest_marker("generate") is not None
    return marked or any(word in item.nodeid.lower() for word in ("generat", "cache", "past_key_value"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that never made a cache of ours proves nothing."""
    if exitstatus == pytest.ExitCode.OK and session.config.getoption("alaya_mode") != "off" and not COUNTS["caches"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    mode = config.getoption("alaya_mode")
    if mode != "off":
        terminalreporter.section(f"alaya_tiers, mode {mode}")
        terminalreporter.line(used(COUNTS))


def used(counts: Counter[str]) -> str:
    """What a run did with our cache, in a line."""
    if not counts["caches"]:
        return "no cache of ours was made: these tests say nothing about it"
    others = f" ({counts['offloaded']} more were to offload and stayed DynamicCache)" if counts["offloaded"] else ""
    return (
        f"{counts['caches']} caches{others}, {counts['gathers']} gathers, {counts['demoted']} blocks spilled "
        f"to the host tier, {counts['written']} blocks written to files"
    )


class Reporter:
    """Writes one line for every report, at once, so that a crash leaves what came before; at the end the counts."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line = {"test": report.nodeid, "when": report.when, "outcome": report.outcome}
        if report.failed:
            lines = [text for text in report.longreprtext.splitlines() if text.startswith("E ")]
            line["message"] = " ".join(lines[0][1:].split()) if lines else report.longreprtext[-200:]
        self._write(line)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write({"broken": report.nodeid, "message": report.longreprtext[-400:]})

    def pytest_unconfigure(self) -> None:
        self._write({"counts": dict(COUNTS)})
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._file, flush=True)


# ---------------------------------------------------------------------- two runs
@dataclass(slots=True)
class Run:
    """What one run of pytest reported. tests: outcome by node id; messages: of the failed; broken: not collected."""

    tests: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    complete: bool = False

    @classmethod
    def read(cls, path: Path) -> "Run":
        """From a file of ``--alaya-report``."""
        run = cls()
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            line = json.loads(text)
            if "counts" in line:
                run.counts, run.complete = Counter(line["counts"]), True
            elif "broken" in line:
                run.broken[line["broken"]] = line["message"]
            else:
                run._add(line)
        return run

    def _add(self, line: dict[str, str]) -> None:
        test, outcome = line["test"], line["outcome"]
        if outcome == "failed":
            self.tests[test] = outcome
            self.messages.setdefault(test, line["message"])
        elif self.tests.get(test) != "failed" and (outcome == "skipped" or line["when"] == "call"):
            self.tests[test] = "passed" if "passed" in (outcome, self.tests.get(test)) else outcome

    @property
    def passed(self) -> list[str]:
        """Tests of which every part passed, in order."""
        return [test for test, outcome in self.tests.items() if outcome == "passed"]

    def of(self, files: set[str]) -> "Run":
        """The same, of these files only."""
        tests = {test: outcome for test, outcome in self.tests.items() if _file(test) in files}
        return replace(self, tests=tests)

    def why(self, test: str) -> str:
        """What became of a test."""
        outcome = self.tests.get(test, "did not run or did not end")
        return f"{outcome}: {self.messages[test]}" if test in self.messages else outcome


def only_stock_passes(off: Run, ours: Run) -> list[str]:
    """Tests that pass with DynamicCache and fail, are skipped or do not end with ours."""
    return [test for test in off.passed if ours.tests.get(test) != "passed"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 = what passes with DynamicCache passes with ours, 1 = something does not, 2 = cannot say."""
    options = _parser().parse_args(arguments)
    files = _files(options)
    if isinstance(files, str):
        return _cannot_say(files)
    _warn_of_version(options.checkout)
    wanted = {path.as_posix() for path in files}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        off = Run.read(options.baseline).of(wanted) if options.baseline else run(options, "off", files, folder)
        if not off.passed:
            broken = "; ".join(f"{test}: {why}" for test, why in off.broken.items())
            return _cannot_say(f"no test passed with DynamicCache. {broken or _end(folder / 'off.log')}")
        ours = run(options, options.mode, files, folder)
    lost = only_stock_passes(off, ours)
    _print(off, ours, lost)
    if lost:
        return ONLY_STOCK_PASSES
    return 0 if ours.counts["caches"] else _cannot_say(used(ours.counts))


def run(options: argparse.Namespace, mode: str, files: Sequence[Path], folder: Path) -> Run:
    """Run pytest on the files; its output goes to a log beside the report."""
    report, log = folder / f"{mode}.jsonl", folder / f"{mode}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "alaya_tiers.tools.upstream", "--alaya-mode", mode]
    command += ["--alaya-report", str(report), "--alaya-block-tokens", str(options.block_tokens)]
    command += ["--alaya-device-budget", options.device_budget, "--alaya-host-budget", options.host_budget]
    command += ["--rootdir", str(options.checkout), "-p", "no:cacheprovider", "-o", "log_cli=false", "-q"]
    if not options.all:
        command.append("--alaya-generation")
    if options.select:
        command += ["-k", options.select]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={options.seconds}", "--timeout-method=signal"]
    print(f"mode {mode}: running pytest, its output is in {log}", file=sys.stderr, flush=True)
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(
            [*command, *map(str, files)],
            cwd=options.checkout,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    found = Run.read(report)
    if not found.complete:
        print(f"mode {mode}: pytest did not reach its end: {_end(log)}", file=sys.stderr)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m alaya_tiers.tools.upstream",
        description="transformers' own generation tests, with DynamicCache and with AlayaCache in its place.",
    )
    add = parser.add_argument
    add("checkout", type=lambda path: Path(path).resolve(), help="a source tree of transformers")
    add("--models", nargs="+", metavar="MODEL", help=f"folders of tests/models (without --files: {' '.join(MODELS)})")
    add("--files", nargs="+", type=Path, default=[], metavar="FILE", help="test files, from the checkout on")
    add("--mode", choices=MODES[1:], default="stock", help="alaya: it is also the models' default attention")
    add("--block-tokens", type=int, default=BLOCK_TOKENS)
    add("--device-budget", default=DEVICE_BUDGET)
    add("--host-budget", default=HOST_BUDGET)
    add("--select", metavar="EXPRESSION", help="as pytest's -k, for example 'not compil'")
    add("--all", action="store_true", help="all tests of the files, not only those of generation and caches")
    add("--seconds", type=int, default=SECONDS, help="for one test, where pytest-timeout is installed")
    add("--keep", type=Path, metavar="FOLDER", help="leave outcomes and logs there")
    add("--baseline", type=Path, metavar="FILE", help="an off.jsonl that --keep left: run only with our cache")
    return parser


def _files(options: argparse.Namespace) -> list[Path] | str:
    """The test files, or what is wrong."""
    if not options.checkout.is_dir():
        return f"{options.checkout} is no directory"
    models = options.models if options.models or options.files else MODELS
    files = [Path("tests", "models", model, f"test_modeling_{model}.py") for model in models or ()]
    files += options.files
    missing = [str(path) for path in files if not (options.checkout / path).is_file()]
    return f"not in {options.checkout}: {', '.join(missing)}" if missing else files


def _warn_of_version(checkout: Path) -> None:
    source = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'__version__ = "(.+?)"', source.read_text(encoding="utf-8")) if source.is_file() else None
    if found is not None and found[1] != transformers.__version__:
        print(
            f"the checkout is of transformers {found[1]}, {transformers.__version__} is installed: "
            "tests that fail with DynamicCache for that reason are not counted",
            file=sys.stderr,
        )


def _print(off: Run, ours: Run, lost: Sequence[str]) -> None:
    """Counts by file, then every lost test and why."""
    passed, failed = Counter(map(_file, off.passed)), Counter(map(_file, lost))
    width = max(map(len, passed))
    print(f"{'file':{width}}  passed with DynamicCache  of these not with ours")
    for name in passed:
        print(f"{name:{width}}  {passed[name]:24}  {failed[name]:22}")
    print(f"{'all':{width}}  {passed.total():24}  {failed.total():22}")
    for test, why in off.broken.items():
        print(f"not counted, {test} cannot be collected: {' '.join(why.split())[-160:]}", file=sys.stderr)
    print(used(ours.counts))
    for test in lost:
        print(f"{test}\n    {ours.why(test)}")


def _file(test: str) -> str:
    return test.partition("::")[0]


def _end(log: Path) -> str:
    """The last lines of a log."""
    return " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-600:] if log.is_file() else ""


def _cannot_say(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return CANNOT_SAY


if __name__ == "__main__":
    sys.exit(main())
