"""What is shown and scraped while a cache works: from numbers made by hand, then from a cache."""

import gc
import io
import sys
from dataclasses import replace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from alaya_tiers import AlayaCache
from alaya_tiers.errors import ConfigError
from alaya_tiers.live import Screen, curve, live
from alaya_tiers.metrics import Metrics
from alaya_tiers.pace import BOUNDS, PREFILL, Histogram, Meter, Steps
from alaya_tiers.stats import PageUse, Queues, SparseUse, Stats, TierUse, Touched
from tests.tiny import prompt, small_cache, tiny

MIB = 1 << 20


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Fake:
    """A source of numbers that are made by hand."""

    def __init__(self, stats: Stats) -> None:
        self.now = stats

    def stats(self) -> Stats:
        return self.now


def numbers() -> Stats:
    steps = Steps(prefill_tokens=1000, prefill_seconds=2.0)
    for seconds in (0.015, 0.018, 0.040, 70.0):
        steps.decoding.note(seconds)
    return Stats(
        tokens=12_345,
        kv_bytes=100 * MIB,
        tiers={"device": TierUse(8 * MIB, 4 * MIB, 6 * MIB), "host": TierUse(16 * MIB, 16 * MIB, 16 * MIB),
               "ssd": TierUse(None, 90 * MIB, 90 * MIB)},
        touched=Touched(device=50, host=25, ahead=15, waited=10),
        read_bytes=30 * MIB,
        read_ahead_bytes=30,
        written_bytes=90 * MIB,
        waited_seconds=1.5,
        gathered=0,
        gathered_bytes=0,
        direct_io=True,
        sparse=SparseUse(steps=10, attended=20, visible=1000, recovered=9.7, least=0.81),
        pages=PageUse(200, 20, guessed={"last": 50, "hot": 10}, used={"last": 40}, in_time=4, lead_seconds=2),
        stalls=3,
        stalled_seconds=0.5,
        queues=Queues(reading=2 * MIB, writing=3 * MIB, dirty=5 * MIB, waiting=2),
        steps=steps,
    )  # fmt: skip


