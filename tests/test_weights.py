"""A model is known by all of its weights."""

import copy
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alaya_tiers.hf import weights
from alaya_tiers.hf.weights import weights_digest, weights_sample
from tests.test_db import made, opened, stored
from tests.tiny import prompt, tiny


@pytest.fixture(params=["read each time", "remembered"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "remembered":
        monkeypatch.setattr(weights, "ALWAYS", 0)
    return tiny()


def test_any_element_of_any_parameter_counts(model: Any) -> None:
    """The smallest change there is, in the middle of each, in place or in a copy."""
    before, seen = weights_digest(model), set[str]()
    assert before == weights_digest(model) == weights_digest(pickle.loads(pickle.dumps(model)))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            flat, at = parameter.view(-1), 3 * parameter.numel() // 7 + 1
            old = flat[at].clone()
            flat[at] = torch.nextafter(old, torch.tensor(9.0))
        seen.add(weights_digest(model))
        assert weights_digest(copy.deepcopy(model)) == weights_digest(model), name
        with torch.no_grad():
            parameter.view(-1)[at] = old
        assert weights_digest(model) == before, name
    assert len(seen) == len(list(model.parameters()))
    assert before not in seen


def test_a_sample_does_not_see_all_and_so_is_not_what_contexts_are_known_by(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[1, 1] += 1
    assert weights_sample(other) == weights_sample(model)
    assert weights_digest(other) != weights_digest(model)


def test_a_model_that_did_not_change_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, whole = list[int](), weights._whole

    def noted(tensors: Any) -> str:
        reads.append(1)
        return whole(tensors)

    monkeypatch.setattr(weights, "_whole", noted)
    for _ in range(3):
        weights_digest(model)
    assert len(reads) == (1 if not weights.ALWAYS else 3)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    weights_digest(model)
    assert len(reads) == (2 if not weights.ALWAYS else 4)


class Odd(nn.Module):
    """Saved buffers, others, nothing, one number, and a parameter that is not in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.one, self.none = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0))
        self.turned = nn.Parameter(torch.arange(12.0).view(3, 4).T)
        self.tied = self.turned


def test_saved_buffers_count_and_others_do_not() -> None:
    one: Any = Odd()
    other: Any = Odd()
    other.scratch += 1
    assert weights_digest(one) == weights_digest(other)
    other.bias[2] = 1
    assert weights_digest(one) != weights_digest(other)
    other = Odd()
    other.turned = nn.Parameter(other.turned.detach().clone())
    assert weights_digest(one) != weights_digest(other), "no longer tied"
    with torch.inference_mode():
        assert weights_digest(Odd()) == weights_digest(one)


def test_one_changed_weight_is_a_miss(tmp_path: Path) -> None:
    """By default, whichever it is: nothing of the other model's contexts is found."""
    model = made()
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data[50, 33] += 1e-6
    with opened(tmp_path / "store") as db:
        stored(model, db, prompt())
        assert db.create_session(prompt(), model=model)[1].shape[1] == 1
        assert db.create_session(prompt(), model=changed)[1].shape[1] == 90


def test_threads_may_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ALWAYS", 0)
    model, found, until = tiny(), list[str](), time.monotonic() + 0.1

    def ask() -> None:
        while time.monotonic() < until:
            found.append(weights_digest(model))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
