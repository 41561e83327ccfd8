"""What is stored is found again and reused exactly, by the same process and by another one."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MambaConfig, MistralConfig, MistralForCausalLM, T5Config

from alaya_tiers import DB, AlayaCache, GatheredWarning
from alaya_tiers.errors import (
    CorruptWarning,
    InputError,
    ModelChanged,
    OutOfSpace,
    SessionClosed,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    StoreMismatch,
    UnsupportedModel,
)
from tests.tiny import BLOCK, SMALL, prompt, tiny

SEGMENT = 4 * BLOCK
TIGHT: dict[str, Any] = {"device_budget": 8 * 2 * 4096, "host_budget": 16 * 4096} | SMALL
NEW = 6


@pytest.fixture(scope="module")
def model() -> Any:
    """One for which no token means padding: prompts here are what they are."""
    return made()


def made() -> Any:
    model = tiny(pad_token_id=None)
    model.set_attn_implementation("alaya")
    return model


@pytest.fixture(params=["alaya", "sdpa"])
def implementation(request: pytest.FixtureRequest, model: Any) -> Iterator[str]:
    """The two-line use and the one-line use."""
    model.set_attn_implementation(request.param)
    with warnings.catch_warnings():
        if request.param == "sdpa":
            warnings.simplefilter("ignore", GatheredWarning)
        yield request.param
    model.set_attn_implementation("alaya")


def opened(path: Path, **changes: Any) -> DB:
    return DB(path, **(TIGHT | changes))


def expected(model: Any, ids: Tensor, tokens: int = NEW) -> Tensor:
    """What DynamicCache says."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    out = model.generate(ids, max_new_tokens=tokens)
    model.set_attn_implementation(before)
    assert isinstance(out, Tensor)
    return out


def continued(model: Any, db: DB, ids: Tensor, reused: int, tokens: int = NEW) -> Any:
    """Generate on a new session and compare; the session."""
    session, rest = db.create_session(ids, model=model)
    assert session.get_seq_length() == reused
    assert rest.equal(ids[:, reused:])
    out = model.generate(ids, past_key_values=session, max_new_tokens=tokens)
    assert out.equal(expected(model, ids, tokens))
    return session


def stored(model: Any, db: DB, ids: Tensor) -> list[str]:
    """A context of exactly these tokens, computed by the model."""
    session, rest = db.create_session(ids, model=model)
    with torch.no_grad():
        model(input_ids=rest, past_key_values=session)
    names = db.store(session)
    session.close()
    return names


def disk_bytes(path: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in path.rglob("c/0/0/0"))


def check(db: DB) -> None:
    """The books agree, and no budget is exceeded."""
    engine = db._engine
    engine.mover.ledger.check_integrity()
    assert engine.mover.ledger.pinned_count() == 0
    for name, limit in engine.accountant.limits.items():
        assert limit is None or engine.accountant.peak[name] <= limit


# ---------------------------------------------------------------------- exact reuse

LENGTHS = [1, BLOCK + 1, SEGMENT, SEGMENT + 1, 77, 102]


@pytest.mark.slow
@pytest.mark.parametrize("length", [BLOCK + 3, SEGMENT, 101])
def test_every_prompt_reuses_what_it_has_in_common(
    tmp_path: Path, model: Any, implementation: str, length: int
) -> None:
    """Shorter, equal and longer prompts, and ones that part from what is stored at any place of a block or segment."""
    text = prompt(1, 150)
    with opened(tmp_path) as db:
        stored(model, db, text[:, :length])
    with opened(tmp_path) as db:
        for n in LENGTHS:
            session = continued(model, db, text[:, :n], min(length, n - 1), tokens=3)
            session.close()
            if n < length:
                other = text[:, : length + 5].clone()
                other[:, n] = 96 - other[:, n]
                continued(model, db, other, n, tokens=2).close()
        check(db)


