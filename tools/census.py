"""The census of model families: every causal LM class of the installed transformers, made tiny and compared.

Each model generates greedily, for a left-padded batch, with beams and with chunked prefill, once with DynamicCache and
the model's own attention, and once in each mode with a tiered cache so small that blocks are on ssd. Run as a program
it prints docs/compatibility.md:

    python -m alaya_tiers.tools.census > docs/compatibility.md
"""

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from alaya_tiers import AlayaCache
from alaya_tiers.errors import AlayaError
from alaya_tiers.hf import AlayaLayer, handles

Mode = Literal["alaya", "stock", "by hand"]
MODES: tuple[Mode, ...] = ("alaya", "stock", "by hand")
"""AlayaCache.for_model; the cache alone; the cache after ``model.set_attn_implementation("alaya")``."""

BLOCK = 8
PROMPT, NEW = 40, 6
TOLERANCE = 1e-4
"""Largest difference of two logits that counts as rounding, relative to the largest logit."""

# ---------------------------------------------------------------------- tiny configs


def _all(names: str, value: int | None) -> dict[str, int | None]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_all("hidden_size n_embd d_model dim_model_base word_embed_proj_dim embedding_size embedding_dim emb_dim", 64),
    **_all("lru_width attention_hidden_size input_embedding_size output_embedding_size mamba_d_ssm", 64),
    **_all("intermediate_size moe_intermediate_size ffn_dim dim_ff dff ffn_hidden_size decoder_ffn_dim", 48),
    **_all("encoder_ffn_dim expert_ffn_hidden_size intermediate_size_mlp shared_expert_intermediate_size", 48),
    **_all("shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size", 48),
    **_all("dense_intermediate_size feed_forward_size router_hidden_size", 48),
    **_all("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **_all("attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads", 4),
    **_all("linear_num_heads linear_num_value_heads index_n_heads num_query_groups n_mamba_heads", 4),
    **_all("num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads", 2),
    **_all("head_dim d_head dim_head kv_channels attention_head_dim attention_head_size swa_head_dim", 16),
    **_all("index_head_dim v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim", 16),
    **_all("state_size ssm_state_size mamba_d_state hidden_size_per_layer_input ple_embed_dim", 16),
    **_all("qk_nope_head_dim qk_rope_head_dim rotary_dim", 8),
    **_all("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers", 2),
    **_all("num_encoder_layers num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k", 2),
    **_all("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_all("n_group topk_group num_expert_group first_k_dense_replace", 1),
    **_all("kv_lora_rank q_lora_rank o_lora_rank laurel_rank adapter_rank gated_norm_rank hc_lowrank", 16),
    **_all("sliding_window window_size sliding_window_size local_attention attention_chunk_size", 16),
    **_all("attention_window_size query_pre_attn_scalar image_size", 16),
    **_all("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length", 512),
    **_all("model_max_length", 512),
    **_all("vocab_size vocab_size_per_layer_input decoder_vocab_size", 97),
    **_all("index_topk index_block_size chunk_size mamba_chunk_size", 8),
    "index_topk_blocks": 2,
}
"""What the usual fields are set to, where a config has them and they are not None by default."""

ALWAYS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "is_encoder_decoder": False,
}

