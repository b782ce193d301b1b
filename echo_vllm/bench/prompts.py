# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Real prompts as token ids, through the model's chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from echo_vllm.bench.configurations import ROOT

DEFAULT_PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"


def read_conversations(paths: Sequence[Path]) -> list[list[str]]:
    """The user's turns of every line of JSON-lines files: `prompt`, or `turns`.

    They are shuffled, always in the same way, because such files are sorted by category and a
    short run takes only some.

    Raises:
        ValueError: a line has neither, or a file is empty.
    """
    conversations: list[list[str]] = []
    for path in paths:
        before = len(conversations)
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
            found = entry if isinstance(entry, dict) else {}
            turns = [found["prompt"]] if "prompt" in found else found.get("turns")
            if (
                not isinstance(turns, list)
                or not turns
                or not all(isinstance(turn, str) and turn for turn in turns)
            ):
                raise ValueError(
                    f'{path}:{number}: must be like {{"prompt": "..."}} or '
                    f'{{"turns": ["...", "..."]}}, got {line[:80]}'
                )
            conversations.append(turns)
        if len(conversations) == before:
            raise ValueError(f"{path} holds no prompt")
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