@pytest.mark.slow
def test_a_new_process_gives_the_same_tokens(tmp_path: Path, root: Path, model: Any) -> None:
    text = prompt(1, 120)
    with opened(tmp_path / "store") as db:
        (name,) = stored(model, db, text[:, :101])
    code = (
        "import sys, json, torch\n"
        "from tests.test_db import TIGHT, prompt, tiny\n"
        "from alaya_tiers import DB\n"
        "model = tiny(pad_token_id=None)\n"
        "with DB(sys.argv[1], model=model, **TIGHT) as db:\n"
        "    session, rest = db.create_session(prompt(1, 120))\n"
        "    out = model.generate(prompt(1, 120), past_key_values=session, max_new_tokens=6)\n"
        "    print(json.dumps([rest.shape[1], out.tolist(), [c.id for c in db.contexts()]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [19, expected(model, text).tolist(), [name]]


def test_storing_after_generate_keeps_what_was_generated(tmp_path: Path, model: Any, implementation: str) -> None:
    """The two-line use: nobody tells the session which tokens were generated, and which model runs."""
    text = prompt(1, 50)
    with opened(tmp_path) as db:
        session, _ = db.create_session(text)
        out = model.generate(text, past_key_values=session, max_new_tokens=20)
        (name,) = db.store(session)
        assert out.equal(expected(model, text, 20))
        assert db.export_context(name)[0].equal(out[0, :-1])
    with opened(tmp_path) as db:
        longer = torch.cat([out, prompt(1, 9)], 1)
        session, rest = db.create_session(longer)
        assert rest.shape[1] == 10
        again = model.generate(longer, past_key_values=session, max_new_tokens=NEW)
        assert again.equal(expected(model, longer))


@pytest.mark.slow
def test_a_conversation_is_stored_turn_by_turn_and_written_once(tmp_path: Path, model: Any) -> None:
    said = prompt(1, 40)
    with opened(tmp_path) as db:
        session, _ = db.create_session(said, model=model)
        written = 0
        for turn in range(5):
            said = model.generate(said, past_key_values=session, max_new_tokens=13)
            db.store(session)
            db.store(session)  # nothing more to do
            more = session.stats().written_bytes
            assert more - written <= (40 * (turn == 0) + 13 + 5 + 2 * BLOCK) * 3 * 2 * 32 * 4
            written = more
            said = torch.cat([said, prompt(1, 5)], 1)
        assert len(db.contexts()) == 5
    with opened(tmp_path) as db:
        assert [c.tokens for c in db.contexts()] == sorted(c.tokens for c in db.contexts())
        continued(model, db, said, said.shape[1] - 6)
        for context in db.contexts():
            ids, chunks = db.export_context(context.id)
            check_kv(model, ids, chunks)


def check_kv(model: Any, ids: Tensor, chunks: Any) -> None:
    """Keys and values are those of a model that never heard of us, but for the rounding of other chunk sizes."""
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[None], past_key_values=plain)
    parts = list(chunks)
    layers: list[Any] = list(plain.layers)
    for n, layer in enumerate(layers):
        torch.testing.assert_close(torch.cat([part[n][0] for part in parts], 2), layer.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([part[n][1] for part in parts], 2), layer.values, rtol=1e-4, atol=1e-5)


def test_rows_have_contexts_of_their_own_and_share_prefixes(tmp_path: Path, model: Any, implementation: str) -> None:
    rows = prompt(3, 90)
    rows[1, :50] = rows[0, :50]
    with opened(tmp_path, device_budget=16 * 2 * 4096) as db:
        session, _ = db.create_session(rows, model=model)
        out = model.generate(rows, past_key_values=session, max_new_tokens=NEW)
        assert out.equal(expected(model, rows))
        names = db.store(session)
        assert len(set(names)) == 3
    with opened(tmp_path, device_budget=16 * 2 * 4096) as db:
        mixed = torch.stack([rows[2], rows[0], rows[0], rows[1]])
        mixed[1, 70:], mixed[3, 81:] = 1, 2
        continued(model, db, mixed, 70)
        check(db)
        for n, name in enumerate(names):
            assert db.export_context(name)[0].equal(out[n, :-1])


def test_forks_of_a_stored_session_go_their_own_way(tmp_path: Path, model: Any, implementation: str) -> None:
    text = prompt(1, 75)
    with opened(tmp_path) as db:
        stored(model, db, text)
    with opened(tmp_path) as db:
        session, _ = db.create_session(torch.cat([text, prompt(1, 3)], 1), model=model)
        forks = [session, session.fork(), session.fork()]
        names = []
        for n, fork in enumerate(forks):
            ids = torch.cat([text, torch.full((1, 3 + n), 5 + n)], 1)
            out = model.generate(ids, past_key_values=fork, max_new_tokens=NEW)
            assert out.equal(expected(model, ids))
            names += db.store(fork)
            assert db.export_context(names[-1])[0].equal(out[0, :-1])
        assert len(set(names)) == 3
        forks[0].close()
        with pytest.raises(SessionClosed):
            model(input_ids=text[:, :1], past_key_values=forks[0])
        out = model.generate(torch.cat([out, text], 1), past_key_values=forks[2], max_new_tokens=NEW)
        check(db)


