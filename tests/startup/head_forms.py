# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The forms in which EAGLE-3 heads are published, each made tiny with random weights.

A form is a config.json as its exporter writes it, at the sizes of the tests' target, and the
tensors that lie beside it. `FORMS` has them all, with what becomes of each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, VOCAB, DRAFT, LAYERS, LENGTH = 64, 12, 9, 8, 512
"""Of the target that the forms fit; DRAFT is the head's own vocabulary."""

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]

FLAT: Config = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
"""As SpecForge writes it."""


def config(**changes: Any) -> Config:
    """FLAT with `changes`; a value of `...` removes the field."""
    return {name: value for name, value in (FLAT | changes).items() if value is not ...}


def speculators(layer: Config | None = None, **changes: Any) -> Config:
    """The format of the speculators library, whose layer has its own config."""
    inner = config(
        architectures=..., draft_vocab_size=..., rope_scaling=..., torch_dtype=..., **(layer or {})
    )
    outer: Config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.2.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "target", "architectures": ["LlamaForCausalLM"]},
        },
        "draft_vocab_size": DRAFT,
        "norm_before_residual": True,
        "target_hidden_size": None,
        "torch_dtype": "bfloat16",
        "transformer_layer_config": inner,
        "transformers_version": "4.55.0",
    }
    return {name: value for name, value in (outer | changes).items() if value is not ...}


def tensors(
    *,
    hidden: int = HIDDEN,
    target_hidden: int = HIDDEN,
    vocab: int = VOCAB,
    draft: int | None = DRAFT,
    features: int = 3,
    layer: str = "midlayer",
    layers: int = 1,
    queries: int = 128,
    seed: int = 1,
) -> Tensors:
    """What SpecForge writes; `draft` None is a head that drafts the whole vocabulary, unmapped."""
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        made[name] = torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    matrix("fc.weight", hidden, features * target_hidden)
    for i in range(layers):
        prefix = layer if i == 0 else f"layers.{i}"
        width = 2 * hidden if i == 0 else hidden
        for name, rows, columns, gain in (
            ("self_attn.q_proj", queries, width, 2.0),
            ("self_attn.k_proj", 64, width, 2.0),
            ("self_attn.v_proj", 64, width, 1.0),
            ("self_attn.o_proj", hidden, queries, 1.5),
            ("mlp.gate_proj", 96, hidden, 1.0),
            ("mlp.up_proj", 96, hidden, 1.0),
            ("mlp.down_proj", hidden, 96, 1.0),
        ):
            matrix(f"{prefix}.{name}.weight", rows, columns, gain)
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            made[f"{prefix}.{name}.weight"] = torch.ones(hidden)
    made["norm.weight"] = torch.ones(hidden)
    matrix("lm_head.weight", draft or vocab, hidden, 2.0)
    if draft is not None:
        made |= maps(draft, vocab)
    return made


def maps(draft: int, vocab: int) -> Tensors:
    """`d2t` and `t2d` of a head that drafts the last `draft` tokens of `vocab`."""
    chosen = torch.arange(vocab - draft, vocab)
    return {
        "d2t": chosen - torch.arange(draft),
        "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill(0, chosen, True),
    }


def embeddings(vocab: int = VOCAB, hidden: int = HIDDEN) -> Tensors:
    """A head's own embeddings."""
    noise = torch.randn(vocab, hidden, generator=torch.Generator().manual_seed(2))
    return {"embed_tokens.weight": noise}


def write(folder: Path, form: Form) -> Path:
    """A head in one file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(form.config))
    if form.file.endswith(".bin"):
        torch.save(form.tensors, folder / form.file)
    else:
        save_file(form.tensors, folder / form.file)
    return folder


@dataclass(frozen=True)
class Form:
    """One form of a head.

    Attributes:
        config: its config.json.
        tensors: its weights.
        target: which of the tests' targets it is for.
        file: that holds the weights.
        refused: what the sentence that refuses it says; empty if it runs, as stock does.
        why_stock_starts: what stock vLLM starts with although it cannot work, and is refused here.
    """

    config: Config = field(default_factory=config)
    tensors: Tensors = field(default_factory=tensors)
    target: str = "plain"
    file: str = "model.safetensors"
    refused: str = ""
    why_stock_starts: str = ""


def without(tensors: Tensors, *parts: str) -> Tensors:
    """`tensors` but for those that have one of `parts` in their names."""
    return {
        name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)
    }


def ones(**shapes: int) -> Tensors:
    """Norms of ones, by the name of the tensor without `.weight`."""
    return {f"{name}.weight": torch.ones(size) for name, size in shapes.items()}


def qwen3(tensors: Tensors, layer: str = "midlayer") -> Tensors:
    """`tensors` with those that a Qwen3 layer has beside Llama's."""
    norms = {f"{layer}.self_attn.{kind}_norm.weight": torch.ones(32) for kind in "qk"}
    return tensors | norms


