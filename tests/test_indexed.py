"""The index of a stored context: loaded instead of made, and made again where it cannot be believed."""

import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from alaya_tiers import DB, contexts
from alaya_tiers.cache import Visible
from alaya_tiers.coded import MAGIC
from alaya_tiers.errors import ConfigError, InputError
from alaya_tiers.partitions import Partitions
from alaya_tiers.tools import cli
from tests.test_sparse import deepseek
from tests.tiny import tiny

TOKENS, LAYERS = 700, 3
IDS = torch.randint(1, 97, (1, TOKENS), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {
    "mode": "sparse", "device_budget": "1MiB", "host_budget": "1MiB", "block_tokens": 16, "segment_tokens": 128,
    "sink_tokens": 16, "recent_tokens": 32, "read_rate": 1.0, "io": "buffered",
}  # fmt: skip


def opened(path: Path, **changes: Any) -> DB:
    return DB(path, model=tiny(pad_token_id=None, max_position_embeddings=2048), **(SETTINGS | changes))


@pytest.fixture
def kv() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(1, 2, TOKENS, 16), torch.randn(1, 2, TOKENS, 16)) for _ in range(LAYERS)]


@pytest.fixture
def path(tmp_path: Path, kv: list[tuple[Tensor, Tensor]]) -> Path:
    """A store with one context and its index."""
    with opened(tmp_path / "store") as db:
        db.import_context(IDS, kv)
    return tmp_path / "store"


def ask(path: Path, kv: list[tuple[Tensor, Tensor]], **changes: Any) -> Iterator[tuple[int, Partitions]]:
    """Attends to a stored context in every layer; how many steps were sparse, and what made it so."""
    q = 12 * torch.randn(1, 8, 1, 16)
    with opened(path, **changes) as db:
        session, _ = db.create_session(IDS)
        length = session.get_seq_length()
        for layer, (k, v) in enumerate(kv):
            got = session.session.attention(layer, q, [Visible.all(length, 1)], 0.25)
            k, v = (x[:, :, :length].double().repeat_interleave(4, 1) for x in (k, v))
            want = torch.softmax(0.25 * q.double() @ k.mT, -1) @ v
            assert float((got - want).norm() / want.norm()) < 0.02
        use, partitions = session.stats().sparse, session.session.engine.partitions
        assert use is not None
        assert partitions is not None
        yield use.steps, partitions


def indexes(path: Path) -> list[Path]:
    return sorted(path.glob("segments/*/index"))


