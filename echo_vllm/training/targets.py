# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the target's config says, asked before anything large is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from echo_vllm.training.work import TrainingError


def resolve_layers(target: str, wanted: Sequence[int] | None) -> list[int]:
    """The auxiliary layer ids: those wanted, or vLLM's default.

    Raises:
        TrainingError: the target has no such layers, or no config.
    """
    count = int(target_config(target).num_hidden_layers)
    layers = list(wanted) if wanted is not None else [2, count // 2, count - 3]
    if not layers or len(set(layers)) != len(layers) or not all(0 <= i <= count for i in layers):
        given = f"--aux-layers {layers}" if wanted is not None else f"the default {layers}"
        raise TrainingError(
            f"TARGET {target} has {count} layers, and the auxiliary layers ({given}) must be "
            f"different ones of 0 to {count}; name others with --aux-layers"
        )
    return layers


def resolve_dtype(target: str, wanted: str) -> str:
    """`bfloat16` or the like; `auto` is what the target's config says.

    Raises:
        TrainingError: `wanted` is no type that a target is served in.
    """
    if wanted in ("bfloat16", "float16", "float32"):
        return wanted
    if wanted != "auto":
        raise TrainingError(
            f"--dtype must be auto, bfloat16, float16 or float32, got {wanted}; leave it out for "
            "what the target's config says"
        )
    found = getattr(target_config(target), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def target_config(target: str) -> Any:
    """The target's transformers config.

    Raises:
        TrainingError: there is none, or it is not that of a language model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target)
    except Exception as error:
        raise TrainingError(
            f"TARGET {target} does not load ({str(error).strip().splitlines()[0]}); give a folder "
            "or a name of a whole model"
        ) from None
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise TrainingError(
                f"TARGET {target} is a {config.model_type}, whose config has no {name}; give a "
                "language model such as Llama or Qwen3"
            )
    return config
