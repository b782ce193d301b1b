# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Prompts that the target itself writes, and how repeated ones are told.

A target asked to continue its chat template after the user's header writes what it takes users to
say; that gives prompts for a target of which nothing but the weights is known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from echo_vllm.conversations import Chat, PromptError

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


def before_user(chat: Chat, system: str | None) -> list[int]:
    """Token ids of a chat up to where the user's first text begins.

    Raises:
        PromptError: the template changes that text, or does not take a system prompt.
    """
    messages = [{"role": "user", "content": MARK}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = str(chat.apply(messages, add_generation_prompt=False, tokenize=False))
    if MARK not in text:
        raise PromptError(
            "the chat template changes what users say, so that --self-prompts cannot cut it "
            "there; give prompts with --prompts"
        )
    return list(chat.tokenizer.encode(text.partition(MARK)[0], add_special_tokens=False))


def openings(chat: Chat) -> list[list[int]]:
    """`before_user` for each system prompt that the template takes."""
    found = [before_user(chat, None)]
    for system in SYSTEM_PROMPTS[1:]:
        try:
            found.append(before_user(chat, system))
        except PromptError:
            break  # A template without a system role.
    return found
