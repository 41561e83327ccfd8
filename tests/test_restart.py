"""A process generates, stores and is killed; another goes on as if nothing had happened.

More prompts than usual: ALAYA_TIERS_RESTARTS=100.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alaya_tiers import DB
from tests.golden import bits
from tests.test_db import TIGHT, expected, made, opened

PROMPTS = int(os.environ.get("ALAYA_TIERS_RESTARTS", "6"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS, TOKENS = 3, 77


def prompt(seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (1, 10 + seed * 37 % 140), generator=made)


def odd(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Any bit patterns at all, [1, 2, TOKENS, 16] a layer: NaN with payloads, negative zeros, infinities."""
    made = torch.Generator().manual_seed(dtype.itemsize)
    size, whole = (1, 2, TOKENS, 16), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(whole)
    rows = [torch.randint(limits.min, limits.max, size, generator=made, dtype=whole) for _ in range(2 * LAYERS)]
    rows[0][0, 0, 0, :2] = torch.tensor([limits.min, 1])
    return [(k.view(dtype), v.view(dtype)) for k, v in zip(rows[::2], rows[1::2], strict=True)]


def first_life(path: Path) -> None:
    """What the killed process does: half of each answer, stored; odd numbers, stored; and work that is not."""
    model = made()
    for n, dtype in enumerate(DTYPES):
        with opened(path / "odd", model=model) as db:
            db.import_context(torch.full((1, TOKENS), n + 1), odd(dtype))
    db = opened(path / "store")
    for seed in range(PROMPTS):
        session, _ = db.create_session(prompt(seed), model=model)
        model.generate(prompt(seed), past_key_values=session, max_new_tokens=1 + random.Random(seed).randrange(12))
        db.store(session)
    session, _ = db.create_session(prompt(1000), model=model)
    model.generate(prompt(1000), past_key_values=session, max_new_tokens=30)
    print("stored", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    path = tmp_path_factory.mktemp("restart")
    code = "import sys, pathlib; from tests.test_restart import first_life; first_life(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "stored\n"), done.stderr[-2000:]
    return path


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_answers_go_on_as_if_the_process_had_not_been_killed(path: Path) -> None:
    model: PreTrainedModel = made()
    with opened(path / "store") as db:
        assert len(db.contexts()) == PROMPTS
        for seed in range(PROMPTS):
            whole = expected(model, prompt(seed), 20)
            half = prompt(seed).shape[1] + 1 + random.Random(seed).randrange(12)
            session, rest = db.create_session(whole[:, :half], model=model)
            assert rest.shape[1] == 1
            left = whole.shape[1] - half
            assert continued(model, whole[:, :half], session, left).equal(whole)
            session.close()


def continued(model: PreTrainedModel, ids: Tensor, session: object, tokens: int) -> Tensor:
    out = model.generate(ids, past_key_values=session, max_new_tokens=tokens)  # type: ignore[operator]
    assert isinstance(out, Tensor)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("n", range(len(DTYPES)), ids=lambda n: str(DTYPES[n]))
def test_keys_and_values_are_the_same_bits_in_another_process(path: Path, n: int) -> None:
    with DB(path / "odd", **TIGHT) as db:
        ids, chunks = db.export_context(db.contexts()[n].id)
        assert ids.tolist() == [n + 1] * TOKENS
        parts = list(chunks)
        for layer, want in enumerate(odd(DTYPES[n])):
            for i in range(2):
                got = torch.cat([part[layer][i] for part in parts], 2)
                assert got.dtype == DTYPES[n]
                assert bits(got).equal(bits(want[i]))
