"""What a cache does, for Prometheus: a collector for a registry of one's own, read when it is scraped.

registry = CollectorRegistry()
registry.register(Metrics(cache, cache="chat"))
start_http_server(8000, registry=registry)
"""

import importlib
import weakref
from collections.abc import Iterator
from typing import Any

from alaya_tiers.errors import ConfigError
from alaya_tiers.pace import BOUNDS
from alaya_tiers.stats import Source, Stats, Touched

PREFIX = "alaya_tiers_"


class Metrics:
    """A collector of prometheus_client. source: whose numbers; not kept alive, and once gone there are none.

    labels: put on every sample, to tell several caches of a process apart. Raises ConfigError where prometheus_client
    is not installed, or for a label that is used here already.
    """

    def __init__(self, source: Source, **labels: str) -> None:
        try:
            self._core: Any = importlib.import_module("prometheus_client.core")
        except ImportError as error:
            raise ConfigError(
                "metrics need the Prometheus client: pip install 'alaya-tiers[metrics]' or prometheus-client"
            ) from error
        if taken := {"tier", "found", "queue", "guess"} & labels.keys():
            raise ConfigError(f"the label {taken.pop()!r} is used by the metrics themselves; choose another name")
        self._source = weakref.ref(source)
        self._labels = labels

    def collect(self) -> Iterator[Any]:
        """The families of now; what prometheus_client calls."""
        source = self._source()
        if source is None:
            return
        stats = source.stats()
        yield from self._tiers(stats)
        yield from self._counters(stats)
        yield from self._ratios(stats)
        yield from self._pages(stats)
        yield self._tpot(stats)

    def _tiers(self, stats: Stats) -> Iterator[Any]:
        tiers = stats.tiers
        yield self._gauge("tier_used_bytes", "bytes of a tier in use", "tier", {n: t.used for n, t in tiers.items()})
        yield self._gauge("tier_peak_bytes", "the most there were", "tier", {n: t.peak for n, t in tiers.items()})
        limits = {n: t.budget for n, t in tiers.items() if t.budget is not None}
        yield self._gauge("tier_budget_bytes", "bytes a tier may take; none without a limit", "tier", limits)
        queues = stats.queues
        under_way = {"reading": queues.reading, "writing": queues.writing, "dirty": queues.dirty}
        yield self._gauge("queue_bytes", "being read, being written, waiting to be written", "queue", under_way)
        yield self._gauge("pinned_bytes", "blocks that may not be moved now", None, {"": queues.pinned})
        yield self._gauge("waiting_calls", "calls that sleep until a queue gets shorter", None, {"": queues.waiting})
        yield self._gauge("queue_depth", "single pages that each thread reads at once", None, {"": queues.depth})
        yield self._gauge("context_tokens", "tokens held", None, {"": stats.tokens})
        yield self._gauge("context_bytes", "keys and values of these tokens", None, {"": stats.kv_bytes})

    def _counters(self, stats: Stats) -> Iterator[Any]:
        found = {name: getattr(stats.touched, name) for name in Touched.__slots__}
        yield self._counter("attended_bytes", "read by attention, by where it was found", "found", found)
        for name, text, value in (
            ("ssd_read_bytes", "read from ssd", stats.read_bytes),
            ("ssd_read_ahead_bytes", "of these, before attention asked", stats.read_ahead_bytes),
            ("ssd_written_bytes", "blocks written to ssd", stats.written_bytes),
            ("disk_written_bytes", "all that was written, metadata and padding too", stats.disk_written_bytes),
            ("waited_seconds", "attention and new tokens waited for storage", stats.waited_seconds),
            ("stalled_seconds", "of these, new tokens waited for older ones to be written", stats.stalled_seconds),
            ("stalls", "times new tokens waited", stats.stalls),
            ("prefill_tokens", "tokens of prompts processed", stats.steps.prefill_tokens),
            ("prefill_seconds", "time that took", stats.steps.prefill_seconds),
            ("gathered", "times a full K and V was made because some code looked inside", stats.gathered),
        ):
            yield self._counter(name, text, None, {"": value})

    def _ratios(self, stats: Stats) -> Iterator[Any]:
        """Since the start; for those of the last minutes, divide rates of the counters."""
        yield self._gauge("hit_ratio", "attended bytes that were in memory", None, {"": stats.hit_rate})
        yield self._gauge("io_hidden_ratio", "bytes from ssd read before attention asked", None, {"": stats.io_hidden})
        text = "bytes read ahead that attention asked for"
        yield self._gauge("prefetch_precision_ratio", text, None, {"": stats.prefetch_precision})
        if (sparse := stats.sparse) is not None and sparse.steps:
            text = "attention mass attended and not estimated, mean"
            yield self._gauge("recovered_mass_ratio", text, None, {"": sparse.recovered / sparse.steps})
            text = "tokens attended of those visible"
            yield self._gauge("attended_ratio", text, None, {"": sparse.attended / max(1, sparse.visible)})

    def _pages(self, stats: Stats) -> Iterator[Any]:
        """Single pages of cold blocks, where they are read."""
        if (pages := stats.pages) is None:
            return
        for name in ("wanted", "missed", "evicted", "wasted"):
            yield self._counter(f"pages_{name}", "single pages of cold blocks", None, {"": getattr(pages, name)})
        for name, by in (("guessed", pages.guessed), ("used", pages.used)):
            yield self._counter(f"pages_{name}", "pages read ahead, by what suggested them", "guess", dict(by))
        yield self._counter("pages_lead_seconds", "how long before they were wanted", None, {"": pages.lead_seconds})
        yield self._counter("pages_in_time", "pages read ahead that were there in time", None, {"": pages.in_time})

    def _tpot(self, stats: Stats) -> Any:
        histogram = stats.steps.decoding
        family = self._core.HistogramMetricFamily(
            f"{PREFIX}time_per_token_seconds", "of tokens decoded one by one", labels=list(self._labels)
        )
        reached, buckets = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), histogram.counts, strict=True):
            reached += count
            buckets.append((bound, reached))
        family.add_metric(list(self._labels.values()), buckets, histogram.seconds)
        return family

    def _gauge(self, name: str, text: str, label: str | None, values: dict[str, Any]) -> Any:
        return self._family(self._core.GaugeMetricFamily, name, text, label, values)

    def _counter(self, name: str, text: str, label: str | None, values: dict[str, Any]) -> Any:
        return self._family(self._core.CounterMetricFamily, name, text, label, values)

    def _family(self, kind: Any, name: str, text: str, label: str | None, values: dict[str, Any]) -> Any:
        """One sample for each value; its key is what the label says."""
        family = kind(PREFIX + name, text, labels=[*self._labels, *([] if label is None else [label])])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), *([] if label is None else [key])], value)
        return family