def shown(renderable: object, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text()


class TestPace:
    def test_buckets_hold_what_is_at_most_their_bound(self) -> None:
        histogram = Histogram()
        for seconds in (0.001, 0.0011, 0.002, 1000.0):
            histogram.note(seconds)
        assert histogram.counts[:2] == [1, 2]
        assert histogram.counts[-1] == 1
        assert histogram.count == 4
        assert histogram.mean == pytest.approx(1000.0041 / 4)

    def test_quantiles_are_within_a_bucket(self) -> None:
        histogram = Histogram()
        assert histogram.quantile(0.5) == 0.0
        for _ in range(10):
            histogram.note(0.015)
        assert 0.01 < histogram.quantile(0.5) <= 0.02
        histogram.note(1000.0)
        assert histogram.quantile(1.0) == BOUNDS[-1]

    def test_a_step_is_from_first_layer_to_first_layer(self) -> None:
        steps, clock = Steps(), Hand()
        meter = Meter(steps, clock)
        for _ in range(3):
            for layer in (4, 7):
                meter.begins(layer, 1)
                clock.now += 0.1
                meter.attended()
        assert steps.decoding.count == 2
        assert steps.decoding.seconds == pytest.approx(0.4)
        assert steps.prefill_rate is None

    def test_a_pause_after_a_prompt_counts_as_nothing(self) -> None:
        steps, clock = Steps(), Hand()
        meter = Meter(steps, clock)
        for _ in range(2):
            for layer in (0, 1):
                meter.begins(layer, PREFILL)
                clock.now += 0.5
                meter.attended()
            clock.now += 100
        meter.begins(0, 1)
        assert steps.prefill_tokens == 2 * PREFILL
        assert steps.prefill_seconds == pytest.approx(2.0)
        assert steps.decoding.count == 0

    def test_tokens_that_nobody_attends_to_are_no_prompt(self) -> None:
        """An import, a copy of another cache."""
        steps, clock = Steps(), Hand()
        meter = Meter(steps, clock)
        for _ in range(3):
            meter.begins(0, 100)
            clock.now += 1
        assert steps.prefill_tokens == 0


class TestScreen:
    def test_says_all_of_it_on_one_screen(self) -> None:
        text = shown(Screen(Hand()).draw(numbers()))
        for words in (
            "12,345 tokens", "100.0 MiB", "no limit", "50.0%", "hit rate 90.0%", "IO hidden 60.0%",
            "30 B, 50.0% of it was asked for", "2.0 MiB being read", "5.0 MiB to be written; 2 waiting",
            "1.50 s, of which 0.50 s in 3 stalls", "attended 2.00%", "97.0% of the mass, 81.0% at least", "4 tokens",
            "500 tokens/s", "90.0% were there; read ahead: 67% of the others, right: last 80%, hot 0%",
        ):  # fmt: skip
            assert words in text, words
        assert len(text.splitlines()) < 20
        assert len(shown(Screen(Hand()).draw(numbers()), width=80).splitlines()) < 24

    def test_rates_are_of_the_time_between_two_screens(self) -> None:
        clock = Hand()
        screen, stats = Screen(clock), numbers()
        assert "reads 0 B/s" in shown(screen.draw(stats))
        clock.now += 2
        later = replace(stats, read_bytes=stats.read_bytes + 8 * MIB, written_bytes=stats.written_bytes + 2 * MIB)
        text = shown(screen.draw(later))
        assert "reads 4.0 MiB/s" in text
        assert "writes 1.0 MiB/s" in text

    def test_a_curve_shows_small_counts_too(self) -> None:
        histogram = Histogram()
        for seconds in [0.015] * 1000 + [0.1]:
            histogram.note(seconds)
        assert curve(histogram) == "10 ms █ ▁ 100 ms"

    def test_nothing_yet_is_no_error(self) -> None:
        empty = replace(numbers(), touched=Touched(), read_ahead_bytes=0, sparse=None, steps=Steps())
        assert "hit rate" not in shown(Screen(Hand()).draw(empty))

    def test_elsewhere_than_on_a_terminal_the_last_screen_is_printed(self) -> None:
        out = io.StringIO()
        source = Fake(replace(numbers(), tokens=1))
        with live(source, Console(file=out, width=120)):
            source.now = numbers()
        assert out.getvalue().count("12,345 tokens") == 1
        assert "1 tokens" not in out.getvalue()


def samples(registry: CollectorRegistry) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def one(values: dict[frozenset[tuple[str, str]], float], **labels: str) -> float:
    return values[frozenset(labels.items())]


class TestMetrics:
    def test_a_scrape_has_every_number_with_its_unit(self) -> None:
        registry, source = CollectorRegistry(), Fake(numbers())
        registry.register(Metrics(source, cache="chat"))
        found = samples(registry)
        assert all(name.startswith("alaya_tiers_") for name in found)
        assert one(found["alaya_tiers_tier_used_bytes"], cache="chat", tier="host") == 16 * MIB
        assert frozenset({("cache", "chat"), ("tier", "ssd")}) not in found["alaya_tiers_tier_budget_bytes"]
        assert one(found["alaya_tiers_attended_bytes_total"], cache="chat", found="ahead") == 15
        assert one(found["alaya_tiers_queue_bytes"], cache="chat", queue="dirty") == 5 * MIB
        assert one(found["alaya_tiers_hit_ratio"], cache="chat") == pytest.approx(0.9)
        assert one(found["alaya_tiers_io_hidden_ratio"], cache="chat") == pytest.approx(0.6)
        assert one(found["alaya_tiers_prefetch_precision_ratio"], cache="chat") == pytest.approx(0.5)
        assert one(found["alaya_tiers_recovered_mass_ratio"], cache="chat") == pytest.approx(0.97)
        assert one(found["alaya_tiers_stalls_total"], cache="chat") == 3
        assert one(found["alaya_tiers_pages_missed_total"], cache="chat") == 20
        assert one(found["alaya_tiers_pages_used_total"], cache="chat", guess="last") == 40
        buckets = found["alaya_tiers_time_per_token_seconds_bucket"]
        assert one(buckets, cache="chat", le="0.01") == 0
        assert one(buckets, cache="chat", le="0.02") == 2
        assert one(buckets, cache="chat", le="50.0") == 3
        assert one(buckets, cache="chat", le="+Inf") == 4
        assert one(found["alaya_tiers_time_per_token_seconds_count"], cache="chat") == 4

    def test_a_cache_that_is_gone_has_no_numbers(self) -> None:
        registry, source = CollectorRegistry(), Fake(numbers())
        registry.register(Metrics(source))
        assert samples(registry)
        del source
        gc.collect()
        assert not samples(registry)

    def test_without_the_client_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
        with pytest.raises(ConfigError, match=r"pip install 'alaya-tiers\[metrics\]'"):
            Metrics(Fake(numbers()))

    def test_its_own_labels_cannot_be_taken(self) -> None:
        with pytest.raises(ConfigError, match="'tier'"):
            Metrics(Fake(numbers()), tier="x")


@pytest.mark.slow
class TestCache:
    @pytest.fixture
    @staticmethod
    def cache() -> "AlayaCache":
        return small_cache(tiny())

    def test_what_a_cache_says_adds_up(self, cache: AlayaCache) -> None:
        model = tiny()
        model.set_attn_implementation("alaya")
        registry = CollectorRegistry()
        registry.register(Metrics(cache))
        out = io.StringIO()
        with cache, live(cache, Console(file=out, width=120)), torch.no_grad():
            model.generate(prompt(), past_key_values=cache, max_new_tokens=9, prefill_chunk_size=32)
            stats = cache.stats()
            assert stats.steps.decoding.count == 7, "eight tokens were decoded one by one, between which are seven"
            assert stats.steps.prefill_tokens == 90
            assert stats.steps.prefill_seconds > 0
            assert stats.stalls > 0, "the host tier is at its floor: new tokens wait for the disk"
            assert 0 < stats.stalled_seconds <= stats.waited_seconds
            scraped = samples(registry)
            assert one(scraped["alaya_tiers_context_tokens"]) == 98
            assert one(scraped["alaya_tiers_ssd_written_bytes_total"]) == stats.written_bytes > 0
            assert stats.as_dict()["steps"]["tpot"]["count"] == 7
        assert "98 tokens" in out.getvalue()
        assert cache.stats().queues == Queues()

    def test_queues_hold_what_is_dirty(self, cache: AlayaCache) -> None:
        model = tiny()
        model.set_attn_implementation("alaya")
        with cache, torch.no_grad():
            model(input_ids=prompt(n=90), past_key_values=cache)
            mover = cache.session.engine.mover
            cache.session.engine._wait(mover.flush())
            assert cache.stats().queues == Queues()
            with mover.lock:  # the writer cannot start
                victims = mover.ledger.demotable_ids()[:2]
                assert mover.demote(victims)
                assert cache.stats().queues == Queues(dirty=2 * mover.host.slot_bytes)
