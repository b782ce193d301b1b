# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a model is asked: files of prompts, chats as its token ids, requests to an engine.

Everything that runs prompts takes them from here: calibration, traces, benchmarks, training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).parent / "demo" / "prompts.jsonl"
"""Single prompts of many kinds, on which the demo's profile was calibrated."""

CHATS = PROMPTS.with_name("chats.jsonl")
"""Chats of two to four turns, of which neither the demo's head nor its profile has seen any."""

REMEDY = 'each line must be like {"prompt": "..."} or {"turns": ["...", "..."]}'


class PromptError(ValueError):
    """One sentence on what is wrong with prompts, a tokenizer or a chat template."""


@dataclass(frozen=True)
class Question:
    """One request to an engine.

    Attributes:
        name: of the request, unique.
        prompt_ids: token ids.
        max_tokens: of the answer.
        temperature: 0 is greedy.
        top_p: as in vLLM.
        seed: of sampling; without meaning for a greedy request.
    """

    name: str
    prompt_ids: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def read_conversations(*paths: Path) -> list[list[str]]:
    """The user's turns of every line of files of JSON lines: `prompt`, or `turns` for several.

    Raises:
        PromptError: a file cannot be read, a line has neither, or there is none.
    """
    return [turns for path in paths for turns in _read(path)]


def shuffled(conversations: Sequence[list[str]]) -> list[list[str]]:
    """In another order, always the same: files are sorted by category, and a short run takes only
    some."""
    return random.Random(0).sample(conversations, len(conversations))


def _read(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(
            f"prompts {path} cannot be read ({error.strerror}); give a file of JSON lines"
        ) from None
    except UnicodeDecodeError:
        raise PromptError(f"prompts {path} is not UTF-8 text; give a file of JSON lines") from None
    conversations = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"prompts {path}, line {number}, is not JSON ({error.msg}); {REMEDY}"
            ) from None
        turns = entry.get("turns", [entry.get("prompt")]) if isinstance(entry, dict) else None
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise PromptError(f"prompts {path}, line {number}, holds no prompt; {REMEDY}")
        conversations.append(turns)
    if not conversations:
        raise PromptError(f"prompts {path} holds no prompt; {REMEDY}")
    return conversations


class Chat:
    """A model's tokenizer and its chat template."""

    def __init__(self, model: str, template: Path | None = None) -> None:
        """Load them.

        Args:
            model: a folder or a name.
            template: a file with a Jinja template, instead of the tokenizer's own.

        Raises:
            PromptError: there is no tokenizer, or no template, or it is broken.
        """
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except Exception as error:  # The library raises from many families.
            raise PromptError(
                f"model {model} has no tokenizer that can be loaded "
                f"({str(error).strip().splitlines()[0]}); give a folder or a name of a whole model"
            ) from None
        if template is not None:
            try:
                self.tokenizer.chat_template = template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise PromptError(
                    f"--chat-template {template} cannot be read ({reason}); give a file with a "
                    "Jinja template"
                ) from None
        if not self.tokenizer.chat_template:
            raise PromptError(
                f"model {model} has no chat template; give one with --chat-template FILE, or a "
                "model whose tokenizer has one"
            )
        self.encode(["x"])

    def encode(self, messages: Sequence[str]) -> list[int]:
        """Token ids of a chat, user and assistant in turn, up to where the assistant begins."""
        roles = ("user", "assistant")
        chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        return list(self.apply(chat, add_generation_prompt=True, tokenize=True, return_dict=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """An answer's text, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    def apply(self, chat: list[dict[str, str]], **options: Any) -> Any:
        """transformers' `apply_chat_template`.

        Raises:
            PromptError: the template does not take the chat.
        """
        apply: Callable[..., Any] = self.tokenizer.apply_chat_template
        try:
            return apply(chat, **options)
        except Exception as error:  # Jinja's own, and whatever a template raises.
            raise PromptError(
                f"the chat template cannot be applied ({str(error).strip().splitlines()[-1]}); "
                "give another with --chat-template FILE"
            ) from None


def next_turn(turns: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The messages of a chat up to its first turn without an answer."""
    messages = list(turns[: len(answers) + 1])
    for place, answer in enumerate(answers):
        messages.insert(2 * place + 1, answer)
    return messages