def test_a_fork_that_was_cropped_leaves_the_other_ones_last_block_alone(tmp_path: Path, model: Any) -> None:
    """Both have it open; storing the shorter one fills its end with zeros, in a copy."""
    text = prompt(1, 2 * BLOCK + 5)
    with opened(tmp_path) as db, torch.no_grad():
        session, rest = db.create_session(text, model=model)
        model(input_ids=rest, past_key_values=session)
        fork = session.fork()
        fork.crop(-3)
        (short,) = db.store(fork)
        (long,) = db.store(session)
        assert db.export_context(short)[0].equal(text[0, :-3])
        check_kv(model, *db.export_context(long))
        check_kv(model, *db.export_context(short))


def test_beams_and_samples_on_a_stored_prefix(tmp_path: Path, model: Any, implementation: str) -> None:
    text = prompt(1, 60)
    with opened(tmp_path) as db:
        stored(model, db, text)
    with opened(tmp_path, device_budget=16 * 2 * 4096) as db:
        ids = torch.cat([text, prompt(1, 4)], 1)
        session, _ = db.create_session(ids, model=model)
        kwargs = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}
        out = model.generate(ids, past_key_values=session, **kwargs)
        model.set_attn_implementation("sdpa")
        assert out.equal(model.generate(ids, **kwargs))
        model.set_attn_implementation(implementation)
        names = db.store(session)
        for name in names:  # whatever beams came to: their tokens and their keys belong together
            check_kv(model, *db.export_context(name))


def test_equal_prefixes_of_strangers_are_stored_once(tmp_path: Path, model: Any) -> None:
    """Two sessions that compute the same text side by side: whole segments are on disk once."""
    text = prompt(1, 3 * SEGMENT)
    with opened(tmp_path, device_budget=16 * 2 * 4096) as db, torch.no_grad():
        sessions = [db.create_session(text, model=model)[0] for _ in range(2)]
        for n, session in enumerate(sessions):
            model(input_ids=text, past_key_values=session)
            model(input_ids=torch.full((1, 3), n + 1), past_key_values=session)
        names = [db.store(session)[0] for session in sessions]
        one, two = (db._contexts.manifest.chain(name) for name in names)
        assert one[:3] == two[:3]
        assert one[3] != two[3]
        used = db._engine.accountant.used["ssd"]
        for session in sessions:
            session.close()
        assert db._engine.accountant.used["ssd"] < used
    files = list(tmp_path.rglob("c/0/0/0"))
    assert len(files) == 3 * 3 + 3 * 2, "what was computed twice is there twice"


