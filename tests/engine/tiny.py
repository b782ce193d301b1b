# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tiny random models for tests that need many tokens or the whole output distribution.

With a vocabulary of a dozen tokens a random draft head is often right by chance, so that
acceptance, rejection and every branch of a tree are exercised, and the joint distribution of the
first tokens can be enumerated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


def add_letters(folder: Path, tokens: str | Sequence[str], **special: str) -> Path:
    """Give a target a tokenizer of single letters; `special` names some of them, like eos_token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": tokens[0], **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


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

    def bias(self, name: str, *shape: int, gain: float = 0.3) -> None:
        self.tensors[name] = torch.randn(shape, generator=self.generator) * gain

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
    _text(weights, shape)
    return weights.save(folder, _config(shape, "LlamaForCausalLM", shape.layers))


def make_moe_target(
    folder: Path, shape: Shape = Shape(), seed: int = 0, experts: int = 8, active: int = 2
) -> Path:
    """Write a random Qwen3 mixture of experts, of which each token takes `active`."""
    weights = _Weights(seed)

    def layer(prefix: str) -> None:
        weights.layer(prefix, shape, shape.hidden, experts)
        weights.matrix(f"{prefix}.mlp.gate.weight", experts, shape.hidden, 2.0)
        _qk_norms(weights, shape, prefix)

    _text(weights, shape, layer=layer)
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


def _text(
    weights: _Weights,
    shape: Shape,
    prefix: str = "model",
    layer: Callable[[str], None] | None = None,
) -> None:
    """The weights of a text model under `prefix`: `layer` adds those of a layer by its name, by
    default those of a Llama's."""
    weights.matrix(f"{prefix}.embed_tokens.weight", shape.vocab, shape.hidden, shape.hidden**0.5)
    for i in range(shape.layers):
        if layer is None:
            weights.layer(f"{prefix}.layers.{i}", shape, shape.hidden)
        else:
            layer(f"{prefix}.layers.{i}")
    weights.ones(f"{prefix}.norm.weight", shape.hidden)
    weights.matrix("lm_head.weight", shape.vocab, shape.hidden, 2.0)


def _qk_norms(weights: _Weights, shape: Shape, prefix: str) -> None:
    """Of one layer of a Qwen3."""
    for name in ("q_norm", "k_norm"):
        weights.ones(f"{prefix}.self_attn.{name}.weight", shape.head_dim)


def make_llava(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """Write a LLaVA with a random Llama and nothing to see with, to be served as text."""
    weights = _Weights(seed)
    _text(weights, shape, "model.language_model")
    text = _config(shape, "LlamaForCausalLM", shape.layers)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 2}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision | {"num_hidden_layers": 2, "intermediate_size": 32},
        "image_token_index": 0,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float32",
    }
    return weights.save(folder, config)


def make_qwen3(folder: Path, shape: Shape = Shape(), seed: int = 0, **fields: Any) -> Path:
    """Write a random Qwen3 with `fields` in its config."""
    weights = _Weights(seed)
    _text(weights, shape)
    for i in range(shape.layers):
        _qk_norms(weights, shape, f"model.layers.{i}")
    config = _config(shape, "Qwen3ForCausalLM", shape.layers) | {"model_type": "qwen3"}
    if "rope_parameters" in fields:
        config.pop("rope_theta")
    return weights.save(folder, config | fields)


def make_qwen3_vl(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """Write a Qwen3-VL with a random text model, whose positions are M-RoPE's, to be served as
    text."""
    weights = _Weights(seed)
    _text(weights, shape, "model.language_model")
    for i in range(shape.layers):
        _qk_norms(weights, shape, f"model.language_model.layers.{i}")
    text = _config(shape, "Qwen3VLForConditionalGeneration", shape.layers)
    section = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2}
    vision |= {"intermediate_size": 32, "out_hidden_size": shape.hidden}
    vision["deepstack_visual_indexes"] = [0]
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text | {"model_type": "qwen3_vl_text", "rope_scaling": section},
        "vision_config": vision,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return weights.save(folder, config)


def make_gpt_oss(
    folder: Path, shape: Shape = Shape(), seed: int = 0, experts: int = 4, window: int = 24
) -> Path:
    """Write a random gpt-oss: attention sinks, a window of `window` tokens in every other layer,
    experts with biases."""
    weights = _Weights(seed)
    hidden, mlp = shape.hidden, 64

    def layer(prefix: str) -> None:
        width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        for name, rows, columns, gain in (
            ("q_proj", width, hidden, 2.0),
            ("k_proj", kv, hidden, 2.0),
            ("v_proj", kv, hidden, 1.0),
            ("o_proj", hidden, width, 1.5),
        ):
            weights.matrix(f"{prefix}.self_attn.{name}.weight", rows, columns, gain)
            weights.bias(f"{prefix}.self_attn.{name}.bias", rows)
        # As large as the best scores, so that they take a share that is not to be overlooked.
        weights.bias(f"{prefix}.self_attn.sinks", shape.heads, gain=2.0)
        weights.matrix(f"{prefix}.mlp.router.weight", experts, hidden, 2.0)
        weights.bias(f"{prefix}.mlp.router.bias", experts)
        weights.bias(
            f"{prefix}.mlp.experts.gate_up_proj", experts, hidden, 2 * mlp, gain=hidden**-0.5
        )
        weights.bias(f"{prefix}.mlp.experts.gate_up_proj_bias", experts, 2 * mlp)
        weights.bias(f"{prefix}.mlp.experts.down_proj", experts, mlp, hidden, gain=mlp**-0.5)
        weights.bias(f"{prefix}.mlp.experts.down_proj_bias", experts, hidden)
        weights.ones(f"{prefix}.input_layernorm.weight", hidden)
        weights.ones(f"{prefix}.post_attention_layernorm.weight", hidden)

    _text(weights, shape, layer=layer)
    kinds = ["sliding_attention", "full_attention"] * shape.layers
    config = _config(shape, "GptOssForCausalLM", shape.layers)
    return weights.save(
        folder,
        config
        | {
            "model_type": "gpt_oss",
            "intermediate_size": mlp,
            "num_local_experts": experts,
            "num_experts_per_tok": 2,
            "sliding_window": window,
            "layer_types": kinds[: shape.layers],
            "attention_bias": True,
            "swiglu_limit": 7.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": shape.max_len // 4,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
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
