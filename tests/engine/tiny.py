# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tiny random models for tests that need many tokens or the whole output distribution.

With a vocabulary of a dozen tokens a random draft head is often right by chance, so that
acceptance, rejection and every branch of a tree are exercised, and the joint distribution of the
first tokens can be enumerated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny Llama."""

    vocab: int = 12
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 96
    max_len: int = 512


def _config(shape: Shape, architecture: str, layers: int) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }


class _Weights:
    """Random matrices with gains that keep activations of order one and logits well apart."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        noise = torch.randn(rows, columns, generator=self.generator)
        self.tensors[name] = noise * gain / columns**0.5

    def ones(self, name: str, size: int) -> None:
        self.tensors[name] = torch.ones(size)

    def layer(self, prefix: str, shape: Shape, qkv_in: int, experts: int = 0) -> None:
        width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.matrix(f"{prefix}.self_attn.q_proj.weight", width, qkv_in, 2.0)
        self.matrix(f"{prefix}.self_attn.k_proj.weight", kv, qkv_in, 2.0)
        self.matrix(f"{prefix}.self_attn.v_proj.weight", kv, qkv_in)
        self.matrix(f"{prefix}.self_attn.o_proj.weight", shape.hidden, width, 1.5)
        mlps = [f"{prefix}.mlp.experts.{i}" for i in range(experts)] or [f"{prefix}.mlp"]
        for mlp in mlps:
            self.matrix(f"{mlp}.gate_proj.weight", shape.mlp, shape.hidden)
            self.matrix(f"{mlp}.up_proj.weight", shape.mlp, shape.hidden)
            self.matrix(f"{mlp}.down_proj.weight", shape.hidden, shape.mlp)
        self.ones(f"{prefix}.input_layernorm.weight", shape.hidden)
        self.ones(f"{prefix}.post_attention_layernorm.weight", shape.hidden)

    def save(self, folder: Path, config: dict[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.tensors, folder / "model.safetensors")
        return folder


def make_target(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """Write a random Llama checkpoint."""
    weights = _Weights(seed)
    weights.matrix("model.embed_tokens.weight", shape.vocab, shape.hidden, shape.hidden**0.5)
    for i in range(shape.layers):
        weights.layer(f"model.layers.{i}", shape, shape.hidden)
    weights.ones("model.norm.weight", shape.hidden)
    weights.matrix("lm_head.weight", shape.vocab, shape.hidden, 2.0)
    return weights.save(folder, _config(shape, "LlamaForCausalLM", shape.layers))


def make_moe_target(
    folder: Path, shape: Shape = Shape(), seed: int = 0, experts: int = 8, active: int = 2
) -> Path:
    """Write a random Qwen3 mixture of experts, of which each token takes `active`."""
    weights = _Weights(seed)
    weights.matrix("model.embed_tokens.weight", shape.vocab, shape.hidden, shape.hidden**0.5)
    for i in range(shape.layers):
        prefix = f"model.layers.{i}"
        weights.layer(prefix, shape, shape.hidden, experts)
        weights.matrix(f"{prefix}.mlp.gate.weight", experts, shape.hidden, 2.0)
        weights.ones(f"{prefix}.self_attn.q_norm.weight", shape.head_dim)
        weights.ones(f"{prefix}.self_attn.k_norm.weight", shape.head_dim)
    weights.ones("model.norm.weight", shape.hidden)
    weights.matrix("lm_head.weight", shape.vocab, shape.hidden, 2.0)
    config = _config(shape, "Qwen3MoeForCausalLM", shape.layers)
    return weights.save(
        folder,
        config
        | {
            "model_type": "qwen3_moe",
            "num_experts": experts,
            "num_experts_per_tok": active,
            "moe_intermediate_size": shape.mlp,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    )


def make_head(
    folder: Path,
    shape: Shape = Shape(),
    seed: int = 1,
    draft_vocab: int | None = None,
    *,
    target_hidden: int | None = None,
    layers: int = 1,
    aux: bool = True,
    **config_fields: Any,
) -> Path:
    """Write a random EAGLE-3 head.

    Args:
        folder: where to.
        shape: of the head itself; vocab is the target's.
        seed: of the weights.
        draft_vocab: tokens that the head can draft; all by default.
        target_hidden: hidden size of the target, by default the head's.
        layers: of the head.
        aux: whether it reads three layers of the target, or only the last.
        config_fields: more fields for its config.json.
    """
    weights = _Weights(seed)
    draft = draft_vocab or shape.vocab
    config = _config(shape, "LlamaForCausalLMEagle3", layers)
    config |= {"draft_vocab_size": draft, **config_fields}
    if aux:
        config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
        weights.matrix("fc.weight", shape.hidden, 3 * (target_hidden or shape.hidden))
    else:
        config["eagle_config"] = {"use_aux_hidden_state": False}
    if target_hidden:
        config["target_hidden_size"] = target_hidden
        weights.matrix("embed_tokens.weight", shape.vocab, shape.hidden, shape.hidden**0.5)
    weights.layer("midlayer", shape, 2 * shape.hidden)
    weights.ones("midlayer.hidden_norm.weight", shape.hidden)
    for i in range(1, layers):
        weights.layer(f"layers.{i}", shape, shape.hidden)
        weights.ones(f"layers.{i}.hidden_norm.weight", shape.hidden)
    weights.ones("norm.weight", shape.hidden)
    weights.matrix("lm_head.weight", draft, shape.hidden, 2.0)
    if draft < shape.vocab:  # vLLM has no vocabulary map for a head with the whole vocabulary.
        chosen = torch.randperm(shape.vocab, generator=weights.generator)[:draft].sort().values
        weights.tensors["d2t"] = chosen - torch.arange(draft)
        seen = torch.zeros(shape.vocab, dtype=torch.bool)
        weights.tensors["t2d"] = seen.index_fill(0, chosen, True)
    return weights.save(folder, config)
