"""Power is lost at any point of any work on a store: what was stored is whole, the rest was never there.

More than the usual figures: ALAYA_TIERS_CRASH_IMAGES=200 (random images for each operation).
"""

import os
import random
import time

import pytest

from alaya_tiers.leftovers import USAGE
from tests.crash import CrashDisk
from tests.images import WORKLOADS, Recorder, Surveyor, record, violations
from tests.test_crash import ROOT, Base, check_kv

IMAGES = int(os.environ.get("ALAYA_TIERS_CRASH_IMAGES", "30"))
USUAL = 20_000
"""Images of the normal suite, at least."""


@pytest.mark.slow
@pytest.mark.timeout(600 if IMAGES < 100 else 36_000)
def test_after_a_crash_at_any_operation_what_was_stored_is_whole() -> None:
    images, operations, began = 0, 0, time.monotonic()
    for name in WORKLOADS:
        recorder, _ = record(name, IMAGES)
        problems = violations(recorder, Surveyor())
        assert not problems, f"{name}: {len(problems)} of {len(recorder.found)} images: {problems[0]}"
        assert recorder.acked.known, f"{name} stores nothing"
        images, operations = images + len(recorder.found), operations + recorder.operations
    print(f"{len(WORKLOADS)} workloads, {operations} operations, {images} images, {time.monotonic() - began:.1f} s")
    assert images >= min(USUAL, operations * IMAGES // 4)


@pytest.mark.slow
def test_what_the_quick_look_says_the_slow_one_says_too() -> None:
    """The quick one never attends: a few images are read as a session reads them."""
    for name in WORKLOADS:
        recorder, _ = record(name, 1)
        for _, image in random.Random(0).sample(list(recorder.found.values()), 8):
            base = Base(CrashDisk(image))
            found = {n: base.contexts.tokens(n).tolist() for n in base.contexts.manifest.contexts}
            assert {one.kind for one in base.contexts.verify()} <= {"index"}, "only what can be made again may be torn"
            for context in found:
                check_kv(base, context)
            base.close()
            assert found == Surveyor().survey(image)


@pytest.mark.slow
@pytest.mark.timeout(600 if IMAGES < 100 else 36_000)
def test_after_a_crash_while_recovering_from_a_crash_too() -> None:
    """Opening only removes what does not count, so it may be interrupted anywhere."""
    images, began = 0, time.monotonic()
    for name in WORKLOADS:
        recorder, _ = record(name, 2)
        surveyor = Surveyor()
        some = random.Random(1).sample(list(recorder.found.values()), min(4 * IMAGES // 3, len(recorder.found)))
        for acked, image in some:
            again, disk = Recorder(2), CrashDisk(image)
            again.acknowledge(acked)
            again.texts = recorder.texts
            disk.after_each = again
            Base(disk).close()
            disk.after_each = lambda _: None
            images += len(again.found)
            assert not violations(again, surveyor), name
    print(f"{images} images, {time.monotonic() - began:.1f} s")
    assert images >= 10 * IMAGES * len(WORKLOADS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["store", "delete", "lend"])
def test_every_barrier_of_a_commit_is_needed(name: str) -> None:
    """The images have teeth: without any one sync, or the rename, some of them lose or tear what was acknowledged.

    But for those of the usage file, which is no part of a commit: one that cannot be read never was.
    """
    whole, whole_disk = record(name, 0)
    needed = [i for i, what in enumerate(whole_disk.barriers) if what and f"/{USAGE}/" not in what]
    unnoticed, tried = [], len(needed)
    for number in needed:
        for seed, images in enumerate((0, 2, 8, 8, 8)):
            recorder, disk = record(name, images, skip=number, seed=seed)
            recorder.texts |= whole.texts
            if violations(recorder, Surveyor(), most=1):
                break
        else:
            unnoticed.append(disk.barriers[number].removeprefix(ROOT))
    print(f"{name}: {tried} barriers, {tried - len(unnoticed)} are missed")
    assert not unnoticed, f"nobody notices that one of these is missing: {unnoticed}"
