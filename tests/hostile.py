"""A process that opens stores of strangers, watched: python -m tests.hostile FOLDER COUNT SEED

Each store is the golden one, with something in it changed on purpose. It is opened, verified, read, stored to and
repaired. Watched are every file that is opened, every program or socket, pickle, memory and time. Prints JSON.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alaya_tiers.contexts import Contexts
from alaya_tiers.engine import Engine
from alaya_tiers.errors import AlayaError
from alaya_tiers.repair import examine, repair
from alaya_tiers.seams import SystemDisk
from tests.fuzz import GOLDEN, agreed, changed, replaced
from tests.golden import LAYERS, SETTINGS, TEXTS, kv, who

ROOM = 256 << 20
"""Bytes of memory beyond what there was before the first store."""

FORBIDDEN = (
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "subprocess.",
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen",
)  # fmt: skip
SYSTEM = tuple({"/proc/", "/sys/", "/dev/null", sys.prefix, sys.base_prefix, "/usr/", "/etc/localtime"})


class Watch:
    """An audit hook: what is opened, removed or written outside one folder, and what must not happen at all."""

    def __init__(self, root: Path, secret: Path) -> None:
        self.root, self.secret, self.on = str(root), str(secret), False
        self.violations: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(FORBIDDEN):
            self.violations.append(f"{event} {arguments!r}"[:200])
        elif event in ("open", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "os.mkdir", "os.truncate"):
            path = arguments[0]
            if not isinstance(path, str | bytes | os.PathLike):
                return
            flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
            if flags & os.O_PATH:  # asks what is there, and cannot read it
                return
            last = flags & os.O_NOFOLLOW or event in ("os.remove", "os.rmdir", "os.rename", "shutil.rmtree")
            name = os.fsdecode(path)
            if name == self.root or "/" not in name:  # the lock; what is in a folder that is open, as rmtree goes down
                return
            there = os.path.realpath(os.path.dirname(os.path.abspath(name))) if last else os.path.realpath(name)
            if not there.startswith((self.root, *SYSTEM)) or there.startswith(self.secret):
                self.violations.append(f"{event} {name}"[:200])


def pick(rng: random.Random, store: Path, pattern: str) -> Path:
    return rng.choice(sorted(p for p in store.glob(pattern) if p.is_file()))


def newest(store: Path) -> Path:
    return max(store.glob("generations/*/zarr.json"), key=lambda p: int(p.parent.name))


def lie_in_manifest(rng: random.Random, store: Path, outside: Path) -> None:
    path = newest(store)
    path.write_bytes(agreed(replaced(rng, json.loads(path.read_text()))))


def lie_in_record(rng: random.Random, store: Path, outside: Path) -> None:
    """A record that says another thing, and a manifest that vouches for it."""
    path = pick(rng, store, "segments/?*/zarr.json")
    data = agreed(replaced(rng, json.loads(path.read_text())))
    path.write_bytes(data)
    manifest = json.loads(newest(store).read_text())
    entry = manifest["attributes"]["alaya_tiers"]["manifest"]["segments"][path.parent.name]
    entry["digest"] = hashlib.sha256(data).hexdigest()
    newest(store).write_bytes(agreed(manifest))


def lie_in_codes(rng: random.Random, store: Path, outside: Path) -> None:
    """Codes whose header says another thing, and fits its digest."""
    path = pick(rng, store, "segments/*/index")
    raw = path.read_bytes()
    magic, _, length = raw[:128].split(b"\n")[0].split(b" ")
    header = json.dumps(replaced(rng, json.loads(raw[128 : 128 + int(length)]))).encode()
    line = b"%s %s %d\n" % (magic, hashlib.sha256(header).hexdigest().encode(), len(header))
    path.write_bytes(line.ljust(128, b"\0") + header + raw[128 + int(length) :])


def any_bytes(rng: random.Random, store: Path, outside: Path) -> None:
    for _ in range(rng.choice([1, 1, 3])):
        path = pick(rng, store, "**/*")
        path.write_bytes(changed(rng, path.read_bytes()))


def link(rng: random.Random, store: Path, outside: Path) -> None:
    """A file or folder that is a link out of the store, to one with the same contents."""
    path = rng.choice(sorted(p for p in store.rglob("*") if not p.is_symlink()))
    moved = outside / "moved"
    path.rename(moved)
    path.symlink_to(moved)


def hard_link(rng: random.Random, store: Path, outside: Path) -> None:
    path = pick(rng, store, "**/*")
    path.unlink()
    os.link(outside / "secret", path)


def odd_file(rng: random.Random, store: Path, outside: Path) -> None:
    """Something else where a file should be."""
    path = pick(rng, store, "**/*")
    path.unlink()
    match rng.randrange(4):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
            (path / "x").write_bytes(b"x")
        case 2:
            with path.open("wb") as file:
                file.truncate(1 << 40)
        case _:
            path.symlink_to(rng.choice(["/dev/zero", "/dev/stdin", str(path), "/etc/passwd", ".."]))


def odd_name(rng: random.Random, store: Path, outside: Path) -> None:
    """Names nobody gave."""
    where = rng.choice([store, store / "segments", store / "generations", pick(rng, store, "**/*").parent])
    name = rng.choice(
        ["x" * 200, "-rf", "99999999999999999", "007", "session-zzz", "a\nb", "é", "ZARR.JSON", "...", "9" * 17]
    )
    if rng.random() < 0.5:
        (where / name).mkdir(exist_ok=True)
        (where / name / "zarr.json").write_bytes(rng.randbytes(50))
    else:
        (where / name).symlink_to(outside)


TRICKS: list[Callable[[random.Random, Path, Path], None]] = [
    lie_in_manifest, lie_in_record, lie_in_codes, any_bytes, link, hard_link, odd_file, odd_name,
]  # fmt: skip


def use(store: Path, mode: str) -> None:
    """Everything one does with a store. Raises errors of ours only."""
    engine = Engine(SETTINGS.replace(mode=mode), str(store), None)
    try:
        contexts = Contexts(engine)
        for name in list(contexts.manifest.contexts)[:4]:
            try:
                for _ in contexts.read(name):
                    pass
            except AlayaError:
                continue
        contexts.verify()
    finally:
        engine.close()
    engine = Engine(SETTINGS.replace(mode=mode), str(store), None)
    try:
        contexts = Contexts(engine)
        text = np.concatenate([TEXTS["float32"][0], [1, 2]])
        contexts.load(text, [[kv(text, layer, "float32") for layer in range(LAYERS)]], who("float32"))
    finally:
        engine.close()


def case(rng: random.Random, store: Path, outside: Path, seen: Counter[str]) -> None:
    trick = rng.choice(TRICKS)
    trick(rng, store, outside)
    steps: list[Callable[[], None]] = [lambda: use(store, "sparse"), lambda: use(store, "exact"), lambda: mended(store)]
    for step in steps:
        try:
            step()
            seen["used"] += 1
        except AlayaError as error:
            seen[type(error).__name__] += 1


def mended(store: Path) -> None:
    found = examine(SystemDisk(), str(store), lambda done, of: None)
    repair(SystemDisk(), str(store), found)


def main(folder: Path, count: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    store, outside = folder / "store", folder / "outside"
    shutil.copytree(GOLDEN, store)
    use(store, "sparse")  # everything is imported, and started once
    use(store, "exact")
    mended(store)
    watch, seen, slowest, bad = Watch(store, outside), Counter[str](), 0.0, list[str]()
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + ROOM, resource.RLIM_INFINITY))
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(count):
        rng = random.Random(f"{seed} {n}")
        for place in (store, outside):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(GOLDEN, store)
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret" * 1000)
        (outside / "precious").write_bytes(b"precious")
        began = time.process_time()
        try:
            watch.on = True
            case(rng, store, outside, seen)
        except BaseException as error:
            bad.append(f"case {seed} {n}: {type(error).__name__}: {error}"[:300])
        finally:
            watch.on = False
        slowest = max(slowest, time.process_time() - began)
        if (outside / "precious").read_bytes() != b"precious" or (outside / "secret").read_bytes() != b"secret" * 1000:
            bad.append(f"case {seed} {n}: a file outside was changed")
        bad += [f"case {seed} {n}: {one}" for one in watch.violations]
        watch.violations.clear()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first) * 1024
    print(json.dumps({"stores": count, "seen": seen, "bad": bad, "slowest": slowest, "grown": grown}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
