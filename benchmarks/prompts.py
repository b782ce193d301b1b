# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Real prompts as token ids, through the model's chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.configurations import ROOT

DEFAULT_PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSON-lines file: `prompt`, or the first of `turns`, of every line.

    They are shuffled, always in the same way, because such files are sorted by category and a
    short run takes only some.

    Raises:
        ValueError: a line has neither, or the file is empty.
    """
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if "prompt" in entry:
            prompts.append(str(entry["prompt"]))
        elif entry.get("turns"):
            prompts.append(str(entry["turns"][0]))
        else:
            raise ValueError(f"{path}:{number}: neither 'prompt' nor 'turns' in {sorted(entry)}")
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    random.Random(0).shuffle(prompts)
    return prompts


def tokenize(model: Path, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt as the user's turn, up to where the assistant begins."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [list(ids) for ids in encoded]


def window(prompts: Sequence[list[int]], start: int, count: int) -> list[list[int]]:
    """`count` prompts from `start` on, beginning again at the end of the list."""
    return [prompts[(start + i) % len(prompts)] for i in range(count)]