def test_sliding_windows_are_stored_whole(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, sliding_window=20, max_position_embeddings=512, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    mistral: Any = MistralForCausalLM(config)
    model = mistral.eval()
    model.set_attn_implementation("alaya")
    text = prompt(1, 90)
    with opened(tmp_path) as db:
        stored(model, db, text[:, :70])
    for implementation in ("alaya", "sdpa"):
        model.set_attn_implementation(implementation)
        with opened(tmp_path) as db, warnings.catch_warnings():
            warnings.simplefilter("ignore", GatheredWarning)
            for n in (30, 71, 90):
                continued(model, db, text[:, :n], min(n - 1, 70)).close()


def test_sparse_sessions_reuse_exact_contexts_and_are_stored_as_lossy(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 200)
    with opened(tmp_path) as db:
        stored(model, db, text[:, :150])
    sparse = {"mode": "sparse", "alpha": 0.5, "sink_tokens": 8, "recent_tokens": 16, "index_budget": "4MiB"}
    with opened(tmp_path, **sparse) as db:
        session, rest = db.create_session(text, model=model)
        assert rest.shape[1] == 50
        session.build_index()
        assert (db._engine.mover.ledger.code >= 0).sum() == 3 * 2 * (150 // BLOCK), "what was stored has no index"
        out = model.generate(text, past_key_values=session, max_new_tokens=30)
        db.store(session)
        assert [i.lossy for i in db._contexts.manifest.identities.values()] == [False, True]
        _, rest = db.create_session(out, model=model)
        assert rest.shape[1] == 1
    with opened(tmp_path) as db:
        continued(model, db, out, 150)


def test_sessions_in_threads_share_one_set_of_budgets(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 100)
    answers: dict[int, Any] = {}
    with opened(tmp_path) as db:
        stored(model, db, text)
    with opened(tmp_path, device_budget=32 * 2 * 4096) as db:

        def talk(n: int) -> None:
            ids = torch.cat([text[:, : 100 - 7 * n], torch.full((1, 4), n)], 1)
            session, rest = db.create_session(ids, model=model)
            answers[n] = (ids, model.generate(ids, past_key_values=session, max_new_tokens=NEW), rest.shape[1])
            db.store(session)

        threads = [threading.Thread(target=talk, args=(n,)) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(db)
        assert len(db.contexts()) == 6
    for n in range(5):
        ids, out, rest = answers[n]
        assert rest == 4
        assert out.equal(expected(model, ids))


def test_sessions_that_begin_in_threads_at_once(tmp_path: Path, model: Any) -> None:
    """Nothing was ever run on the store: the first to come makes its memory."""
    texts = [prompt(1, 40) + n for n in range(4)]
    failures: list[BaseException] = []
    with opened(tmp_path, device_budget=32 * 2 * 4096) as db:
        begin = threading.Barrier(4)

        def talk(ids: Tensor) -> None:
            try:
                begin.wait(20)
                stored(model, db, ids % 97)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=talk, args=(ids,)) for ids in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(db.contexts()) == 4
        for context in db.contexts():
            check_kv(model, *db.export_context(context.id))
        check(db)


# ---------------------------------------------------------------------- who may reuse what


def test_nothing_is_read_until_attention_asks(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 300)
    with opened(tmp_path) as db:
        stored(model, db, text)
    with opened(tmp_path) as db:
        session, _ = db.create_session(text, model=model)
        stats = session.stats()
        assert (stats.tokens, stats.read_bytes) == (299, 0)
        assert all(stats.tiers[tier].used == 0 for tier in ("device", "host"))


@pytest.mark.parametrize("change", ["weights", "dtype", "block_tokens", "segment_tokens", "tenant"])
def test_one_difference_is_a_miss(tmp_path: Path, model: Any, change: str) -> None:
    text = prompt(1, 80)
    with opened(tmp_path, tenant="one") as db:
        stored(model, db, text)
    other, settings = model, {"tenant": "one"}
    if change == "weights":
        other = made()
        with torch.no_grad():
            other.lm_head.weight += 0.1
    elif change == "dtype":
        other = made().to(torch.bfloat16)
    elif change == "tenant":
        settings["tenant"] = "other"
    else:
        settings[change] = SMALL[change] * 2
    with opened(tmp_path, **settings) as db:
        session, rest = db.create_session(text, model=other)
        assert rest.shape == text.shape
        with torch.no_grad():
            other(input_ids=rest, past_key_values=session)
        if change != "dtype":  # one engine, one dtype at a time
            db.store(session)
            assert len(db._contexts.manifest.contexts) == 2
    with opened(tmp_path, tenant="one") as db:
        continued(model, db, text, 79)


def test_another_model_is_refused_and_the_difference_named(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 30)
    with opened(tmp_path) as db:
        stored(model, db, text)
    other = tiny(rms_norm_eps=0.5, pad_token_id=None)
    with pytest.raises(StoreMismatch, match=r"rms_norm_eps is 1e-06 there and 0\.5 here"):
        opened(tmp_path, model=other)
    with opened(tmp_path) as db:
        with pytest.raises(StoreMismatch, match="rms_norm_eps"):
            db.create_session(text, model=other)
        with pytest.raises(StoreMismatch, match="rms_norm_eps"):
            db.create_session(text, config=other.config)
        session, _ = db.create_session(text)
        with pytest.raises(StoreMismatch, match="rms_norm_eps"):
            other.generate(text, past_key_values=session, max_new_tokens=2)


def test_without_a_model_the_stores_only_one_is_meant_and_checked_when_it_runs(tmp_path: Path, model: Any) -> None:
    text, other = prompt(1, 30), made()
    with torch.no_grad():
        other.lm_head.weight += 0.1
    with opened(tmp_path) as db:
        stored(model, db, text)
        session, rest = db.create_session(text)
        assert rest.shape[1] == 1
        with pytest.raises(ModelChanged):
            other.generate(text, past_key_values=session, max_new_tokens=2)
        stored(other, db, text)
        with pytest.raises(InputError, match="several models"):
            db.create_session(text)


def test_another_models_forward_is_refused_too(tmp_path: Path, model: Any) -> None:
    """Also when nobody calls generate: what it computes would be stored under the first one's name."""
    text, other = prompt(1, 30), made()
    with torch.no_grad():
        other.lm_head.weight += 0.1
    with opened(tmp_path) as db, torch.no_grad():
        stored(other, db, text)
        session, rest = db.create_session(text, model=model)
        assert rest.shape[1] == 30
        with pytest.raises(ModelChanged):
            other(input_ids=rest, past_key_values=session)
        model(input_ids=rest, past_key_values=session)
        with pytest.raises(ModelChanged):
            other(input_ids=rest[:, :1], past_key_values=session)
        db.store(session)
        assert len(db.contexts()) == 2


def test_models_with_state_of_their_own_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as db:
        with pytest.raises(UnsupportedModel, match="encoder"):
            db.create_session([1, 2], config=T5Config(is_encoder_decoder=True))
        with pytest.raises(UnsupportedModel, match="layer 0"):
            db.create_session([1, 2], config=MambaConfig(num_hidden_layers=1))


# ---------------------------------------------------------------------- what is refused


def test_what_token_ids_do_not_say_is_not_stored(tmp_path: Path, model: Any) -> None:
    text = prompt(2, 20)
    mask = torch.ones_like(text)
    mask[1, :4] = 0
    with opened(tmp_path) as db, torch.no_grad():
        session, _ = db.create_session(text, model=model)
        model.generate(text, attention_mask=mask, past_key_values=session, max_new_tokens=2)
        with pytest.raises(InputError, match="padded"):
            db.store(session)
        with pytest.raises(InputError, match="padded"):
            db.store(session, torch.cat([text, text], 1))
        session, _ = db.create_session(text[:1], model=model)
        model(inputs_embeds=model.get_input_embeddings()(text[:1]), past_key_values=session)
        with pytest.raises(InputError, match="inputs_embeds"):
            db.store(session)
        session, _ = db.create_session(text[:1], model=model)
        model(input_ids=text[:1], position_ids=torch.arange(5, 25)[None], past_key_values=session)
        with pytest.raises(InputError, match="positions"):
            db.store(session)
        assert not db.contexts()
        stored(model, db, text[:1])
        session, rest = db.create_session(text[:1], model=model)
        assert rest.shape[1] == 1
        with pytest.raises(InputError, match="padded"):
            model.generate(text[:1], attention_mask=mask[1:], past_key_values=session, max_new_tokens=2)


def test_unknown_token_ids_must_be_given_and_fit(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 30)
    with opened(tmp_path) as db, torch.no_grad():
        session, _ = db.create_session(text, config=model.config)
        with pytest.raises(InputError, match="empty"):
            db.store(session)
        model(input_ids=text, past_key_values=session)
        with pytest.raises(InputError, match="only the first 0 are known"):
            db.store(session)
        with pytest.raises(InputError, match="30 tokens"):
            db.store(session, text[:, :20])
        with pytest.raises(InputError, match="which model"):
            db.store(session, text)
        session, _ = db.create_session(text, model=model)
        model(input_ids=text, past_key_values=session)
        wrong = text.clone()
        wrong[0, 17] += 1
        with pytest.raises(InputError, match="position 17"):
            db.store(session, wrong)
        db.store(session, text[0].tolist())
        wrongs: list[Any] = [torch.empty(1, 0), torch.zeros(2), torch.zeros(1, 1, 1, dtype=torch.long), []]
        for bad in wrongs:
            with pytest.raises(InputError):
                db.create_session(bad, model=model)


def test_sessions_of_others_and_closed_ones_are_refused(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 30)
    with (
        opened(tmp_path / "a") as db,
        opened(tmp_path / "b") as other,
        AlayaCache(config=model.config, path=tmp_path / "c") as cache,
    ):
        session, _ = other.create_session(text, model=model)
        for wrong in (cache, session):
            with pytest.raises(InputError, match="of this database"):
                db.store(wrong)
        with pytest.raises(InputError, match=r"db\.store"):
            session.flush()
        session.close()
        with pytest.raises(SessionClosed):
            other.store(session)
        with pytest.raises(SessionClosed):
            model.generate(text, past_key_values=session, max_new_tokens=2)
        with pytest.raises(InputError, match="no context"):
            db.delete("0" * 64)
        with pytest.raises(InputError, match="no context"):
            db.export_context("0" * 64)
    with pytest.raises(SessionClosed):
        db.create_session(text)
    with pytest.raises(SessionClosed):
        db.delete("0" * 64)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(StoreLocked):
        opened(tmp_path)
    opened(tmp_path).close()


def test_hooks_are_gone_when_the_database_is(tmp_path: Path, model: Any) -> None:
    with opened(tmp_path) as db:
        db.create_session(prompt(1, 5), model=model)
        assert len(model._forward_pre_hooks) == 1
    assert not model._forward_pre_hooks
    db = opened(tmp_path)
    db.create_session(prompt(1, 5), model=model)
    del db
    gc.collect()
    assert not model._forward_pre_hooks


# ---------------------------------------------------------------------- import, export, delete


def random_kv(tokens: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    kv = [tuple(torch.randn(1, 2, tokens, 16).to(dtype) for _ in range(2)) for _ in range(3)]
    kv[0][0][0, 0, 0, :3] = torch.tensor([-0.0, float("nan"), float("inf")]).to(dtype)
    return kv  # type: ignore[return-value]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["tensors", "cache", "chunks"])
def test_what_is_imported_is_exported_bit_for_bit(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    model, tokens = tiny(), 101
    ids, kv, said = prompt(1, tokens), random_kv(tokens, dtype), list[tuple[int, int]]()
    given: Any = kv
    if form == "cache":
        given = DynamicCache()
        for n, (k, v) in enumerate(kv):
            given.update(k, v, n)
    elif form == "chunks":
        given = ([(k[:, :, i : i + 23], v[:, :, i : i + 23]) for k, v in kv] for i in range(0, tokens, 23))
    with opened(tmp_path / "a", model=model) as db:
        name = db.import_context(ids, given, say=lambda done, of: said.append((done, of)))
        assert said[-1] == (tokens, tokens)
    with opened(tmp_path / "a", model=model) as db, opened(tmp_path / "b", model=model) as copy:
        found, chunks = db.export_context(name)
        assert found.equal(ids[0])
        parts = list(chunks)
        for n, (k, v) in enumerate(kv):
            assert bits(torch.cat([p[n][0] for p in parts], 2)).equal(bits(k))
            assert bits(torch.cat([p[n][1] for p in parts], 2)).equal(bits(v))
        assert copy.import_context(found, iter(parts)) == name


@pytest.mark.slow
def test_an_import_longer_than_memory_and_one_that_begins_as_another(tmp_path: Path) -> None:
    model, tokens = tiny(), 3000
    ids = torch.randint(1, 97, (1, tokens))

    def chunks(upto: int) -> Iterator[Any]:
        for start in range(0, upto, 64):
            n = min(64, upto - start)
            made = torch.Generator().manual_seed(start)
            yield [tuple(torch.randn(1, 2, 64, 16, generator=made)[:, :, :n] for _ in range(2)) for _ in range(3)]

    with opened(tmp_path, model=model) as db:
        name = db.import_context(ids, chunks(tokens))
        check(db)
        before = db._engine.traffic.written_bytes
        db.import_context(ids[:, :1500], chunks(1500))
        assert db._engine.traffic.written_bytes == before, "what was stored was written again"
        for start, part in zip(range(0, tokens, SEGMENT), db.export_context(name)[1], strict=True):
            want = next(c for i, c in zip(range(0, tokens, 64), chunks(tokens), strict=False) if i == start // 64 * 64)
            at = start % 64
            for n in range(3):
                assert part[n][0].equal(want[n][0][:, :, at : at + SEGMENT])


def test_a_failed_import_stores_nothing(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(1, 60)
    kv = random_kv(60, torch.float32)

    def broken() -> Iterator[Any]:
        yield [(k[:, :, :30], v[:, :, :30]) for k, v in kv]
        raise KeyboardInterrupt

    def uneven() -> Iterator[Any]:
        yield kv
        yield [(k[:, :, :30], v[:, :, :30] if n else v[:, :, :29]) for n, (k, v) in enumerate(kv)]

    with opened(tmp_path, model=model) as db:
        with pytest.raises(KeyboardInterrupt):
            db.import_context(ids, broken())
        for wrong in ([(k[:, :, :59], v[:, :, :59]) for k, v in kv], iter([]), uneven()):
            with pytest.raises(InputError):
                db.import_context(ids, wrong)
        with pytest.raises(InputError, match="rows"):
            db.import_context(prompt(2, 60), kv)
        assert not db.contexts()
        assert db._engine.accountant.used["ssd"] == 0 or not db._engine.mover.ledger.alive().size
    assert not list(tmp_path.rglob("c/0/0/0"))
    with opened(tmp_path) as db, pytest.raises(InputError, match="model="):
        db.import_context(ids, kv)


def test_deleting_frees_what_only_that_context_needed(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 120)
    branch = text[:, :100].clone()
    branch[:, 70:] = 3
    with opened(tmp_path) as db:
        (long,), (other,) = stored(model, db, text), stored(model, db, branch)
    sizes = [disk_bytes(tmp_path)]
    with opened(tmp_path) as db:  # what was not opened
        db.delete(long)
        assert [c.id for c in db.contexts()] == [other]
        used = db._engine.accountant.used["ssd"]
        sizes.append(disk_bytes(tmp_path))
        continued(model, db, text, 70).close()
    assert 0 < sizes[1] < sizes[0]
    with opened(tmp_path) as db:
        assert db._engine.accountant.used["ssd"] == used
        continued(model, db, branch, 99).close()
        session, _ = db.create_session(branch, model=model)
        db.delete(other)  # a session still reads it
        assert not db.contexts()
        out = model.generate(branch, past_key_values=session, max_new_tokens=NEW)
        assert out.equal(expected(model, branch))
        db.store(session)
        session.close()
        continued(model, db, branch, 99).close()
        (last,) = (c.id for c in db.contexts())
        db.delete(last)
        check(db)
    assert not list(tmp_path.rglob("c/0/0/0"))
    assert sorted(p.name for p in (tmp_path / "segments").iterdir()) == ["zarr.json"]
    assert not list(tmp_path.glob("session-*"))


@pytest.mark.slow
def test_a_life_of_stores_and_deletes_leaves_nothing_behind(tmp_path: Path, model: Any) -> None:
    rng, text = np.random.default_rng(0), prompt(1, 140)
    alive: dict[str, Tensor] = {}
    db = opened(tmp_path)
    for _ in range(40):
        if alive and rng.random() < 0.35:
            name = list(alive)[rng.integers(len(alive))]
            db.delete(name)
            del alive[name]
        elif rng.random() < 0.2:
            db.close()
            db = opened(tmp_path)
        else:
            ids = text[:, : rng.integers(2, 140)].clone()
            if rng.random() < 0.5:
                ids[:, rng.integers(ids.shape[1]) :] = int(rng.integers(1, 90))
            (name,) = stored(model, db, ids)
            alive[name] = ids
        assert {c.id for c in db.contexts()} == set(alive)
        for name, ids in alive.items():
            assert db.export_context(name)[0].equal(ids[0])
    for name, ids in alive.items():
        check_kv(model, ids[0], db.export_context(name)[1])
        db.delete(name)
    check(db)
    assert db._engine.accountant.used["ssd"] == 0
    db.close()
    assert not list(tmp_path.rglob("c/0/0/0"))


def test_the_ssd_budget_counts_what_is_stored(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 120)
    with opened(tmp_path) as db:
        (name,) = stored(model, db, text)
        used = db._engine.accountant.used["ssd"]
    with opened(tmp_path, ssd_budget=used) as db:
        assert db._engine.accountant.used["ssd"] == used
        with pytest.raises(OutOfSpace):
            stored(model, db, 96 - text)
        assert [c.id for c in db.contexts()] == [name]
        db.delete(name)
        stored(model, db, 96 - text)
    with pytest.raises(OutOfSpace):
        opened(tmp_path, ssd_budget=used // 2)
    opened(tmp_path).close()


# ---------------------------------------------------------------------- other readers


def test_any_zarr_reader_opens_what_is_stored(tmp_path: Path) -> None:
    model, tokens = tiny(), 101
    kv = random_kv(tokens, torch.float32)
    with opened(tmp_path, model=model) as db:
        name = db.import_context(prompt(1, tokens), kv)
    group = zarr.open_group(str(tmp_path), mode="r")
    assert {"generations", "segments"} < set(group.group_keys())
    parts: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    names = [name]
    with opened(tmp_path) as db:
        names = db._contexts.manifest.chain(name)
    for segment in names:
        record: Any = zarr.open_group(str(tmp_path / "segments" / segment), mode="r").attrs["alaya_tiers"]
        for n, layer in record["layers"].items():
            (file,) = layer["files"]
            parts[int(n)].append(np.asarray(zarr.open_array(str(tmp_path / file), mode="r")[:]))
    for n, (k, v) in enumerate(kv):
        rows = np.concatenate(parts[n], 1)
        assert rows.shape == (2, tokens, 32)
        assert np.array_equal(rows.view("i4"), torch.cat([k, v], -1)[0].numpy().view("i4"))


def test_configs_say_which_store_is_whose(tmp_path: Path, model: Any) -> None:
    with opened(tmp_path) as db:
        stored(model, db, prompt(1, 9))
    with pytest.raises(StoreMismatch):
        AlayaCache(config=LlamaConfig(hidden_size=64), path=tmp_path)


@pytest.mark.parametrize("what", ["bit", "zeros", "truncate", "delete", "swap"])
def test_damaged_blocks_are_corrupt_at_attention_and_nothing_else_is(tmp_path: Path, model: Any, what: str) -> None:
    text = prompt(1, 120)
    with opened(tmp_path) as db:
        stored(model, db, text)
        stored(model, db, 96 - text)
    files = sorted(tmp_path.rglob("layer_001/c/0/0/0"))
    victim, data = files[0], files[0].read_bytes()
    if what == "bit":
        victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif what == "zeros":
        victim.write_bytes(bytes(len(data)))
    elif what == "truncate":
        os.truncate(victim, 100)
    elif what == "delete":
        victim.unlink()
    else:
        victim.write_bytes(data[4096:8192] + data[:4096] + data[8192:])
    with opened(tmp_path) as db:
        blamed = list[str]()
        for ids in (text, 96 - text):
            session, rest = db.create_session(ids, model=model)
            assert rest.shape[1] == 1
            try:
                out = model.generate(ids, past_key_values=session, max_new_tokens=3)
                assert out.equal(expected(model, ids, 3))
            except StoreCorrupt as error:
                blamed.append(error.filename)
        assert blamed == [str(victim)]
        check(db)


def test_a_damaged_record_is_a_miss_and_verify_says_why(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 120)
    with opened(tmp_path) as db:
        (name,) = stored(model, db, text)
        chain = db._contexts.manifest.chain(name)
    record = tmp_path / "segments" / chain[2] / "zarr.json"
    record.write_bytes(record.read_bytes()[:-9])
    with opened(tmp_path) as db:
        with pytest.warns(CorruptWarning, match="damaged"):
            continued(model, db, text, 2 * SEGMENT).close()
        assert [damage.contexts for damage in db.verify()] == [(name,)]
        with pytest.raises(StoreCorrupt):
            db.export_context(name)
        db.delete(name)
        stored(model, db, text)
        assert not db.verify()
        continued(model, db, text, 119).close()


def test_what_is_stored_is_read_ahead(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 400)
    with opened(tmp_path) as db:
        stored(model, db, text)
    with opened(tmp_path, host_budget=64 * 4096) as db:
        session = continued(model, db, text, 399)
        assert session.stats().read_ahead_bytes > 0


def test_a_plain_cache_in_the_same_directory_leaves_contexts_alone(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 120)
    with opened(tmp_path) as db:
        stored(model, db, text)
    for flush in (True, False):
        with AlayaCache(config=model.config, path=tmp_path, **TIGHT) as cache, torch.no_grad():
            model(input_ids=text, past_key_values=cache)
            if flush:
                cache.flush()
    with opened(tmp_path) as db:
        assert not db.verify()
        continued(model, db, text, 119).close()
    assert len(list(tmp_path.glob("session-*"))) == 2


def test_a_step_that_failed_is_forgotten_and_the_rest_stored(tmp_path: Path, model: Any) -> None:
    text = prompt(1, 300)
    with opened(tmp_path, ssd_budget=40 * 4096) as db, torch.no_grad():
        session, _ = db.create_session(text, model=model)
        with contextlib.suppress(OutOfSpace):
            for start in range(0, 300, 20):
                model(input_ids=text[:, start : start + 20], past_key_values=session)
        length = session.get_seq_length()
        assert 0 < length < 300
        session.crop(-(length // 2))
        (name,) = db.store(session)
        assert db.export_context(name)[0].equal(text[0, : length - length // 2])


def test_errors_of_a_store_are_store_errors(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(StoreError):
        opened(tmp_path)
