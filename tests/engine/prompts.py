# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The project's own prompts, as the demo model is asked them."""

from __future__ import annotations

import json
from pathlib import Path

PROMPTS = Path(__file__).parent.parent / "data" / "prompts.jsonl"


def chat(model: Path, prompts: list[str]) -> list[str]:
    """The prompts as first user messages, through the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]


def project_prompts() -> list[str]:
    """All of them, in the order of the file."""
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
