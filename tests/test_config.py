"""Settings are checked once, and say what is wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alaya_tiers import AlayaError, Settings
from alaya_tiers.config import format_bytes, parse_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import EVICTION, GUESS, PREFETCH, by_name


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0), (4096, 4096), ("8GiB", 8 << 30), ("512 MiB", 512 << 20), ("1.5gib", 3 << 29), ("1GB", 10**9), ("7", 7)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", [-1, "-1GiB", "8 GiBs", "", "GiB", "1e9", None, 1.5, True, [1]])
def test_what_is_not_a_size(size: object) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(size)  # type: ignore[arg-type]


@given(st.integers(0, 1 << 60))
def test_sizes_for_people_are_close(n: int) -> None:
    assert abs(parse_bytes(format_bytes(n)) - n) <= 0.06 * n


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_tokens", 100),
        ("block_tokens", 0),
        ("block_tokens", 16384),
        ("segment_tokens", 3),
        ("dirty_limit", 1.5),
        ("prefetch_share", -0.1),
        ("io", "mmap"),
        ("mode", "approximate"),
        ("io_threads", 0),
        ("queue_depth", 0),
        ("queue_depth", 257),
        ("queue_depth", "deep"),
        ("sink_tokens", -1),
        ("host_budget", "lots"),
        ("batch_bytes", 0),
        ("alpha", "x"),
        ("alpha", None),
        ("dirty_limit", None),
        ("most_selected", 1.5),
        ("most_selected", "4MiB"),
        ("most_selected", True),
        ("index_sure", "high"),
        ("index_parts", -1.0),
        ("least_mass", "a"),
        ("attention_target", "5ms"),
        ("attention_target", True),
        ("read_rate", [1]),
        ("sparse_prefill", "yes"),
        ("measure_mass", 1),
        ("eviction", None),
        ("block_tokens", True),
    ],
)
def test_settings_that_make_no_sense_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field if field != "host_budget" else "lots"):
        Settings.from_dict({field: value})


def test_whole_numbers_are_numbers_and_none_is_no_limit() -> None:
    settings = Settings(alpha=1, dirty_limit=0, attention_target=2, index_sure=3, least_mass=None, most_selected=None)
    assert (settings.alpha, settings.attention_target, settings.index_sure) == (1, 2, 3)


def test_settings_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[alaya_tiers]\nhost_budget = "1GiB"\nblock_tokens = 64\neviction = "lru"\nqueue_depth = 32\n')
    settings = Settings.from_toml(file)
    assert settings.queue_depth == 32
    assert settings.replace(queue_depth=None) == settings.replace(queue_depth=Settings().queue_depth)
    assert (settings.host_budget, settings.block_tokens, settings.eviction) == (1 << 30, 64, "lru")
    assert settings.replace(block_tokens=128).block_tokens == 128
    file.write_text("host_bugdet = 1\n")
    with pytest.raises(ConfigError, match=r"host_bugdet.*known are.*host_budget"):
        Settings.from_toml(file)
    file.write_text("not toml")
    with pytest.raises(ConfigError, match=r"settings\.toml"):
        Settings.from_toml(file)
    with pytest.raises(ConfigError, match="missing"):
        Settings.from_toml(tmp_path / "missing.toml")


def test_policies_by_name() -> None:
    for known in (EVICTION, PREFETCH, GUESS):
        for name, policy in known.items():
            assert by_name(known, name) == policy()
    with pytest.raises(ConfigError, match="known are cost, heat, lru, s3fifo, scan"):
        by_name(EVICTION, "fifo")
    assert issubclass(ConfigError, AlayaError)
