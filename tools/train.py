"""``alaya-tiers train``: a small Llama of our own that reads books and remembers them, in minutes on a CPU.

Plain `LlamaForCausalLM` (RoPE, grouped queries) on windows of books mixed with tasks of recall (`recall.py`), in
sequences that become longer. Matrices are trained by Muon, the rest by AdamW. The seed decides the initial weights and
every batch, a batch by its number alone, so a run that was interrupted goes on from its checkpoint as if it had not
been: to the same weights on a processor, with the same number of threads.
"""

import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import machine
from alaya_tiers.tools.corpus import read_text
from alaya_tiers.tools.recall import TASKS, Tasks, fit_tokenizer
from alaya_tiers.tools.reporting import one_line_errors

HELD_OUT = 0.05
"""The last share of each book is not trained on."""

UNSEEN_CHARACTERS = 24_000
"""Of each book, kept beside the model: enough to measure it."""

IGNORED = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Some steps of ``rows`` sequences of ``tokens``. mix: weights of the TASKS.

    alphabet: random tokens are of so many different ones, in the first and in the last step; None = of all.
    """

    steps: int
    rows: int
    tokens: int
    mix: tuple[float, ...]
    alphabet: tuple[int, int] | None = None

    def letters(self, step: int) -> int | None:
        """The alphabet at a step of the stage, growing evenly."""
        if self.alphabet is None:
            return None
        first, last = self.alphabet
        return int(first * math.pow(last / first, step / self.steps))


@dataclass(frozen=True, slots=True)
class Preset:
    """A model and how it is trained."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    stages: tuple[Stage, ...]
    matrix_rate: float = 3e-3
    other_rate: float = 1e-3
    rope_theta: float = 1e6

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> tuple[Stage, int | None]:
        """The stage of a step, and its alphabet then."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, stage.letters(step)
            step -= stage.steps
        return self.stages[-1], None


COPY, MIXED = (0.0, 0.0, 1.0, 0.0), (0.4, 0.2, 0.2, 0.2)

PRESETS = {
    "quick": Preset(1, 32, 2, 1, 16, 64, 320, (Stage(3, 8, 64, COPY, (32, 64)), Stage(3, 4, 128, MIXED))),
    "small": Preset(
        3, 128, 4, 2, 64, 384, 512,
        (
            Stage(320, 32, 64, COPY, (32, 32)), Stage(700, 32, 64, COPY, (32, 510)), Stage(300, 16, 128, MIXED),
            Stage(300, 16, 256, MIXED), Stage(200, 8, 512, MIXED), Stage(150, 4, 1024, MIXED),
            Stage(100, 2, 2048, MIXED), Stage(40, 2, 4096, MIXED),
        ),
    ),
    "large": Preset(
        8, 512, 8, 2, 64, 1536, 4096,
        (
            Stage(500, 256, 64, COPY, (32, 32)), Stage(1000, 256, 64, COPY, (32, 4094)), Stage(2000, 256, 256, MIXED),
            Stage(2000, 64, 1024, MIXED), Stage(1500, 16, 4096, MIXED), Stage(1000, 4, 16_384, MIXED),
        ),
    ),
}  # fmt: skip
"""small: minutes on a processor. large: 26 million parameters and 450 million tokens, for a CUDA GPU.

