# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Prompts for the data stage: read from a file, or taken from what the target itself wrote.

A target asked to continue its chat template after the user's header writes what it takes users to
say; that gives prompts for a target of which nothing but the weights is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from echo_vllm.conversations import read_conversations
from echo_vllm.training.work import TrainingError

SYSTEM_PROMPTS: Sequence[str | None] = (
    None,
    "You answer questions about science and nature.",
    "You help people to write and to edit texts.",
    "You explain mathematics step by step.",
    "You write and explain Python code.",
    "You help with everyday decisions and plans.",
    "You talk about history, countries and cultures.",
    "You tell stories and play roles.",
    "You summarise, sort and rewrite what you are given.",
)
"""What stands before the user's header when a target writes prompts: it moves the subject."""

MARK = "\u2063prompt\u2063"
"""Stands for the user's text while its place in a chat template is looked for."""


def read_prompts(path: Path) -> list[list[str]]:
    """The user's turns of every line of a JSON-lines file: `prompt`, or `turns`.

    Raises:
        TrainingError: the file cannot be read, a line has neither, or there is none.
    """
    try:
        return read_conversations(path)
    except ValueError as error:
        raise TrainingError(f"--prompts {error}") from None


class Unseen:
    """Tells repeated prompts: those that differ in case, punctuation and space only."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def add(self, prompt: str) -> bool:
        """Whether the prompt is new and has at least one word; a second time it is not new."""
        key = " ".join(re.findall(r"\w+", prompt.casefold()))
        if not key or key in self._seen:
            return False
        self._seen.add(key)
        return True


class Chat:
    """The target's tokenizer and its chat template."""

    def __init__(self, target: str, template: Path | None = None) -> None:
        """Load them.

        Args:
            target: a folder or a name.
            template: a file with a Jinja template, instead of the tokenizer's own.

        Raises:
            TrainingError: there is no tokenizer, or no template, or it is broken.
        """
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(target)
        except Exception as error:  # The library raises from many families.
            raise TrainingError(
                f"TARGET {target} has no tokenizer that can be loaded "
                f"({str(error).strip().splitlines()[0]}); give a folder or a name of a whole model"
            ) from None
        if template is not None:
            try:
                self.tokenizer.chat_template = template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise TrainingError(
                    f"--chat-template {template} cannot be read ({reason}); give a file with a "
                    "Jinja template"
                ) from None
        if not self.tokenizer.chat_template:
            raise TrainingError(
                f"TARGET {target} has no chat template; give one with --chat-template FILE"
            )
        self.encode(["x"])

    def encode(self, messages: Sequence[str]) -> list[int]:
        """Token ids of a chat, user and assistant in turn, up to where the assistant begins."""
        roles = ("user", "assistant")
        chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        return list(self._apply(chat, add_generation_prompt=True, tokenize=True, return_dict=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    def before_user(self, system: str | None) -> list[int]:
        """Token ids of a chat up to where the user's first text begins."""
        chat = [{"role": "user", "content": MARK}]
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        text = str(self._apply(chat, add_generation_prompt=False, tokenize=False))
        if MARK not in text:
            raise TrainingError(
                "the chat template changes what users say, so that --self-prompts cannot cut it "
                "there; give prompts with --prompts"
            )
        return list(self.tokenizer.encode(text.partition(MARK)[0], add_special_tokens=False))

    def openings(self) -> list[list[int]]:
        """`before_user` for each system prompt that the template takes."""
        found = [self.before_user(None)]
        for system in SYSTEM_PROMPTS[1:]:
            try:
                found.append(self.before_user(system))
            except TrainingError:
                break  # A template without a system role.
        return found

    def _apply(self, chat: list[dict[str, str]], **options: Any) -> Any:
        apply: Callable[..., Any] = self.tokenizer.apply_chat_template
        try:
            return apply(chat, **options)
        except Exception as error:  # Jinja's own, and whatever a template raises.
            raise TrainingError(
                f"the chat template cannot be applied ({str(error).strip().splitlines()[-1]}); "
                "give another with --chat-template FILE"
            ) from None