def biases(*names: str, **sizes: int) -> Tensors:
    """Small biases of the layer's parts."""
    return {
        f"midlayer.{part}.{name}_proj.bias": torch.full((size,), 0.01)
        for part in names
        for name, size in sizes.items()
    }


def int8(tensors: Tensors) -> Tensors:
    """`tensors` with the layers' projections in eight bits and a scale a row."""
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            packed[f"{name}_scale"] = scale
            tensor = (tensor / scale).round().to(torch.int8)
        packed[name] = tensor
    return packed


INT8: Config = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*fc$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
NUMBERED = tensors(layer="layers.0")
WHOLE = tensors(draft=None)
IDS = "eagle_aux_hidden_state_layer_ids"
QWEN3: Config = {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"}
MODELOPT: Config = {
    IDS: [],
    "use_aux_hidden_state": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": None,
}

FORMS: dict[str, Form] = {
    # SafeAILab, SpecForge, AngelSlim: one flat config.json.
    "specforge": Form(config(eagle_config={IDS: [1, 4, 6], "use_aux_hidden_state": True})),
    "ids at the top": Form(config(**{IDS: [1, 4, 6]})),
    "ids of the embeddings and the last layer": Form(config(**{IDS: [0, 4, 8]})),
    "bare llama, short positions": Form(
        config(architectures=["LlamaForCausalLM"], max_position_embeddings=64)
    ),
    "angelslim": Form(config(architectures=["Eagle3LlamaForCausalLM"])),
    "phi3": Form(config(model_type="phi3", pad_token_id=1)),
    "qwen2": Form(
        config(
            model_type="qwen2",
            sliding_window=32768,
            use_sliding_window=False,
            max_window_layers=1,
            eos_token_id=[1, 2],
            target_model_type="qwen2",
        )
    ),
    "own embeddings": Form(tensors=tensors() | embeddings()),
    "pytorch_model.bin": Form(file="pytorch_model.bin"),
    "draft_vocab_size null": Form(config(draft_vocab_size=None), WHOLE),
    "no lm_head": Form(config(draft_vocab_size=None), without(WHOLE, "lm_head")),
    "t2d without d2t": Form(
        config(draft_vocab_size=VOCAB), WHOLE | {"t2d": torch.ones(VOCAB, dtype=torch.bool)}
    ),
    "d2t at the whole vocabulary": Form(
        config(draft_vocab_size=VOCAB),
        WHOLE | maps(VOCAB, VOCAB),
        refused="has a tensor d2t although it drafts the target's whole vocabulary "
        "(draft_vocab_size 12 in its config.json), which vLLM cannot load; remove d2t and t2d",
    ),
    "narrower": Form(
        config(target_hidden_size=128), tensors(target_hidden=128) | embeddings(), "broad"
    ),
    "narrower without embeddings": Form(
        config(target_hidden_size=128),
        tensors(target_hidden=128),
        "broad",
        refused="its weights lack embed_tokens.weight, and the target's do not fit it; download",
        why_stock_starts="with embeddings as they were allocated",
    ),
    "narrower without lm_head": Form(
        config(target_hidden_size=128, draft_vocab_size=None),
        without(tensors(target_hidden=128, draft=None), "lm_head") | embeddings(),
        "broad",
        refused="its weights lack lm_head.weight, and the target's do not fit it; download",
    ),
    "two layers": Form(config(num_hidden_layers=2), tensors(layers=2)),
    "biases": Form(
        config(attention_bias=True, mlp_bias=True),
        tensors()
        | biases("self_attn", q=128, k=64, v=64, o=HIDDEN)
        | biases("mlp", gate=96, up=96, down=HIDDEN),
    ),
    "logit_scale": Form(config(logit_scale=0.5)),
    "inverse frequencies": Form(
        tensors=tensors() | {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    ),
    # Rotary positions and windows.
    "llama3": Form(
        config(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        )
    ),
    "nebius: yarn, truncated vocabulary": Form(
        config(
            architectures=["LlamaForCausalLM"],
            truncated_vocab_size=DRAFT,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "truncate": False,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        )
    ),
    "mrope": Form(config(rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]})),
    "rope_theta null": Form(
        config(rope_theta=None), refused="has rope_theta null in its config.json, which rotary "
    ),
    "llama3 without its factor": Form(
        config(rope_scaling={"rope_type": "llama3", "low_freq_factor": 1.0}),
        refused="factor",
    ),
    "sliding window": Form(config(sliding_window=8, layer_types=["sliding_attention"])),
    "sliding window unused": Form(config(sliding_window=8, use_sliding_window=False)),
    "qwen3 sliding window": Form(
        config(
            **QWEN3,
            sliding_window=8,
            use_sliding_window=True,
            max_window_layers=0,
            layer_types=["sliding_attention"],
        ),
        qwen3(tensors()),
    ),
    # EAGLE-3.1 and other norms.
    "3.1: fc_norm, norm_output": Form(
        config(fc_norm=True, norm_output=True),
        tensors() | {f"fc_norm.{i}.weight": torch.ones(HIDDEN) for i in range(3)},
    ),
    "fc_norm unsaid": Form(
        tensors=tensors() | {f"fc_norm.{i}.weight": torch.ones(HIDDEN) for i in range(3)},
        refused="has a tensor fc_norm.0.weight in its weights, which vLLM does not know in a head "
        "with its config.json; set fc_norm to true in its config.json",
    ),
    "norm_before_fc": Form(
        config(eagle_config={IDS: [2, 4, 6], "norm_before_fc": True}),
        tensors() | ones(input_norm=3 * HIDDEN),
    ),
    "norm_before_residual": Form(config(norm_before_residual=True)),
    # As many layers of the target as the head reads.
    "llama, 2 layers": Form(config(num_aux_hidden_states=2, **{IDS: [2, 5]}), tensors(features=2)),
    "llama, 2 layers unsaid": Form(
        config(**{IDS: [2, 5]}),
        tensors(features=2),
        refused="reads the target after layers [2, 5] (eagle_aux_hidden_state_layer_ids in its "
        "config.json), which are not 3 different layers of a target with 8; set "
        "num_aux_hidden_states to 2 in its config.json.",
    ),
    "llama, 4 layers": Form(config(eagle_config={IDS: [2, 3, 5, 6]}), tensors(features=4)),
    "qwen3, 2 layers": Form(
        config(architectures=["Qwen3ForCausalLM"], model_type="qwen3", num_aux_layers=2)
        | {IDS: [2, 5]},
        qwen3(tensors(features=2)),
    ),
    "qwen3, 4 layers": Form(config(**QWEN3, **{IDS: [2, 3, 5, 6]}), qwen3(tensors(features=4))),
    "a layer that the target lacks": Form(
        config(**{IDS: [1, 4, 9]}),
        refused="reads the target after layers [1, 4, 9] (eagle_aux_hidden_state_layer_ids in its "
        "config.json), which are not 3 different layers of a target with 8; name other layers",
        why_stock_starts="and reads memory that is not its own",
    ),
    # The speculators library.
    "Eagle3Speculator": Form(speculators() | {IDS: [2, 4, 6]}, NUMBERED),
    "Eagle3DraftModel": Form(
        speculators(
            {"rope_theta": ..., "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            architectures=["Eagle3DraftModel"],
            dtype="bfloat16",
            torch_dtype=...,
            embed_requires_grad=False,
            norm_before_fc=False,
        ),
        NUMBERED | embeddings(),
    ),
    "speculators, norm_before_fc": Form(
        speculators(norm_before_fc=True), NUMBERED | ones(input_norm=3 * HIDDEN)
    ),
    "speculators, 4 layers": Form(
        speculators(norm_before_fc=True, norm_output=True, auto_map={"": "config.X"})
        | {IDS: [2, 4, 6, 7]},
        tensors(layer="layers.0", features=4) | ones(input_norm=4 * HIDDEN),
        refused="set num_aux_hidden_states to 4 in transformer_layer_config of its config.json.",
    ),
    "speculators, 4 layers said": Form(
        speculators({"num_aux_hidden_states": 4}, **{IDS: [2, 4, 6, 7]}),
        tensors(layer="layers.0", features=4),
    ),
    "speculators, qwen3, 4 layers": Form(
        speculators({"model_type": "qwen3"}, **{IDS: [2, 4, 6, 7]}),
        qwen3(tensors(layer="layers.0", features=4), "layers.0"),
    ),
    "speculators, phi3": Form(
        speculators({"model_type": "phi3"}),
        NUMBERED,
        refused='has model_type "phi3" in transformer_layer_config of its config.json, which must '
        "be llama or qwen3 for vLLM",
    ),
    "speculators, hidden_act missing": Form(
        speculators({"hidden_act": ...}),
        NUMBERED,
        refused="has hidden_act null in transformer_layer_config of its config.json",
    ),
    # ModelOpt.
    "modelopt": Form(
        config(
            head_dim=None,
            num_attention_heads=2,
            transformers_version=None,
            pad_token_id=None,
            draft_vocab_size=VOCAB,
            eagle_config={**MODELOPT, IDS: [1, 4, 6], "use_aux_hidden_state": True},
        ),
        tensors(draft=None, layer="layers.0", queries=HIDDEN),
    ),
    "modelopt, last layer only": Form(
        config(
            head_dim=None,
            num_attention_heads=2,
            draft_vocab_size=VOCAB,
            eagle_config=MODELOPT,
        ),
        without(
            tensors(draft=None, layer="layers.0", queries=HIDDEN), "fc.", "layers.0.hidden_norm"
        ),
    ),
    "quantised": Form(config(quantization_config=INT8), int8(tensors())),
    "quantised, not whole": Form(
        config(quantization_config=INT8),
        without(int8(tensors()), "o_proj"),
        refused="its weights lack midlayer.self_attn.o_proj.weight; download it again",
        why_stock_starts="with a projection as it was allocated",
    ),
    "target_hidden_size null": Form(
        config(target_hidden_size=None),
        refused="has target_hidden_size null in its config.json, which vLLM cannot read; remove",
    ),
    "logit_scale null": Form(
        config(logit_scale=None), refused="has logit_scale null in its config.json"
    ),
    # Vocabularies that differ.
    "target with added tokens": Form(config(draft_vocab_size=None), WHOLE, "wide"),
    "target with added tokens, d2t": Form(target="wide"),
    "target with added tokens, its lm_head": Form(
        config(draft_vocab_size=None), without(WHOLE, "lm_head"), "wide"
    ),
    "target with added tokens, own embeddings": Form(
        tensors=tensors() | embeddings(), target="wide"
    ),
    "target with fewer tokens, d2t": Form(
        tensors=tensors() | {"d2t": torch.zeros(DRAFT, dtype=torch.int64)}, target="small"
    ),
    "target with fewer tokens": Form(config(draft_vocab_size=None), WHOLE, "small"),
    # Not heads that vLLM drafts with one token at a time, not whole, or not for it.
    "P-EAGLE": Form(
        config(architectures=["PeagleLlamaForCausalLM"]),
        refused="has architecture PeagleLlamaForCausalLM in its config.json",
    ),
    "P-EAGLE, speculators": Form(
        speculators(
            speculators_model_type="peagle", architectures=["PEagleDraftModel"], mask_token_id=3
        ),
        NUMBERED | {"mask_hidden": torch.ones(1, 3 * HIDDEN)},
        refused='has speculators_model_type "peagle" in its config.json, which is not "eagle3"',
        why_stock_starts="as if it drafted one token at a time",
    ),
    "MiniCPM": Form(
        config(
            architectures=["MiniCPMForCausalLMEagle3"],
            model_type="minicpm3",
            draft_vocab_size=None,
        ),
        refused="has architecture MiniCPMForCausalLMEagle3 in its config.json",
    ),
    "MLA": Form(
        config(
            architectures=["Eagle3DeepseekV2ForCausalLM"],
            model_type="kimi_k2",
            draft_vocab_size=None,
        ),
        refused="has architecture Eagle3DeepseekV2ForCausalLM in its config.json, whose multi-head "
        "latent attention (MLA)",
    ),
    "gelu": Form(config(hidden_act="gelu"), refused='has hidden_act "gelu" in its config.json'),
    "a tensor too many": Form(
        tensors=tensors() | ones(verifier_norm=HIDDEN),
        refused="has a tensor verifier_norm.weight in its weights, which vLLM does not know",
    ),
    "a layer that is not whole": Form(
        tensors=without(tensors(), "q_proj"),
        refused="its weights lack midlayer.self_attn.q_proj.weight; download it again",
        why_stock_starts="with a projection as it was allocated",
    ),
    "lm_head missing": Form(
        tensors=without(tensors(), "lm_head"),
        refused="its weights lack lm_head.weight",
        why_stock_starts="with the target's rows of other tokens",
    ),
    "a norm missing": Form(tensors=without(tensors(), "hidden_norm")),
}