Recall comes soonest from phrases of few different tokens, here within 300 steps of 2,048 tokens; with all 512 tokens
from the start it was not there after 1,500. Then the tokens become more, the sequences longer, and the books join.
"""


def read_books(folder: Path) -> tuple[list[str], list[str]]:
    """The .md and .txt files of a folder, by name: what is trained on, and what is held out. Raises ConfigError."""
    paths = sorted([*folder.glob("*.md"), *folder.glob("*.txt")])
    if not paths:
        raise ConfigError(f"{folder} holds no books: it needs .txt or .md files")
    texts = [read_text(path) for path in paths]
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    return [t[:c] for t, c in zip(texts, cuts, strict=True)], [t[c:] for t, c in zip(texts, cuts, strict=True)]


def build(preset: Preset, positions: int = 1 << 17) -> LlamaForCausalLM:
    """The model, before training: weights of torch's global seed."""
    config = LlamaConfig(
        vocab_size=preset.vocabulary, hidden_size=preset.hidden, intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers, num_attention_heads=preset.heads, num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim, max_position_embeddings=positions, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        initializer_range=0.06, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(tasks: Tasks, preset: Preset, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a step, int64 [rows, tokens]; it depends on nothing else."""
    (stage, letters), rng = preset.stage(step), np.random.default_rng([seed, step])
    tasks = replace(tasks, alphabet=letters)
    names = rng.choice(TASKS, stage.rows, p=np.array(stage.mix) / sum(stage.mix))
    made = [tasks.row(str(name), stage.tokens, rng) for name in names]
    ids = torch.from_numpy(np.stack([ids for ids, _ in made]))
    known = torch.from_numpy(np.stack([known for _, known in made]))
    return ids, ids.masked_fill(~known, IGNORED)


@torch.no_grad()
def judge(model: Any, tasks: Tasks, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Loss (nats a token) and accuracy of what can be known, on new rows of every task; of quotes the phrases alone."""
    found, rows = {}, min(8, max(2, 8192 // n))
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([seed, 1 << 32, number])
        made = [tasks.row(task, n, rng) for _ in range(rows)]
        ids = torch.from_numpy(np.stack([ids for ids, _ in made])).to(model.device)
        known = torch.from_numpy(np.stack([known for _, known in made])).to(model.device)
        if task == "quote":
            known[:, : n * 2 // 3] = False
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        told, truth = logits[known[:, 1:]], ids[:, 1:][known[:, 1:]]
        loss = torch.nn.functional.cross_entropy(told, truth)
        found[task] = {"loss": float(loss), "accuracy": float((told.argmax(-1) == truth).float().mean())}
    return found


def optimizers(model: LlamaForCausalLM, preset: Preset) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for matrices inside the layers, AdamW for the rest, each with its learning rate."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        (torch.optim.Muon(inside, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), preset.matrix_rate),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0), preset.other_rate),
    ]


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: up in the first steps, down to nothing in the last 40 %."""
    return min(1.0, (step + 1) / 50, max(0.02, (steps - step) / (0.4 * steps)))


@dataclass(slots=True)
class Run:
    """Training as it is: what a checkpoint holds."""

    preset: Preset
    seed: int
    model: LlamaForCausalLM
    optimizers: list[tuple[torch.optim.Optimizer, float]]
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, preset: Preset, seed: int, device: str) -> "Run":
        """The first step is still to come. Leaves torch's global random state as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(preset)
        model.to(device)  # type: ignore[arg-type]
        return cls(preset, seed, model, optimizers(model, preset))

    def save(self, path: Path) -> None:
        """Write a checkpoint; the one before stays until this one is whole."""
        facts = {"preset": asdict(self.preset), "seed": self.seed, "step": self.step, "seconds": self.seconds}
        weights = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o, _ in self.optimizers]}
        half = path.with_suffix(".part")
        torch.save(facts | weights | {"curve": self.curve}, half)
        os.replace(half, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ConfigError for one that is damaged or of another preset or seed."""
        try:
            found = torch.load(path, map_location=self.model.device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"cannot read {path}: remove it to begin anew") from error
        if (found["preset"], found["seed"]) != (asdict(self.preset), self.seed):
            raise ConfigError(f"{path} was made with another preset or seed: give those, or remove it")
        self.model.load_state_dict(found["model"])
        for (optimizer, _), state in zip(self.optimizers, found["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.curve = found["step"], found["seconds"], found["curve"]

    def advance(self, tasks: Tasks) -> float:
        """One step; its loss in nats a token."""
        began, steps = time.perf_counter(), self.preset.steps
        for optimizer, most in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = most * rate(self.step, steps)
        ids, labels = (x.to(self.model.device) for x in batch(tasks, self.preset, self.seed, self.step))
        learnt = labels[:, 1:] != IGNORED
        with torch.autocast(self.model.device.type, torch.bfloat16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][learnt]
            logits = self.model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][learnt])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, _ in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - began
        return loss.item()


def train(
    run: Run,
    tasks: Tasks,
    unseen: Tasks,
    checkpoint: Path,
    say: Callable[[Run, float], None],
    seconds: float = math.inf,
) -> bool:
    """All steps that are left, or as many as ``seconds`` allow; whether none is left. A run that stops is saved.

    say: told after each, with its loss. unseen: what the curve is measured on.
    """
    every, end = max(1, run.preset.steps // 40), time.perf_counter() + seconds
    while run.step < run.preset.steps:
        if time.perf_counter() > end:
            run.save(checkpoint)
            return False
        (stage, letters), loss = run.preset.stage(run.step), run.advance(tasks)
        if run.step % every == 0 or run.step == run.preset.steps:
            judged = judge(run.model, replace(unseen, alphabet=letters), stage.tokens, run.seed)
            facts = {"step": run.step, "seconds": round(run.seconds, 1), "tokens": stage.tokens, "alphabet": letters}
            facts |= {"loss": round(loss, 4)}
            run.curve.append(facts | judged)
            run.save(checkpoint)
        say(run, loss)
    return True


def publish(run: Run, tokenizer: Tokenizer, unseen: str, out: Path) -> None:
    """The model in bfloat16 with its tokenizer, its curve, and a text it has not seen, for whoever loads the folder."""
    run.model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    saved: Any = PreTrainedTokenizerFast
    saved(tokenizer_object=tokenizer).save_pretrained(out)
    facts = {"seed": run.seed, "preset": asdict(run.preset), "seconds": round(run.seconds, 1)}
    facts |= {"machine": machine.describe(), "curve": run.curve}
    (out / "curve.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "unseen.txt").write_text(unseen, encoding="utf-8")


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Callable[[Run, float], None]]:
    """A bar on a terminal."""
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=steps)

        def say(run: Run, loss: float) -> None:
            known = "  ".join(f"{name} {run.curve[-1][name]['accuracy']:.0%}" for name in TASKS) if run.curve else ""
            tokens = run.preset.stage(run.step)[0].tokens
            bars.update(task, completed=run.step, description=f"{tokens} tokens  loss {loss:.2f}  {known}")

        yield say


def command(
    books: Annotated[Path, typer.Argument(help="A folder of .txt or .md files to read.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A folder for the model.", show_default=False)],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "small",
    seed: Annotated[int, typer.Option(min=0, help="Decides weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda (never tried there).")] = "cpu",
    minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Stop after so many, to go on when called again. [dim]default: never[/dim]", show_default=False
        ),
    ] = math.inf,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch. [dim]default: torch decides[/dim]", show_default=False)
    ] = None,
) -> None:
    """Trains a small model that reads books and remembers them. Example: alaya-tiers train books/ my-model/

    A run that was interrupted goes on where it was when it is called again. With a GPU: --preset large --device cuda.
    """
    errors = Console(stderr=True)
    with one_line_errors(errors):
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise ConfigError(f"--device {device!r} is not available: take cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # of writing weights
        plan = PRESETS[preset]
        seen, unseen = read_books(books)
        tokenizer = fit_tokenizer(seen, plan.vocabulary)
        run = Run.start(plan, seed, device)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = out / "checkpoint.pt"
        if checkpoint.exists():
            run.resume(checkpoint)
        with progress(errors, plan.steps) as say:
            known_text, unknown = tasks_of(tokenizer, seen), tasks_of(tokenizer, unseen)
            done = train(run, known_text, unknown, checkpoint, say, 60 * minutes)
        if not done:
            where = f"step {run.step:,} of {plan.steps:,} after {run.seconds:,.0f} s"
            Console(file=sys.stdout).print(f"{out}: {where}; call again to go on")
            return
        publish(run, tokenizer, "\n".join(text[-UNSEEN_CHARACTERS:] for text in unseen), out)
        checkpoint.unlink()
    last = run.curve[-1]
    known = ", ".join(f"{name} {last[name]['accuracy']:.1%}" for name in TASKS)
    Console(file=sys.stdout).print(
        f"{out}: {run.step} steps in {run.seconds:,.0f} s; known at {last['tokens']} tokens: {known}"
    )


def tasks_of(tokenizer: Tokenizer, texts: list[str]) -> Tasks:
    """The tasks over some texts."""
    ids = np.concatenate([np.array(tokenizer.encode(text).ids, np.int64) for text in texts])
    return Tasks(ids, tokenizer.get_vocab_size())
