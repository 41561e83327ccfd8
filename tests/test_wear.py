"""SSD wear: what is written is counted, by day and context; what is over the budget is refused; nothing goes twice."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from alaya_tiers import DB, AlayaCache
from alaya_tiers.errors import ConfigError, OutOfSpace, WriteBudgetSpent
from alaya_tiers.manifest import Context, Entry, Manifest
from alaya_tiers.policies import REUSE, ReuseView, by_name
from alaya_tiers.testing_world import SimDisk, SimFile
from alaya_tiers.wear import Day, Wear, counted, written_for
from tests.tiny import BLOCK, SMALL, prompt, small_cache, tiny

KIB = 1 << 10


class Calendar:
    """A date that is changed by hand."""

    def __init__(self) -> None:
        self.date = "2030-01-01"

    def __call__(self) -> str:
        return self.date


class TestCounting:
    def test_all_that_is_written_counts_for_its_day(self) -> None:
        today = Calendar()
        wear = Wear(today=today)
        disk = counted(SimDisk(random.Random(0)), wear)
        handle = disk.open("/a/file", create=True, direct=False)
        assert disk.write(handle, [memoryview(b"abc"), memoryview(b"de")], 0) == 5
        disk.close(handle)
        today.date = "2030-01-02"
        wear.admit(4096)
        wear.settle(4096, 3)
        wear.wrote(7)
        assert wear.days == {"2030-01-01": Day(5, 0), "2030-01-02": Day(7, 3)}
        assert wear.days["2030-01-02"].amplification == pytest.approx(7 / 3)
        assert disk.fetch("/a/file", 10) == b"abcde", "all else is the other disk's"

    async def test_small_files_count_too(self) -> None:
        wear = Wear(today=Calendar())
        await counted(SimDisk(random.Random(0)), wear).save("/a", b"1234")
        assert wear.disk_bytes == 4

    def test_the_budget_is_a_days(self) -> None:
        today = Calendar()
        wear = Wear(100, today)
        wear.wrote(50)
        wear.admit(40)
        with pytest.raises(WriteBudgetSpent, match=r"100 B a day is used up: 90 B .* raise write_budget"):
            wear.admit(20)
        wear.settle(40, 0)  # it was given up
        wear.admit(50)
        wear.settle(50, 50)
        wear.wrote(50)
        with pytest.raises(OutOfSpace):
            wear.admit(1)
        today.date = "2030-01-02"
        wear.admit(100)

    def test_numbers_outlive_the_process_and_what_cannot_be_read_never_was(self, tmp_path: Path) -> None:
        disk, wear = SimDisk(random.Random(0)), Wear(today=Calendar())
        wear.wrote(5)
        wear.save(disk, "/store")
        assert not disk.files, "where nothing is stored nothing is left"
        disk.files["/store/zarr.json"] = SimFile(bytearray(b"{}"))
        wear.prefill["weights"] = 0.25
        wear.save(disk, "/store")
        again = Wear()
        again.load(disk, "/store")
        assert again.days == {"2030-01-01": Day(5, 0)}
        assert again.prefill == {"weights": 0.25}
        whole = bytes(disk.files["/store/usage/zarr.json"].data)
        for damaged in (b"", whole[:-9], whole.replace(b": 5", b": -5"), whole.replace(b": 5", b': "x"'), b"[]"):
            disk.files["/store/usage/zarr.json"].data[:] = damaged
            torn = Wear()
            torn.load(disk, "/store")
            assert torn.days == {}, damaged

    def test_a_file_counts_for_the_oldest_context_that_has_it(self) -> None:
        entry = Entry("root", 0, 10, "digest", ("f1", "f2"))
        longer = Entry("a", 10, 5, "digest", ("f3",))
        contexts = {"b": Context("b", 15, 2.0), "a": Context("a", 10, 1.0)}
        manifest = Manifest(1, {}, {"a": entry, "b": longer}, contexts, {"f1": 100, "f2": 20, "f3": 3})
        assert written_for(manifest) == {"a": 120, "b": 3}


@pytest.mark.slow
class TestCache:
    def fill(self, model: Any, cache: AlayaCache) -> None:
        """More blocks than any test here has room for."""
        for _ in range(49):
            model(input_ids=prompt(n=BLOCK), past_key_values=cache)

    def test_what_is_over_the_budget_stays_in_memory_and_then_is_an_error(self) -> None:
        model = tiny()
        model.set_attn_implementation("alaya")
        run = 3 * 2 * 4096  # a run of blocks of every layer, in whole pages
        with small_cache(model, write_budget=4 * run) as cache, torch.no_grad():
            for _ in range(2):  # again, as soon as memory is full again
                with pytest.raises(WriteBudgetSpent, match="write_budget"):
                    self.fill(model, cache)
            length = cache.get_seq_length()
            assert 4 * BLOCK <= length < 50 * BLOCK
            stats = cache.stats()
            assert 0 < stats.disk_written_bytes <= 4 * run
            assert stats.tiers["host"].used > 0
            for layer in range(3):  # all of it is still there, and what is on ssd can be read
                assert cache.session.read(layer, 0, length)[0].shape[2] == length
            cache.session.engine.mover.ledger.check_integrity()

    def test_what_stands_beside_blocks_is_admitted_with_the_first_of_a_file(self) -> None:
        """Digests of pages, the index of a shard, metadata: counted before they are written, and never twice."""
        model = tiny()
        model.set_attn_implementation("alaya")
        with small_cache(model, write_budget=1 << 30) as cache, torch.no_grad():
            wear = cache.session.engine.wear
            for times, tokens in enumerate((20 * BLOCK, 2 * BLOCK + 3, 1), 1):
                model(input_ids=prompt(n=tokens), past_key_values=cache)
                cache.flush()
                files = [file for file in cache.session.engine.mover.ssd.files if file.live]
                assert all(file.published and file.admitted == 0 for file in files if file.written)
                assert wear._admitted == sum(file.admitted for file in files)
                blocks = sum(file.written * file.stride for file in files)
                assert blocks < wear.disk_bytes <= blocks + times * sum(file.beside for file in files)
            model(input_ids=prompt(n=20 * BLOCK), past_key_values=cache)
        assert wear._admitted == 0, "what was never written is given up on closing"

    def test_clean_copies_are_dropped_and_never_written_again(self) -> None:
        model = tiny()
        model.set_attn_implementation("alaya")
        with small_cache(model) as cache, torch.no_grad():
            model(input_ids=prompt(n=120), past_key_values=cache)
            for _ in range(BLOCK):
                model(input_ids=prompt(n=1), past_key_values=cache)
            stats = cache.stats()
            block = BLOCK * 2 * 16 * 4
            assert stats.read_bytes > 3 * stats.kv_bytes, "every block came and went several times"
            assert stats.written_bytes <= 128 // BLOCK * 3 * 2 * block, "and was written at most once"


@pytest.fixture
def settings() -> dict[str, Any]:
    budgets = {"device_budget": "4MiB", "host_budget": "4MiB"}
    return budgets | {"block_tokens": 256, "segment_tokens": 1024, "io": "buffered"}


class TestStore:
    def test_a_context_costs_hardly_more_than_its_bytes_and_nothing_the_second_time(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        model = tiny(num_attention_heads=4, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096)
        k, v = torch.randn(2, 1, 4, 2048, 64).unbind()
        kv = [(k, v)] * 3
        ids = torch.arange(2048) % 90
        with DB(tmp_path / "db", model=model, **settings) as db:
            name = db.import_context(ids, kv)
            stats, usage = db.stats(), db.usage()
            size = 3 * 2 * k.nbytes
            assert stats.written_bytes == size
            assert stats.write_amplification <= 1.05
            assert usage.contexts == {name: size}
            assert usage.days[usage.today] == Day(stats.disk_written_bytes, size)
            db.import_context(ids, kv)
            assert db.stats().disk_written_bytes - stats.disk_written_bytes < 16 * KIB
            session, _ = db.create_session(torch.cat([ids, ids[:1]]))
            db.store(session, ids)
            assert db.stats().written_bytes == size
            before = db.usage()
        with DB(tmp_path / "db", model=model, **settings) as db:
            again = db.usage()
            assert again.contexts == {name: size}
            assert again.days[usage.today].blocks == size
            assert again.days[usage.today].disk >= before.days[usage.today].disk
            assert json.loads(json.dumps(again.as_dict()))["days"][usage.today]["amplification"] <= 1.05

    def test_the_budget_holds_across_processes(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        model = tiny(num_attention_heads=4, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096)
        k, v = torch.randn(2, 1, 4, 1024, 64).unbind()
        kv, size = [(k, v)] * 3, 3 * 2 * k.nbytes
        settings["write_budget"] = size + size // 2
        with DB(tmp_path / "db", model=model, **settings) as db:
            first = db.import_context(torch.arange(1024) % 90, kv)
        with DB(tmp_path / "db", model=model, **settings) as db:
            with pytest.raises(WriteBudgetSpent):
                db.import_context(torch.arange(1024) % 80, kv)
            assert [c.id for c in db.contexts()] == [first]
            assert not db.verify()
        with DB(tmp_path / "db", model=model, **settings | {"write_budget": None}) as db:
            db.import_context(torch.arange(1024) % 80, kv)


class TestReuse:
    def test_what_is_faster_is_done(self) -> None:
        slow_disk = ReuseView(tokens=100, cold_bytes=1000, ssd_rate=10.0, prefill=0.5)
        auto = by_name(REUSE, "auto").decide(slow_disk)
        assert not auto.reused
        assert (auto.load_seconds, auto.compute_seconds) == (100.0, 50.0)
        assert auto.why == "computed again: reading takes 100 s and computing 50 s or more"
        fast = by_name(REUSE, "auto").decide(ReuseView(100, 1000, 1e6, 0.5))
        assert fast.reused
        assert fast.why.startswith("reused: reading takes 0.001 s")
        unknown = by_name(REUSE, "auto").decide(ReuseView(100, 1000, 10.0, None))
        assert unknown.reused
        assert "no prefill was measured" in unknown.why
        assert by_name(REUSE, "always").decide(slow_disk).reused
        assert not by_name(REUSE, "never").decide(ReuseView(100, 0, 1e9, 5.0)).reused
        for name in REUSE:
            assert not by_name(REUSE, name).decide(ReuseView(0, 0, 1e9, None)).reused

    @pytest.mark.slow
    def test_a_session_says_what_was_decided(self, tmp_path: Path) -> None:
        model, ids = tiny(), prompt(n=64)
        model.set_attn_implementation("alaya")
        small = SMALL | {"device_budget": "1MiB", "host_budget": "1MiB"}
        tokens = []
        with DB(tmp_path / "db", model=model, **small) as db:
            session, _ = db.create_session(ids)
            assert session.reuse.why == "nothing that is stored begins as the prompt does"
            tokens.append(model.generate(ids, past_key_values=session, max_new_tokens=4))
            db.store(session)
        for rate, reuse in itertools.product((1.0, 1e12), ("auto", "always", "never")):
            with DB(tmp_path / "db", model=model, ssd_rate=rate, **small) as db:
                session, rest = db.create_session(ids, reuse=reuse)
                wanted = reuse == "always" or (reuse == "auto" and rate > 1)
                assert session.reuse.reused == wanted
                assert rest.shape[1] == (1 if wanted else 64)
                assert session.reuse.load_seconds == 8 * 3 * 2 * 1024 / rate, "of all blocks: none is in memory"
                assert session.reuse.compute_seconds is not None, "measured when the context was stored"
                assert session.stats().reuse == session.reuse.why
                tokens.append(model.generate(ids, past_key_values=session, max_new_tokens=4))
        assert all(one.equal(tokens[0]) for one in tokens)

    def test_an_unknown_word_is_refused(self, tmp_path: Path) -> None:
        with DB(tmp_path / "db", **SMALL) as db, pytest.raises(ConfigError, match="always, auto, never"):
            db.create_session([1, 2, 3], reuse="maybe")
