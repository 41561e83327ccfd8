"""What every test gets: two torch threads, a fixed seed, and a check that it left no file and no thread behind."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for tiny work would keep others off the cores
os.environ["TRITON_INTERPRET"] = str(int(not os.path.exists("/dev/nvidiactl")))  # read when torch imports triton

import ctypes
import faulthandler
import fcntl
import gc
import random
import shutil
import subprocess
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr.core.sync
from hypothesis import settings

from alaya_tiers import GatheredWarning, kernel
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("attend.c", "graph.c", "io.c", "scan.c", "summary.c")

settings.register_profile("check", derandomize=True, deadline=None)
settings.register_profile(
    "explore", deadline=None, max_examples=2000
)  # HYPOTHESIS_PROFILE=explore: new examples each run
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))


def pytest_configure() -> None:
    torch.set_num_threads(2)
    faulthandler.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Of the processes of ``pytest -n`` one has the machine while it runs a test that is marked ``alone``.

    Who wants it waits at the turn, and so does who comes after: else short tests of others would keep it out.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with open(ROOT / "tests" / "conftest.py") as turn, open(ROOT / "pyproject.toml") as machine:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(machine, how)
        fcntl.flock(turn, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(machine, fcntl.LOCK_UN)  # closing it does not, while a child of a fork has it too


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Models, traces and books, which are not part of the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the source tree")
    return path


@pytest.fixture(scope="session")
def books(shared_data: Path) -> Path:
    """A folder of long English novels, one .md each."""
    path = shared_data / "books"
    if not path.is_dir():
        pytest.skip("no ../shared/data/books beside the source tree")
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(params=["alaya", "sdpa"])
def implementation(request: pytest.FixtureRequest, model: Any) -> Iterator[str]:
    """The two-line use and the one-line use."""
    model.set_attn_implementation(request.param)
    with warnings.catch_warnings():
        if request.param == "sdpa":
            warnings.simplefilter("ignore", GatheredWarning)
        yield request.param
    model.set_attn_implementation("sdpa")


@pytest.fixture(params=[16, 8, 4])
def instructions(
    request: pytest.FixtureRequest,
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """The kernel with vectors of so many floats at most: what other machines run."""
    if request.param < 16:
        compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler")
        built = Path(str(tmp_path_factory.getbasetemp())) / f"kernel{request.param}.so"
        if not built.exists():
            sources = [str(root / "alaya_tiers" / name) for name in SOURCES]
            flags = ["-std=gnu11", "-O1", "-fPIC", "-shared", "-pthread", f"-DALAYA_MOST={request.param}"]
            subprocess.run([compiler, *flags, *sources, "-o", str(built), "-lm"], check=True)
        library = kernel._typed(ctypes.CDLL(str(built)))
        monkeypatch.setattr(kernel, "_library", lambda: library)
    return int(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for third parties; our code takes its chance from a seam
    torch.manual_seed(0)


def _threads() -> set[str]:
    """Non-daemon threads other than the main one, as name and identity."""
    main = threading.main_thread()
    return {f"thread {t.name} ({t.ident})" for t in threading.enumerate() if t is not main and not t.daemon}


def _files() -> set[str]:
    """Open file descriptors, each with what it leads to: a number that was closed and used again is a new one."""
    folder = Path("/proc/self/fd")
    found = set()
    for fd in os.listdir(folder) if folder.is_dir() else ():
        try:
            target = os.readlink(folder / fd)
        except FileNotFoundError:  # the one that listed the folder
            continue
        if not target.startswith(("/dev/nvidia", "/dev/urandom")):  # CUDA and the C library open these once, for good
            found.add(f"file {fd} -> {target}")
    return found


@pytest.fixture(autouse=True, scope="session")
def _started_once() -> None:
    """Starts what third parties start at first use and keep, so that it counts as there before every test."""
    zarr.core.sync._get_loop()
    if torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call]


def _left(before: set[str], now: Callable[[], set[str]]) -> set[str]:
    """What is new since before, after a collection and a short wait for whatever is just ending."""
    if not now() - before:
        return set()
    gc.collect()
    deadline = time.monotonic() + 2.0
    while (new := now() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return new


@pytest.fixture(scope="session", autouse=True)
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary stores go where no other process's are: what those left would be removed in the middle of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALAYA_TIERS_DIR", str(tmp_path_factory.mktemp("stores")))
        yield


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test after which more files or threads are open than before; @pytest.mark.leaks("why") lets it be."""
    if request.node.get_closest_marker("leaks"):
        yield
        return
    files, threads = _files(), _threads()
    yield
    left = sorted(_left(threads, _threads) | _left(files, _files))
    if left:
        pytest.fail(f"left open by this test: {', '.join(left)}")
