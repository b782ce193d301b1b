# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The project's own prompts, as the demo model is asked them."""

from __future__ import annotations

from pathlib import Path

from echo_vllm.conversations import PROMPTS, Chat, read_conversations


def chat(model: Path, prompts: list[str]) -> list[str]:
    """The prompts as first user messages, through the model's chat template."""
    template = Chat(str(model))
    return [
        template.apply(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]


def project_prompts() -> list[str]:
    """All of them, in the order of the file."""
    return [turns[0] for turns in read_conversations(PROMPTS)]
