# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Turns a Llama GGUF file into a Hugging Face checkpoint, with its weights in bfloat16.

About precision: a Q4_1 weight is `scale * q + minimum` with 4 bits of q, so its own step is
about a fifteenth of the range of its block of 32. Rounding that value to bfloat16 moves it by at
most 1/512 of its size. The rounding happens once, here, and is part of the demo model's
definition: the model served in fp32 uses these same bfloat16 values, and computes in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

from echo_vllm.demo.tokenizer import write_tokenizer

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, dequantised

Made by `python -m echo_vllm.demo` from the Q4_1 GGUF file in the Python package {package}
{version} (Apache-2.0). The model is SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0).

What was changed: the weights were dequantised and rounded to bfloat16; the rows of the query and
key projections went from llama.cpp's order back to the original one; the tokenizer was rebuilt
from the GGUF metadata. Four-bit weights make it a weaker model than the original: use it to
try things out, not for answers.
"""


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write a complete checkpoint into the existing, empty `folder`."""
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(metadata)
    tensors = {
        name: torch.from_numpy(weight).to(torch.bfloat16)
        for name, weight in hugging_face_tensors(reader, config).items()
    }
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_tokenizer(metadata, folder)
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod((folder / "config.json").stat().st_mode)  # save_file lets only the owner read


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a Llama model, from GGUF metadata."""
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"the architecture must be llama, got {metadata['general.architecture']}")
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": _as_written(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def hugging_face_tensors(
    reader: GGUFReader, config: dict[str, Any]
) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor in fp32 under its Hugging Face name, a projection as [out, in]."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        # A copy, because an unquantised tensor is a read-only view of the file.
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name in OTHER_TENSORS:
            tensors[OTHER_TENSORS[tensor.name]] = weight
            continue
        block, layer, part, suffix = tensor.name.split(".")
        if block != "blk" or suffix != "weight" or part not in LAYER_TENSORS:
            raise ValueError(f"a Llama GGUF file has no tensor {tensor.name}")
        if part in heads:
            weight = rows_of_half_rotation(weight, heads[part])
        tensors[f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight"] = weight
    return tensors


def rows_of_half_rotation(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Reorder the rows of a query or key projection [out, in] for rotary halves.

    GGUF files have rows 2i and 2i+1 of a head rotated together (llama.cpp's rotary embedding);
    Hugging Face's rotates rows i and i + head_dim/2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _as_written(value: float) -> float:
    """The shortest decimal of a float32, so that 9.999999747e-06 is 1e-05 again."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
