"""What nothing names: leftovers of work that came to no end, in a directory that its process holds."""

import os
from collections.abc import Iterator, Mapping

from alaya_tiers.commit import GENERATIONS, KEPT, SEGMENTS, numbers
from alaya_tiers.manifest import MOST_BYTES, Manifest
from alaya_tiers.seams import Disk
from alaya_tiers.tiers.zarr_format import attributes_of

LEFT = ("probe", "zarr.json.partial")
"""What a process that was killed may leave beside the rest."""

USAGE = "usage"
"""The folder of what was written and when (``alaya_tiers.wear``)."""


def leftovers(disk: Disk, root: str, manifest: Manifest, held: Mapping[int, Manifest]) -> Iterator[str]:
    """Files and folders that neither the manifest nor a flushed session names. held: older manifests somebody reads."""
    yield from uncounted(disk, root, manifest, held)
    names = disk.names(root)
    yield from (os.path.join(root, name) for name in names if name in LEFT)
    if USAGE in names:
        yield from (os.path.join(root, USAGE, name) for name in disk.names(os.path.join(root, USAGE)) if name in LEFT)
    wanted: dict[str, set[str]] = {}
    for name in [name for one in (manifest, *held.values()) for name in one.files]:
        session, folder, _ = name.split("/")
        wanted.setdefault(session, set()).add(folder)
    for session in filter(is_session, names):
        path = os.path.join(root, session)
        folders = wanted.get(session, set()) | _flushed(disk, path)
        if not folders:
            yield path
        else:
            unwanted = (n for n in disk.names(path) if n not in folders and n != "zarr.json")
            yield from (os.path.join(path, name) for name in unwanted)


def uncounted(disk: Disk, root: str, manifest: Manifest, held: Mapping[int, Manifest]) -> Iterator[str]:
    """Records and manifests that do not count any more. held: older manifests somebody reads."""
    needed = manifest.segments.keys() | {name for old in held.values() for name in old.segments}
    unwanted = [(SEGMENTS, n) for n in disk.names(os.path.join(root, SEGMENTS)) if n not in needed]
    for n in numbers(disk, root):
        if n not in held and not 0 <= manifest.generation - n < KEPT:
            unwanted.append((GENERATIONS, str(n)))
    for folder, name in unwanted:
        if name != "zarr.json" or not manifest.generation:
            yield os.path.join(root, folder, name)


def is_session(name: str) -> bool:
    """Whether a folder is that of one process's files."""
    return name.startswith("session-")


def _flushed(disk: Disk, path: str) -> set[str]:
    """Folders that ``flush`` wrote down for other Zarr readers; of a file that cannot be read, all there are."""
    names = disk.names(path)
    if "zarr.json" not in names:
        return set()
    try:
        data = attributes_of(disk.fetch(os.path.join(path, "zarr.json"), MOST_BYTES))
        contexts = data.get("alaya_tiers", {}).get("contexts", [])
        return {folder for c in contexts for folders in c["layers"].values() for folder in folders}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set(names)
