"""The tree, what is built from it, and the scripts that set it up."""

import importlib.machinery
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import alaya_tiers

LINKED = ("index", "policies", "tools")
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", ".coverage", "__pycache__", "*.egg-info", "*.so", "build", "dist"
)
COMPILER: dict[str, str] = {}
CLEARED = {"PYTHONPATH", "VIRTUAL_ENV", "ALAYA_VENV", "PYTHON", "CC", "CXX"}


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with nothing inherited that points into an environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | COMPILER | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def ran(*command: str | Path, cwd: Path, **env: str) -> str:
    """The standard output of a command that must succeed."""
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copied(root: Path, to: Path) -> Path:
    """The source tree without anything built: setuptools ships what an earlier build left in build/."""
    return Path(shutil.copytree(root, to, symlinks=True, ignore=NOT_SOURCE))


def sources(root: Path) -> set[str]:
    """The Python files of the package by the paths they install to; links are not followed, so each counts once."""
    own = {path.relative_to(root) for path in (root / "alaya_tiers").rglob("*.py")}
    linked = {"alaya_tiers" / path.relative_to(root) for name in LINKED for path in (root / name).rglob("*.py")}
    return {path.as_posix() for path in own | linked}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


class TestTree:
    @pytest.mark.parametrize("name", LINKED)
    def test_links_are_relative_and_lead_to_the_real_folder(self, root: Path, name: str) -> None:
        if (root / "PKG-INFO").exists():
            pytest.skip("an sdist carries no links; it needs none to build or run")
        link = root / "alaya_tiers" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"
        assert (link / "__init__.py").is_file()

    def test_every_folder_with_modules_is_a_listed_package(self, root: Path, project: dict[str, Any]) -> None:
        folders = {Path(path).parent.as_posix().replace("/", ".") for path in sources(root)}
        assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(folders)

    def test_public_names_are_few_and_complete(self) -> None:
        """Their order is kept by ruff, RUF022."""
        names = alaya_tiers.__all__
        public = {
            name
            for name, value in vars(alaya_tiers).items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
        }
        assert {name for name in names if not name.startswith("_")} == public
        assert len(names) <= 14

    @pytest.mark.slow
    def test_importing_has_no_side_effects(self, root: Path) -> None:
        """No thread; in transformers' registry one new name, and nothing that was there has changed."""
        code = (
            "import threading, transformers.modeling_utils as m\n"
            "before = dict(m.ALL_ATTENTION_FUNCTIONS)\n"
            "import alaya_tiers\n"
            "after = dict(m.ALL_ATTENTION_FUNCTIONS)\n"
            "assert after.pop('alaya') and after == before, set(after) ^ set(before)\n"
            "assert threading.active_count() == 1, threading.enumerate()\n"
        )
        ran(sys.executable, "-c", code, cwd=root)


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestBuilt:
    """Wheel and sdist from a copy of the tree, installed without a network beside this environment's packages.

    Compiled without optimization, which takes a quarter of the time: this is about what is built, not how fast it is.
    """

    @pytest.fixture(scope="class", autouse=True)
    @staticmethod
    def _compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        usual = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or "cc"
        quick = tmp_path_factory.mktemp("compiler") / "cc"
        quick.write_text(f'#!/bin/sh\nexec {shlex.quote(usual)} "$@" -O0\n')
        quick.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "COMPILER", {"CC": str(quick)})
            yield

    @pytest.fixture(scope="class")
    @staticmethod
    def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return copied(root, tmp_path_factory.mktemp("source") / "tree")

    @pytest.fixture(scope="class")
    @staticmethod
    def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """This environment's site-packages, less any alaya_tiers in it."""
        folder = tmp_path_factory.mktemp("dependencies")
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "alaya" not in entry.name:
                (folder / entry.name).symlink_to(entry)
        return folder

    @pytest.fixture(scope="class")
    @staticmethod
    def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("sdist")
        ran(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, cwd=source)
        (path,) = out.glob("*.tar.gz")
        return path

    @pytest.fixture(scope="class", params=["from the tree", "from the sdist"])
    @staticmethod
    def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("wheel")
        if request.param == "from the tree":
            built_from = request.getfixturevalue("source")
        else:
            with tarfile.open(request.getfixturevalue("sdist")) as archive:
                archive.extractall(out, filter="data")
            (built_from,) = out.iterdir()
        ran(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, cwd=built_from)
        (path,) = out.glob("*.whl")
        return path

    def test_wheel_holds_exactly_the_package(self, wheel: Path, root: Path, project: dict[str, Any]) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        package = {name for name in names if ".dist-info/" not in name}
        kernel = {name for name in package if name.startswith("alaya_tiers/_attend.")}
        assert len(kernel) == 1
        assert kernel.pop().endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
        assert {name for name in package if "_attend." not in name} == sources(root) | {"alaya_tiers/py.typed"}
        assert f"\nVersion: {project['project']['version']}\n" in metadata
        assert "\nLicense-Expression: Apache-2.0\n" in metadata
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
        assert not wheel.name.endswith("-none-any.whl"), "the wheel carries machine code"

    def test_sdist_holds_what_building_and_checking_need(self, sdist: Path, root: Path) -> None:
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        wanted = {
            "alaya_tiers/attend.c",
            "alaya_tiers/py.typed",
            "LICENSE",
            "constraints.txt",
            "tools/check",
            "tools/setup.sh",
        }
        assert wanted <= names
        assert {path.relative_to(root).as_posix() for path in (root / "tests").glob("*.py")} <= names
        assert not [name for name in names if name.endswith((".so", ".pyc", ".safetensors"))]

    def test_wheel_works_from_anywhere(self, wheel: Path, dependencies: Path, root: Path, tmp_path: Path) -> None:
        ran(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-index",
            "--target",
            tmp_path / "site",
            wheel,
            cwd=tmp_path,
        )
        path = os.pathsep.join([str(tmp_path / "site"), str(dependencies)])
        # -S: without site, so without the editable install that this environment may have
        found = ran(sys.executable, "-S", "-c", IMPORT_ALL, cwd=tmp_path, PYTHONPATH=path).split()
        assert sorted(found) == sorted(str(tmp_path / "site" / name) for name in sources(root))

    @pytest.fixture
    @staticmethod
    def editable(source: Path, dependencies: Path, tmp_path: Path) -> Callable[[Path], Path]:
        """Installs a tree for editing into a new environment; returns its interpreter."""

        def install(tree: Path) -> Path:
            ran(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
            python = tmp_path / "venv" / "bin" / "python"
            (purelib,) = (tmp_path / "venv").glob("lib/python*/site-packages")
            (purelib / "dependencies.pth").write_text(f"{dependencies}\n")
            pip = (sys.executable, "-m", "pip", "--python", python)
            ran(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "-e", tree, cwd=tmp_path)
            return python

        return install

    def test_editable_install_follows_the_tree(
        self, source: Path, editable: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        tree = copied(source, tmp_path / "tree")
        python = editable(tree)
        (tree / "policies" / "brand_new.py").write_text("")
        found = ran(python, "-c", IMPORT_ALL, cwd=tmp_path).split()
        assert sorted(found) == sorted(str(tree / name) for name in sources(tree))
        assert str(tree / "alaya_tiers" / "policies" / "brand_new.py") in found
        assert os.access(python.parent / "alaya-tiers", os.X_OK)

    def test_editable_install_works_where_links_were_lost(
        self, source: Path, editable: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        tree = copied(source, tmp_path / "tree")
        for name in LINKED:
            (tree / "alaya_tiers" / name).unlink()
        code = "".join(f"import alaya_tiers.{name} as it; print(it.__file__)\n" for name in LINKED)
        found = ran(editable(tree), "-c", code, cwd=tmp_path).split()
        assert found == [str(tree / name / "__init__.py") for name in LINKED]


@pytest.mark.slow
class TestLeaks:
    """The checks of conftest.py find what they are there to find."""

    LEAKY = """
import threading, pytest
kept, stop = [], threading.Event()

def test_file(): kept.append(open(__file__))
def test_thread(): threading.Timer(10, stop.set).start()
def test_tidy(): open(__file__).close()
@pytest.mark.leaks("on purpose")
def test_on_purpose(): kept.append(open(__file__))
def test_end(): [t.cancel() for t in threading.enumerate() if isinstance(t, threading.Timer)]
"""

    def test_what_stays_open_fails_the_test_that_opened_it(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "test_leaky.py").write_text(self.LEAKY)
        done = run(
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.conftest",
            "-p",
            "no:cacheprovider",
            tmp_path / "test_leaky.py",
            cwd=root,
        )
        failed = {
            line.split("::")[1].split()[0]
            for line in done.stdout.splitlines()
            if line.startswith(("ERROR ", "FAILED "))
        }
        assert failed == {"test_file", "test_thread"}
        assert "left open by this test: file" in done.stdout
        assert "left open by this test: thread" in done.stdout


IMPORT_ALL = """
import importlib, importlib.util, pkgutil, torch, alaya_tiers
print(alaya_tiers.__file__)
for module in pkgutil.walk_packages(alaya_tiers.__path__, "alaya_tiers."):
    if module.name.startswith("alaya_tiers._attend"):
        continue
    try:
        print(importlib.import_module(module.name).__file__)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # the kernels' own language, an extra
            raise
        print(importlib.util.find_spec(module.name).origin)
"""


class TestSetup:
    """The scripts, against a stand-in environment: nothing is downloaded, compiled or installed."""

    @pytest.fixture
    @staticmethod
    def tree(root: Path, tmp_path: Path) -> Path:
        """A tree with only what the scripts read."""
        tree = tmp_path / "a tree"
        for name in (
            "pyproject.toml",
            "constraints.txt",
            "alaya_tiers/attend.c",
            "tools/setup.sh",
            "tools/demo",
            "tools/check",
        ):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tree / name)
        return tree

    @pytest.fixture
    @staticmethod
    def venv(tree: Path) -> Path:
        """An environment whose programs only write down how they were called."""
        folder = tree / ".venv" / "bin"
        folder.mkdir(parents=True)
        for name in ("python", "alaya-tiers", "ruff", "lint-imports", "mypy"):
            (folder / name).write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "{name} $*" >>"{tree}/calls"\n')
            (folder / name).chmod(0o755)
        return folder.parent

    @staticmethod
    def calls(tree: Path) -> list[str]:
        """What was called since the last time, options of pip left out."""
        text = (tree / "calls").read_text() if (tree / "calls").exists() else ""
        (tree / "calls").write_text("")
        return [line.replace("--disable-pip-version-check --no-input ", "") for line in text.splitlines()]

    def test_installs_once_and_again_after_a_change(self, tree: Path, venv: Path, tmp_path: Path) -> None:
        def setup(*words: str) -> list[str]:
            ran("sh", tree / "tools" / "setup.sh", *words, cwd=tmp_path, CC="true", CXX="true")
            return self.calls(tree)

        torch_alone = next(
            line for line in (tree / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
        )
        steps = [
            f"python -m pip install --quiet {torch_alone}",
            "python -m pip install --quiet -c constraints.txt -e .",
        ]
        assert setup() == steps
        assert setup() == []
        assert setup("dev") == [steps[0], steps[1] + "[dev]"]
        assert setup() == setup("dev") == []
        (tree / "alaya_tiers" / "attend.c").write_text("int changed;\n")
        assert setup() == steps

    def test_a_failed_install_is_not_remembered(self, tree: Path, venv: Path) -> None:
        (venv / "bin" / "python").write_text('#!/bin/sh\ncase "$*" in *constraints*) exit 1;; esac\n')
        for _ in range(2):
            assert run("sh", "tools/setup.sh", cwd=tree, CC="true", CXX="true").returncode == 1

    def test_says_what_to_install_when_there_is_no_compiler(self, tree: Path, tmp_path: Path) -> None:
        tools = tmp_path / "few programs"
        tools.mkdir()
        for name in ("sh", "cat", "cksum", "dirname", "grep"):
            found = shutil.which(name)
            assert found
            (tools / name).symlink_to(found)
        done = run("sh", "tools/setup.sh", cwd=tree, PATH=str(tools), PYTHON=sys.executable, ALAYA_VENV="elsewhere")
        assert done.returncode == 1
        assert "lacks a C compiler" in done.stderr
        assert "a C++ compiler" in done.stderr
        assert "apt-get install gcc g++ python3-dev" in done.stderr
        assert not (tree / "elsewhere").exists(), "nothing may be made before the machine is known to be complete"

    def test_a_compiler_that_cannot_compile_is_shown_with_its_own_words(self, tree: Path, venv: Path) -> None:
        done = run("sh", "tools/setup.sh", cwd=tree, CC="true", CXX="/no/such/compiler")
        assert done.returncode == 1
        assert "lacks a C++ compiler (tried: /no/such/compiler)" in done.stderr
        assert "not found" in done.stderr.split("/no/such/compiler")[-1]

    def test_says_so_when_there_is_no_python(self, tree: Path) -> None:
        done = run("sh", "tools/setup.sh", cwd=tree, PYTHON="/no/such/python")
        assert done.returncode == 1
        assert "no complete Python 3.11 or later" in done.stderr
        assert "/no/such/python" in done.stderr

    def test_demo_passes_its_arguments_on_and_keeps_standard_output_clean(
        self, tree: Path, venv: Path, tmp_path: Path
    ) -> None:
        out = ran("sh", tree / "tools" / "demo", "--tokens", "two words", cwd=tmp_path, CC="true", CXX="true")
        assert out == ""
        assert self.calls(tree)[-1] == "alaya-tiers demo --tokens two words"

    def test_check_runs_every_step_and_fails_if_one_did(self, tree: Path, venv: Path, tmp_path: Path) -> None:
        check = ("sh", tree / "tools" / "check", "-k", "some test")
        assert run(*check, cwd=tmp_path, CC="true", CXX="true").returncode == 0
        (venv / "bin" / "lint-imports").write_text("#!/bin/sh\nexit 3\n")
        self.calls(tree)
        done = run(*check, cwd=tmp_path)
        assert done.returncode == 1
        assert self.calls(tree) == [
            "ruff format --check .",
            "ruff check .",
            "mypy ",
            "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -k some test",
        ]
        verdicts = [line.split()[:2] for line in done.stdout.partition("== summary")[2].strip().splitlines()]
        assert verdicts == [
            ["format", "passed"], ["lint", "passed"], ["imports", "FAILED"], ["types", "passed"], ["tests", "passed"]
        ]  # fmt: skip
