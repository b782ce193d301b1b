# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Folders of a target and of a head that fits it, with as little in them as start-up looks at."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

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
    """A file with the header of safetensors; nothing may look behind it."""
    header: dict[str, Any] = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in tensors.items()
    }
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


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
