# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Folders of a target and of a head that fits it, with as little in them as start-up looks at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TARGET_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
CONFIG: dict[str, Any] = {
    **TARGET_CONFIG,
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 100,
}
TENSORS: dict[str, list[int]] = {
    "fc.weight": [64, 192],
    "midlayer.self_attn.q_proj.weight": [64, 128],
    "midlayer.self_attn.k_proj.weight": [32, 128],
    "midlayer.self_attn.v_proj.weight": [32, 128],
    "midlayer.self_attn.o_proj.weight": [64, 64],
    "midlayer.mlp.gate_proj.weight": [128, 64],
    "midlayer.mlp.up_proj.weight": [128, 64],
    "midlayer.mlp.down_proj.weight": [64, 128],
    "midlayer.input_layernorm.weight": [64],
    "midlayer.hidden_norm.weight": [64],
    "midlayer.post_attention_layernorm.weight": [64],
    "norm.weight": [64],
    "lm_head.weight": [100, 64],
    "d2t": [100],
    "t2d": [1000],
}


def write_weights(file: Path, tensors: dict[str, list[int]]) -> None:
    """Zeros of these shapes, in the format that the file's name ends with."""
    dtypes = {"d2t": torch.int64, "t2d": torch.bool}
    zeros = {
        name: torch.zeros(shape, dtype=dtypes.get(name, torch.bfloat16))
        for name, shape in tensors.items()
    }
    if file.suffix == ".safetensors":
        save_file(zeros, file)
    else:
        torch.save(zeros, file)


def write_head(folder: Path, **changes: Any) -> Path:
    """A head with CONFIG, but for `changes`, and TENSORS."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_weights(folder / "model.safetensors", TENSORS)
    return folder


def write_target(folder: Path, **changes: Any) -> Path:
    """A target with TARGET_CONFIG, but for `changes`, and no weights at all."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TARGET_CONFIG | changes))
    return folder