def test_an_index_is_loaded_and_not_made_again(path: Path, kv: list[tuple[Tensor, Tensor]]) -> None:
    assert len(indexes(path)) == -(-TOKENS // 128)
    for steps, partitions in ask(path, kv):
        assert steps == 8 * LAYERS
        assert partitions.seconds == 0
        assert not partitions._queued


def test_without_its_index_a_context_is_attended_exactly_and_indexed_anew(
    path: Path, kv: list[tuple[Tensor, Tensor]]
) -> None:
    for file in indexes(path):
        file.unlink()
    for steps, partitions in ask(path, kv):
        assert steps == 0
        partitions.wait()
        assert partitions.seconds > 0
    with opened(path) as db:
        said: list[tuple[int, int]] = []
        db.build_index(db.contexts()[0].id, say=lambda done, of: said.append((done, of)))
        assert said[-1][0] == said[-1][1] > 0
        with pytest.raises(InputError, match="no context"):
            db.build_index("0" * 64)
    for steps, partitions in ask(path, kv):
        assert steps == 8 * LAYERS
        assert partitions.seconds == 0
    with opened(path, mode="exact") as db, pytest.raises(ConfigError, match="sparse"):
        db.build_index(db.contexts()[0].id)


@pytest.mark.parametrize("stop", [1, 60, 129])
def test_building_that_is_stopped_keeps_whole_segments_and_goes_on_after_them(
    path: Path, kv: list[tuple[Tensor, Tensor]], stop: int
) -> None:
    files = indexes(path)
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    blocks = TOKENS // 16 * LAYERS
    made = min(stop - 1, TOKENS // 128 * 8 * LAYERS) // (8 * LAYERS)  # segments that were whole before it was stopped

    def stopped(done: int, of: int) -> None:
        assert of == blocks
        if done == stop:
            raise KeyboardInterrupt

    with opened(path) as db, pytest.raises(KeyboardInterrupt):
        db.build_index(db.contexts()[0].id, say=stopped)
    assert len(indexes(path)) == made
    with opened(path) as db:
        said: list[tuple[int, int]] = []
        db.build_index(db.contexts()[0].id, say=lambda done, of: said.append((done, of)))
    assert said[-1] == (blocks - made * 8 * LAYERS,) * 2
    assert sorted(file.read_bytes() for file in indexes(path)) == sorted(whole)
    for steps, partitions in ask(path, kv):
        assert (steps, partitions.seconds) == (8 * LAYERS, 0)


def test_latents_are_coded_and_loaded_as_what_they_are(tmp_path: Path) -> None:
    """MLA: before anybody attended, keys are known to be latents by the model's configuration."""
    model, torch_ids = deepseek(), torch.randint(1, 97, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    changes: dict[str, Any] = {"alpha": 0.01, "index_sure": 0}
    rows = torch.randn(1, 1, TOKENS, 24)
    latent, rotary = rows[..., :16], rows[..., 16:]
    with DB(tmp_path, model=model, **(SETTINGS | changes)) as db:
        db.import_context(torch_ids, [(latent, rotary)] * 2)
    with DB(tmp_path, model=model, **(SETTINGS | changes)) as db:
        session, _ = db.create_session(torch_ids)
        length = session.get_seq_length()
        q = 6 * torch.randn(1, 4, 1, 24)
        for layer in range(2):
            got = session.session.attention(layer, q, [Visible.all(length, 1)], 0.25, latent=True)
            weights = torch.softmax(0.25 * q.double() @ rows[:, :, :length].double().mT, -1)
            want = weights @ latent[:, :, :length].double()
            assert float((got - want).norm() / want.norm()) < 0.05
        use, partitions = session.stats().sparse, session.session.engine.partitions
        assert use is not None
        assert partitions is not None
        assert (use.steps, use.exact) == (8, 0)
        assert partitions.seconds == 0, "codes were made anew"


def test_the_command_builds_with_bits_of_its_own(path: Path) -> None:
    whole = [file.read_bytes() for file in indexes(path)]
    with opened(path) as db:
        name = db.contexts()[0].id
    indexes(path)[1].unlink()
    for bits, same in ((4, True), (8, False)):
        result = CliRunner().invoke(cli.app, ["index", str(path), name[:12], "--bits", str(bits)])
        assert result.exit_code == 0, result.output
        assert result.output.startswith(f"{TOKENS} tokens of context {name[:12]}: ")
        assert ([file.read_bytes() for file in indexes(path)] == whole) is same
        with opened(path, index_bits=bits, io="buffered") as db:
            assert db._contexts._indexes(db._contexts.manifest.chain(name)).keys() == {*db._contexts.manifest.segments}
    for wrong, says in (([name[:12], "--bits", "3"], "index_bits is 4 or 8"), (["zzz"], "no context begins")):
        result = CliRunner().invoke(cli.app, ["index", str(path), *wrong])
        assert result.exit_code == 2
        assert says in result.output


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_index_is_never_believed(path: Path, kv: list[tuple[Tensor, Tensor]], seed: int) -> None:
    """Bytes changed anywhere, files cut, emptied, swapped, replaced by nonsense: answers stay right."""
    rng = random.Random(seed)
    files = indexes(path)
    for file in files:
        data = bytearray(file.read_bytes())
        match rng.choice(["flip", "flip", "header", "cut", "empty", "noise", "swap"]):
            case "flip":
                for _ in range(20):
                    data[rng.randrange(4096, len(data))] ^= 1 << rng.randrange(8)
            case "header":
                data[rng.randrange(300)] ^= 1 << rng.randrange(8)
            case "cut":
                del data[rng.randrange(len(data)) :]
            case "empty":
                data.clear()
            case "noise":
                data[:] = rng.randbytes(5000)
            case _:
                data[:] = rng.choice(files).read_bytes()
        file.write_bytes(data)
    for _, partitions in ask(path, kv):
        partitions.wait()
        assert partitions.failure is None


def test_an_index_of_other_settings_is_not_used(path: Path, kv: list[tuple[Tensor, Tensor]]) -> None:
    for steps, _ in ask(path, kv, index_bits=8):
        assert steps == 0


def test_an_index_of_another_version_is_no_damage_and_is_made_anew(path: Path, kv: list[tuple[Tensor, Tensor]]) -> None:
    for file in indexes(path):
        file.write_bytes(file.read_bytes().replace(MAGIC, b"alaya-index-1", 1))
    with opened(path) as db:
        assert not list(db.verify())
    for steps, _ in ask(path, kv):
        assert steps == 0
    with opened(path) as db:
        db.build_index(db.contexts()[0].id)
    assert all(file.read_bytes().startswith(MAGIC) for file in indexes(path))


def test_a_small_budget_loads_what_fits(path: Path, kv: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.warns(UserWarning, match="index_budget"):
        found = [steps for steps, _ in ask(path, kv, index_budget="48KiB")]
    assert found[0] > 0


def test_the_index_goes_with_its_context_and_is_no_other_blocks(path: Path, kv: list[tuple[Tensor, Tensor]]) -> None:
    """Ids of deleted blocks are used again: what was promised of the old ones is not loaded for the new."""
    with opened(path) as db:
        db.create_session(IDS)
        for context in db.contexts():
            db.delete(context.id)
        assert not indexes(path)
        other = [(torch.randn_like(k), torch.randn_like(v)) for k, v in kv]
        db.import_context(97 - IDS, other)
        session, _ = db.create_session(97 - IDS)
        q, length = 12 * torch.randn(1, 8, 1, 16), session.get_seq_length()
        for layer, (k, v) in enumerate(other):
            got = session.session.attention(layer, q, [Visible.all(length, 1)], 0.25)
            k, v = (x[:, :, :length].double().repeat_interleave(4, 1) for x in (k, v))
            want = torch.softmax(0.25 * q.double() @ k.mT, -1) @ v
            assert float((got - want).norm() / want.norm()) < 0.02


def test_all_headers_are_read_before_codes_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()

    def noted(name: str, do: Any, *arguments: Any) -> Any:
        order.append(name)
        return do(*arguments)

    for name in ("open_index", "promise"):
        monkeypatch.setattr(contexts, name, partial(noted, name, getattr(contexts, name)))
    with opened(path) as db:
        db.create_session(IDS)
    n = len(indexes(path))
    assert order == ["open_index"] * n + ["promise"] * n


def test_windows_are_on_their_way_when_a_session_is_made(path: Path) -> None:
    windows = (
        LAYERS * 2 * (1 + 3) * 16 * 32 * 4
    )  # heads; runs with sinks, and with recent tokens; tokens; floats of each
    with opened(path) as db:
        session, _ = db.create_session(IDS)
        deadline = time.monotonic() + 20
        while session.stats().read_ahead_bytes < windows and time.monotonic() < deadline:
            time.sleep(0.001)
        assert session.stats().read_ahead_bytes == session.stats().read_bytes == windows
    with opened(path, mode="exact") as db:
        session, _ = db.create_session(IDS)
        assert not session.session.engine.mover.ledger.busy.any()
