# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Real prompts as token ids, through the model's chat template."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from echo_vllm.conversations import read_conversations
from echo_vllm.offline.bench.configurations import ROOT

DEFAULT_PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"


def read_shuffled(paths: Sequence[Path]) -> list[list[str]]:
    """The conversations of all files, shuffled, always in the same way: such files are sorted by
    category, and a short run takes only some.

    Raises:
        ValueError: of `read_conversations`.
    """
    conversations = [turns for path in paths for turns in read_conversations(path)]
    random.Random(0).shuffle(conversations)
    return conversations


class Tokenizer:
    """The model's tokenizer and chat template."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(self, messages: Sequence[str]) -> list[int]:
        """Token ids of a chat, user and assistant in turn, up to where the assistant begins."""
        roles = ("user", "assistant")
        chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        return list(
            self._tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """An answer's text, without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def window(prompts: Sequence[list[int]], start: int, count: int) -> list[list[int]]:
    """`count` prompts from `start` on, beginning again at the end of the list."""
    return [prompts[(start + i) % len(prompts)] for i in range(count)]