_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_theta": 1e4, "rope_type": "default"}

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": _HYBRID | {"mamba_n_heads": 8, "mamba_d_head": 16},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "minimax_m3_vl_text": {"num_hidden_layers": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mistral": {"sliding_window": None},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 2,
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What single models need beside or instead of it."""


def families() -> dict[str, str]:
    """Each causal LM class once: model_type -> class name."""
    found: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        cls = getattr(transformers, name)
        best = next((t for t, n in found.items() if n == name), None)
        if best is None:
            found[model_type] = name
        elif CONFIG_MAPPING[model_type] is cls.config_class:
            found.pop(best)
            found[model_type] = name
    return dict(sorted(found.items()))


def tiny_config(cls: type[PretrainedConfig], own: dict[str, Any]) -> PretrainedConfig:
    """A small config of any class: known fields set, lists of layers cut to one layer of each kind."""
    default = cls()
    known = {f.name: vars(default).get(f.name) for f in dataclasses.fields(cls)}
    values = {k: v for k, v in SIZES.items() if known.get(k) is not None}
    values |= {k: v for k, v in ALWAYS.items() if k in known}
    values |= _layers(known, values)
    if "kv_lora_rank" in known:  # MLA: every query head has a key head of its own
        values |= {"num_key_value_heads": 4} if "num_key_value_heads" in known else {}
    for name, part in known.items():
        if isinstance(part, PretrainedConfig):
            values[name] = tiny_config(type(part), own.get(name, {})).to_dict()
    return cls(**(values | own))


def _layers(known: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Fields that speak of each layer, cut to the first layer of each kind."""
    name = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in values), None)
    if name is None:
        return {}
    lists = {k: v for k, v in known.items() if isinstance(v, list) and len(v) == known[name]}
    kinds = list(zip(*lists.values(), strict=True)) if lists else []
    kept = sorted({kinds.index(kind) for kind in kinds})[:4]
    kept = kept if len(kept) > 1 else [0, 1]
    cut = {k: [values.get(k, v[i]) for i in kept] for k, v in lists.items()}
    return {name: len(kept)} | cut


def build(model_type: str) -> PreTrainedModel:
    """The tiny model, with weights large enough for every token of the context to matter."""
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type], OWN.get(model_type, {}))
    model: PreTrainedModel = getattr(transformers, families()[model_type])(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
            weight = module.weight
            assert isinstance(weight, Tensor)
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)  # type: ignore[no-untyped-call]
    return model


# ---------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model in one mode.

    verdict: "exact"; "slow": exact, but some code looked inside and everything was gathered; "prefill": the same, but
    not in plain greedy generation; "own": exact, the model keeps its own attention or no layer is tiered; "refused" by
    the error in note; "differs"; "broken": an error that is none of ours.
    """

    verdict: str
    note: str = ""
    gathered: int = 0
    worst: float = 0.0
    """Largest relative difference of logits."""

    @property
    def right(self) -> bool:
        """Whether the tokens were those of DynamicCache."""
        return self.verdict in ("exact", "prefill", "slow", "own")


class NotComparable(Exception):
    """The model cannot be built from a small config, or fails with DynamicCache itself. The message says why."""


Answer = tuple[Tensor, list[Tensor]]
"""Tokens, and the logits [rows, vocabulary] of each step."""


def _prompt(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(2, 97, (rows, PROMPT), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(rows, PROMPT, dtype=torch.long)
    for row in range(1, rows):
        ids[row, : 9 * row], mask[row, : 9 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


CALLS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "greedy": (_prompt(1), {}),
    "left padding": (_prompt(2), {}),
    "beams": (_prompt(1), {"num_beams": 3}),
    "chunked prefill": (_prompt(1), {"prefill_chunk_size": 7}),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages; one thread, which for models this small is faster than two."""
    level, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)


