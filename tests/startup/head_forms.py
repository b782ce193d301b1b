# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The forms in which EAGLE-3 heads are published, each made tiny with random weights.

A form is a config.json as its exporter writes it, at the sizes of the tests' target, and the
tensors that lie beside it.
"""

from __future__ import annotations

import json
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
    mlp: int = 96,
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
            ("self_attn.q_proj", 128, width, 2.0),
            ("self_attn.k_proj", 64, width, 2.0),
            ("self_attn.v_proj", 64, width, 1.0),
            ("self_attn.o_proj", hidden, 128, 1.5),
            ("mlp.gate_proj", mlp, hidden, 1.0),
            ("mlp.up_proj", mlp, hidden, 1.0),
            ("mlp.down_proj", hidden, mlp, 1.0),
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


def write(folder: Path, config: Config, tensors: Tensors) -> Path:
    """A head in one safetensors file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder
