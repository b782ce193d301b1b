# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A head's folder as stock vLLM loads it (`LlamaForCausalLMEagle3`), and speculators' model.

speculators saves heads in a layout of its own, which vLLM loads too; the older one is written here
because it is what published heads have, what this project's checks read, and what continues in
other trainers. The tensors are the same under other names: `layers.0` is `midlayer`, the target's
embedding is left out, and so are the target's final norm and output layer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from echo_vllm import atomic
from echo_vllm.training.work import TrainingError, writing

LEFT_OUT = ("embed_tokens.", "verifier_")


def export_head(
    model: Any, folder: Path, *, dtype: torch.dtype, bos_and_eos: dict[str, Any]
) -> None:
    """Write config.json and model.safetensors, which always belong together: a process that is
    killed in between leaves a folder without a config.json, which nobody takes for a head.

    Args:
        model: speculators' Eagle3DraftModel.
        folder: of the head; made if need be.
        dtype: of the tensors in the file.
        bos_and_eos: token ids of the target's config, which some tools look for.

    Raises:
        TrainingError: a file could not be written.
    """
    layer = model.config.transformer_layer_config
    rope = dict(getattr(layer, "rope_parameters", None) or {})
    theta = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": layer.num_hidden_layers,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "max_position_embeddings": layer.max_position_embeddings,
        "rope_theta": theta,
        **({} if kind == "default" else {"rope_scaling": {"rope_type": kind, **rope}}),
        "rms_norm_eps": layer.rms_norm_eps,
        "vocab_size": layer.vocab_size,
        "draft_vocab_size": model.config.draft_vocab_size,
        "hidden_act": layer.hidden_act,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": list(model.config.eagle_aux_hidden_state_layer_ids),
        **bos_and_eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(LEFT_OUT):
            continue
        kept = tensor.to(dtype) if tensor.is_floating_point() else tensor
        tensors[name.replace("layers.0.", "midlayer.")] = kept.detach().cpu().clone()
    # safetensors wraps the system's errors in one of its own.
    with writing(folder, Exception):
        folder.mkdir(parents=True, exist_ok=True)
        both = folder / "model.safetensors", folder / "config.json"
        with atomic.replacing(*both) as [weights, text]:
            save_file(tensors, weights, metadata={"format": "pt"})
            text.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_config(folder: Path, option: str = "--init") -> dict[str, Any]:
    """A head's config.json.

    Raises:
        TrainingError: the folder holds no head that training can begin from.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{option} {folder} has no config.json that can be read ({error}); give the folder of "
            "an EAGLE-3 head"
        ) from None
    if not isinstance(config, dict) or config.get("architectures") != ["LlamaForCausalLMEagle3"]:
        raise TrainingError(
            f"{option} {folder} is not a head of architecture LlamaForCausalLMEagle3; give the "
            "folder of one, such as this command writes"
        )
    return config


def draft_vocab_of(config: Mapping[str, Any]) -> int:
    """Tokens that a head can draft, by its config.json."""
    return int(config.get("draft_vocab_size") or config["vocab_size"])


def draft_vocabulary(folder: Path) -> Container[int] | None:
    """The target's tokens that a head can draft, of any layout that vLLM loads.

    Args:
        folder: of the head.

    Returns:
        None where that cannot be told: the weights are not in files of safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                if "d2t" in tensors.keys():  # noqa: SIM118  # It cannot be iterated itself.
                    d2t = tensors.get_tensor("d2t")
                    return set((torch.arange(len(d2t)) + d2t).tolist())
        except (OSError, SafetensorError):
            return None  # The engine will say so.
    return range(sys.maxsize) if files else None


def read_weights(folder: Path, option: str = "--init") -> dict[str, torch.Tensor]:
    """A head's tensors by speculators' names; floats in float32."""
    try:
        tensors = load_file(folder / "model.safetensors")
    except Exception as error:
        raise TrainingError(
            f"{option} {folder} has no model.safetensors that can be read ({error}); give the "
            "folder of an EAGLE-3 head"
        ) from None
    return {
        name.replace("midlayer.", "layers.0."): tensor.float()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


def load_weights(model: Any, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Put a head's tensors into speculators' model.

    Raises:
        TrainingError: names or shapes do not fit.
    """
    own = model.state_dict()
    wanted = {name for name in own if not name.startswith(LEFT_OUT)}
    wrong = sorted(wanted - set(tensors)) or sorted(
        name for name in wanted if tensors[name].shape != own[name].shape
    )
    if wrong:
        raise TrainingError(
            f"{where} does not fit the head to be trained: {wrong[0]} is missing or has another "
            "shape; give a head for this target with the same layers and draft vocabulary"
        )
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def larger_vocabulary(
    t2d: torch.Tensor, token_counts: Mapping[int, int], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of a draft vocabulary that holds an older one.

    Args:
        t2d: [vocab_size], whether each of the target's tokens can be drafted so far.
        token_counts: of the answers' tokens; the most frequent are added, then those of low ids.
        size: tokens of the new one.

    Returns:
        d2t [size], what is added to a draft token's id to get the target's, and t2d.
    """
    missing = (~t2d).nonzero()[:, 0].tolist()
    missing.sort(key=lambda token: (-token_counts.get(token, 0), token))
    larger = t2d.clone()
    larger[missing[: size - int(t2d.sum())]] = True
    return larger.nonzero()[:, 0] - torch.arange(size), larger


def larger_output_layer(
    rows: torch.Tensor, target_rows: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """An output layer for a larger draft vocabulary.

    Rows of added tokens are the target's, through the linear map that comes nearest to turning
    the target's rows of the known tokens into the head's.

    Args:
        rows: [num_known, hidden_size], the head's so far.
        target_rows: [size, hidden_size], the target's output layer at all tokens.
        known: [size], which of them the head has.

    Returns:
        [size, hidden_size].
    """
    target_rows = target_rows.float()
    mapping = torch.linalg.lstsq(target_rows[known], rows).solution
    found: torch.Tensor = target_rows @ mapping
    found[known] = rows
    return found
