# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's Qwen3 with M-RoPE, whose prompts have positions like those of images.

The models that vLLM has with M-RoPE see or hear, and need packages for it that a CPU installation
leaves out. Of text alone all dimensions of their positions are equal; here they are not, and an
answer's positions are not its tokens' places, so that nobody can mistake one for the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from tests.engine.tiny import Shape, make_qwen3

NAME = "Qwen3MRoPEForCausalLM"
SECTION = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}


class Qwen3MRoPE(Qwen3ForCausalLM, SupportsMRoPE):  # type: ignore[misc]
    """Each dimension goes through a prompt at its own pace."""

    supports_mrope = True

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        place = torch.arange(len(input_tokens))
        positions = torch.stack([place // 2, place // 3, place % 7])
        return positions, int(positions.max()) + 1 - len(place)


def make_mrope_target(folder: Path, shape: Shape) -> Path:
    """Write a random checkpoint of it, and make vLLM in this process know the class."""
    ModelRegistry.register_model(NAME, Qwen3MRoPE)
    return make_qwen3(folder, shape, architectures=[NAME], rope_parameters=SECTION)