def _generate(model: PreTrainedModel, cache: DynamicCache, call: str, **changes: Tensor) -> Answer:
    inputs, options = CALLS[call]
    torch.manual_seed(3)
    out: Any = model.generate(  # type: ignore[operator]
        **inputs | changes,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences, list(out.logits)


def _difference(got: Answer, want: Answer, rows_free: bool) -> float:
    """Largest difference of logits, relative to the largest, up to the step after which the tokens may differ.

    A step with another token ends a row (rows_free) or the comparison: after a tie the contexts are different ones.
    Other tokens without a tie show as a difference in the logits of that step.
    """
    worst = 0.0
    same = torch.ones(want[1][0].shape[0], dtype=torch.bool)
    for a, b in zip(got[1], want[1], strict=True):
        if same.any():
            difference = float((a - b)[same].abs().max() / b[same].abs().max().clamp_min(1e-9))
            worst = max(worst, difference) if difference == difference else float("inf")
        chosen = a.argmax(-1) == b.argmax(-1)
        same = same & chosen if rows_free else same & chosen.all()
    return worst if not same.all() or torch.equal(got[0], want[0]) else float("inf")


class Family:
    """One model, its answers with DynamicCache, and the same calls with a tiered cache."""

    def __init__(self, model_type: str) -> None:
        """Raises NotComparable."""
        self.model_type = model_type
        with _quiet():
            try:
                self.model = build(model_type)
            except Exception as error:
                raise NotComparable(f"no small config: {_first_line(error)}") from error
            self._shapes: list[tuple[int, int]] = []
            try:
                self.wanted = {"greedy": self._reference("greedy")}
            except Exception as error:
                raise NotComparable(f"fails with DynamicCache: {_first_line(error)}") from error
            self.failing: list[str] = []
            for call in list(CALLS)[1:]:
                try:
                    self.wanted[call] = self._reference(call)
                except Exception:
                    self.failing.append(call)

    def run(self, mode: Mode) -> Outcome:
        """All calls in one mode; the model is left as it was."""
        parts = [part for part in self.model.modules() if isinstance(part, PreTrainedModel)]
        before = [part.config._attn_implementation for part in parts]
        handles_before = set(handles._warned)
        try:
            with _quiet():
                return self._run(mode)
        finally:
            handles._warned.clear()
            handles._warned.update(handles_before)
            for part, implementation in zip(parts, before, strict=True):  # the outer first: they set the inner ones
                part.config._attn_implementation = implementation
            for module in self.model.modules():
                vars(module).pop("expand_kv", None)

    def _run(self, mode: Mode) -> Outcome:
        gathered, worst, tiered, looked = 0, 0.0, 0, False
        notes = [f"{call} fails with DynamicCache too" for call in self.failing]
        for call, want in self.wanted.items():
            try:
                with self.cache(call, mode) as cache:
                    got = _generate(self.model, cache, call)
                    tiered = sum(isinstance(layer, AlayaLayer) for layer in cache.layers)
                    _check_spilled(cache, tiered)
                    gathered += cache.stats().gathered
                    looked |= call == "greedy" and gathered > 0
            except AlayaError as error:
                return Outcome("refused", type(error).__name__)
            except Exception as error:
                return Outcome("broken", f"{call}: {_first_line(error)}")
            difference = _difference(got, want, call != "beams")
            if call == "left padding" and difference > TOLERANCE and self._pads_leak():
                notes.append("left padding: transformers' own answer depends on what the pad tokens hold")
                continue
            worst = max(worst, difference)
            if not difference <= TOLERANCE:
                return Outcome("differs", f"{call}: logits by {difference:.1g}", gathered, worst)
        notes += [] if tiered else ["no layer of plain full attention: nothing is tiered"]
        parts = (part for part in self.model.modules() if isinstance(part, PreTrainedModel))
        switched = any(part.config._attn_implementation == "alaya" for part in parts)
        kept = not tiered or (mode != "stock" and not switched)
        verdict = "slow" if looked else "prefill" if gathered else "own" if kept else "exact"
        return Outcome(verdict, "; ".join(notes), gathered, worst)

    def sensitivity(self) -> float:
        """How much the logits change with the first block of the prompt, which in the tiered cache is not in memory."""
        other = CALLS["greedy"][0]["input_ids"].clone()
        other[:, :BLOCK] = other[:, :BLOCK] % 90 + 4
        with _quiet():
            answer = _generate(self.model, DynamicCache(config=self.model.config), "greedy", input_ids=other)
        return _difference((answer[0], answer[1][:1]), (answer[0], self.wanted["greedy"][1][:1]), True)

    def _pads_leak(self) -> bool:
        """Whether the padded answer of the model itself changes with the pad tokens, which are masked."""
        inputs, _ = CALLS["left padding"]
        other = torch.where(inputs["attention_mask"] == 0, 5, inputs["input_ids"])
        answer = _generate(self.model, DynamicCache(config=self.model.config), "left padding", input_ids=other)
        return _difference(answer, self.wanted["left padding"], True) > TOLERANCE

    def cache(self, call: str, mode: Mode) -> AlayaCache:
        """A tiered cache for the call with room for little more than what must be in memory."""
        inputs, options = CALLS[call]
        rows = inputs["input_ids"].shape[0] * options.get("num_beams", 1)
        runs = [heads * -(-BLOCK * width * 4 // 4096) * 4096 for heads, width in self._shapes]
        largest, full = max(runs, default=4096), PROMPT // BLOCK * len(runs) * rows
        sizes = {"device_budget": rows * sum(runs) + largest, "host_budget": max(3, full // 2) * largest}
        settings: dict[str, Any] = {"block_tokens": BLOCK, "segment_tokens": 4 * BLOCK, "io": "buffered", **sizes}
        if mode == "alaya":
            return AlayaCache.for_model(self.model, **settings)
        if mode == "by hand":
            self.model.set_attn_implementation("alaya")
        return AlayaCache(config=self.model.config, **settings)

    def _reference(self, call: str) -> Answer:
        cache = DynamicCache(config=self.model.config)
        answer = _generate(self.model, cache, call)
        plain = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.is_initialized]
        self._shapes = []
        for layer in plain:
            k, v = layer.keys, layer.values
            assert k is not None
            assert v is not None
            self._shapes.append((k.shape[1], k.shape[3] + v.shape[3]))
        if not any(layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")):
            raise NotComparable("does not use the cache it is given")
        return answer


def _check_spilled(cache: AlayaCache, tiered: int) -> None:
    if tiered and not (cache.stats().written_bytes and cache.stats().tiers["ssd"].used):
        raise RuntimeError("nothing went to ssd: the run proves nothing")


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:110]}{'...' if len(text) > 110 else ''}"


# ---------------------------------------------------------------------- the table

WORDS = {
    "exact": "exact",
    "prefill": "exact, slow prefill",
    "slow": "exact, slow",
    "own": "exact, own attention",
    "refused": "refused",
    "differs": "**differs**",
}


def _row(model_type: str, name: str) -> str:
    try:
        family = Family(model_type)
    except NotComparable as why:
        return f"| {model_type} | {name} | – | – | – | {why} |"
    outcomes = [family.run(mode) for mode in MODES]
    notes = dict.fromkeys(outcome.note for outcome in outcomes if outcome.note)
    cells = (WORDS.get(outcome.verdict, f"**{outcome.verdict}**") for outcome in outcomes)
    return f"| {model_type} | {name} | {' | '.join(cells)} | {'; '.join(notes)} |"


def main() -> None:
    """Print docs/compatibility.md; progress goes to stderr."""
    if len(sys.argv) > 1:
        print(__doc__)
        return
    names = families()
    rows = []
    for number, (model_type, name) in enumerate(names.items(), 1):
        print(f"{number}/{len(names)} {model_type}", file=sys.stderr)
        rows.append(_row(model_type, name))
    ours, theirs = version("alaya-tiers"), version("transformers")
    print(HEADER.format(ours=ours, transformers=theirs, torch=torch.__version__.partition("+")[0], count=len(names)))
    print("\n".join(rows))


HEADER = """# Compatibility

Generated with alaya-tiers {ours}, transformers {transformers} and torch {torch}; do not edit:

    python -m alaya_tiers.tools.census > docs/compatibility.md

Each of the {count} causal LM classes of transformers, made tiny with random weights, generates greedily, for a
left-padded batch, with three beams, and with prefill in chunks of 7 tokens. Tokens and logits are compared with
`DynamicCache` and the model's own attention. Blocks have 8 tokens and budgets are so small that blocks are on ssd.

* **alaya**: `AlayaCache.for_model(model)`, `attach` or `custom_generate`; **stock**: `AlayaCache(config=model.config)`,
  the model's attention left alone; **by hand**: the same after `model.set_attn_implementation("alaya")`, or
  `attn_implementation="alaya"` in `from_pretrained`.
* *exact*: the same tokens, nothing gathered.
* *exact, slow*: the same tokens; some code looked inside the cache, and all keys and values of a layer were gathered.
  `stats().gathered` counts it, and the first time of each operation is a warning.
* *exact, slow prefill*: the same, but only for chunked prefill and for the prompt of a padded batch.
* *exact, own attention*: the same tokens; the model keeps its own attention.
* *refused*: an error, named in the note, instead of a wrong answer.
* –: not comparable; the note says why.

| family | class | alaya | stock | by hand | note |
|---|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
