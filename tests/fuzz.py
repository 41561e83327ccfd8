"""Bytes into everything that reads a store: python -m tests.fuzz [seconds]

With atheris, if it is installed (pip install atheris), guided by coverage; else by chance. Either way it begins with
the files of the golden store. ``one`` is what the tests call.
"""

import base64
import copy
import hashlib
import importlib
import json
import random
import re
import sys
import time
from typing import Any

import numpy as np

from alaya_tiers.coded import header_of, problem_of
from alaya_tiers.commit import load_generation, load_segment
from alaya_tiers.damage import shortened
from alaya_tiers.errors import AlayaError
from alaya_tiers.identity import segment_name
from alaya_tiers.manifest import Entry, Manifest, _digest
from alaya_tiers.repair import examine
from alaya_tiers.snapshot import Shelf
from alaya_tiers.tiers.zarr_format import FORMAT, shard_offsets
from alaya_tiers.verify import flaws
from tests.crash import CrashDisk
from tests.golden import FOLDER

GOLDEN = FOLDER / f"format-{FORMAT}"
ROOT = "/store"
NAME = "0" * 64
KINDS = ("root", "manifest", "record", "codes", "shard")


def seeds() -> dict[str, list[bytes]]:
    """Real files, by kind."""
    patterns = {"root": "zarr.json", "manifest": "generations/*/zarr.json", "record": "segments/?*/zarr.json",
                "codes": "segments/*/index", "shard": "**/c/0/0/0"}  # fmt: skip
    return {kind: [p.read_bytes() for p in sorted(GOLDEN.glob(pattern))] for kind, pattern in patterns.items()}


def one(kind: str, data: bytes) -> str:
    """Read data as a file of that kind; what came of it. Nothing but errors of ours may be raised."""
    try:
        if kind == "root":
            disk = CrashDisk({f"{ROOT}/zarr.json": data})
            Shelf(ROOT, None, disk).check()
        elif kind == "manifest":
            said = re.search(rb'"generation": *(\d{1,15})\b', data)
            number = int(said[1]) if said is not None else 7
            disk = CrashDisk({f"{ROOT}/generations/{number}/zarr.json": data})
            manifest = load_generation(disk, ROOT, number)
            for context in manifest.contexts:
                assert manifest.root(manifest.chain(context)[0]) in manifest.identities
            assert not shortened(manifest, manifest.segments).contexts
            examine(disk, ROOT, lambda done, of: None)
        elif kind == "record":
            _record(data)
        elif kind == "codes":
            disk = CrashDisk({f"{ROOT}/index": data})
            problem_of(disk, f"{ROOT}/index", NAME)
            header_of(disk, disk.open(f"{ROOT}/index", create=False, direct=False))
        else:
            shard_offsets(data[-68:], 4, 4096)
    except AlayaError:
        return "refused"
    except ValueError:
        if kind != "codes":  # whoever opens codes expects these
            raise
        return "refused"
    return "taken"


def _record(data: bytes) -> None:
    """As a record that its manifest vouches for: whatever it says of itself is what the manifest says of it."""
    sound = load_generation(CrashDisk(_manifest()), ROOT, 5)
    try:
        ours = json.loads(data)["attributes"]["alaya_tiers"]
        tokens = np.frombuffer(base64.b64decode(ours["tokens"]), "<i8").astype(np.int64)
        before, start, files = ours["before"], ours["start"], {f for x in ours["layers"].values() for f in x["files"]}
        name = segment_name(before, tokens)
        entry = Entry(before, start, tokens.size, hashlib.sha256(data).hexdigest(), tuple(sorted(files)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        name, entry = NAME, Entry(NAME, 0, 1, hashlib.sha256(data).hexdigest(), ())
    disk = CrashDisk({f"{ROOT}/segments/{name}/zarr.json": data})
    segment = load_segment(disk, ROOT, Manifest(5, sound.identities, {name: entry}, {}, sound.files), name)
    assert list(flaws(disk, ROOT, segment, 16)), "there are no blocks"


def _manifest() -> dict[str, bytes]:
    return {f"{ROOT}/generations/5/zarr.json": (GOLDEN / "generations" / "5" / "zarr.json").read_bytes()}


JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 7, 1 << 31, 1 << 62, 1 << 80, -(1 << 90), 0.5, 1e308, float("nan"), float("inf"), "",
    ".", "..", "../" * 20, "/etc/passwd", "session-00000000/../../x/layer_000", "A" * 5000, "\x00", "é" * 50, [], {},
    [[]] * 10, {"": {}}, [0] * 1000, json.loads("[" * 400 + "]" * 400), "0" * 64, "float99", "__class__",
]  # fmt: skip
"""What JSON may hold instead of what it should."""


def changed(rng: random.Random, data: bytes) -> bytes:
    """Another file: bytes changed, or, if it is JSON, a value replaced and the digests made to fit."""
    if rng.random() < 0.7 and data[:1] == b"{":
        return agreed(replaced(rng, json.loads(data)))
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(5):
            case 0:
                raw[at : at + 1] = rng.randbytes(1)
            case 1:
                del raw[at : at + rng.choice([1, 8, 512])]
            case 2:
                raw[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
            case 3:
                raw[at:at] = raw[: rng.choice([1, 16, 256])]
            case _:
                raw[at : at + 1] = bytes([raw[at] ^ 1 << rng.randrange(8)]) if at < len(raw) else b"{"
    return bytes(raw)


def replaced(rng: random.Random, value: Any) -> Any:
    """JSON with some value, at any depth, replaced, removed or doubled."""
    value = copy.deepcopy(value)
    here = value
    while isinstance(here, dict | list) and here:
        keys = sorted(here) if isinstance(here, dict) else range(len(here))
        key = rng.choice(list(keys))
        if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.15:
            if rng.random() < 0.1:
                del here[key]
            elif isinstance(here[key], str) and rng.random() < 0.3:
                text = here[key]
                at = rng.randrange(len(text) + 1)
                here[key] = text[:at] + rng.choice(["A", "=", "/", "..", "9" * 30, "\n"]) + text[at + 1 :]
            else:
                here[key] = copy.deepcopy(rng.choice(JUNK))
            break
        here = here[key]
    return value


def agreed(value: Any) -> bytes:
    """As a file, a manifest with a digest that fits."""
    try:
        ours = value["attributes"]["alaya_tiers"]
        if "manifest" in ours:
            ours["digest"] = _digest(ours["manifest"])
    except (KeyError, TypeError):
        pass
    return json.dumps(value).encode()


def main(seconds: float) -> None:
    real = seeds()

    def target(data: bytes) -> None:
        if data:
            one(KINDS[data[0] % len(KINDS)], data[1:])

    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        rng, count, until = random.Random(time.time_ns()), 0, time.monotonic() + seconds
        while time.monotonic() < until:
            kind = rng.choice(KINDS)
            data = changed(rng, rng.choice(real[kind]))
            try:
                one(kind, data)
            except BaseException:
                print(f"{kind}: {data!r}")
                raise
            count += 1
        print(f"{count:,} files, nothing but errors of ours")
        return
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={int(seconds)}"], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
