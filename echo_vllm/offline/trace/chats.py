# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Chats that are recorded once their contexts are long: the turns before are asked, too, but what
was drafted for them does not stay in the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from echo_vllm.conversations import Chat, next_turn
from echo_vllm.trace_format import TraceWriter, read_trace


class Chats:
    """The turns of conversations, each asked after the target's own answers to those before."""

    def __init__(
        self,
        chat: Chat,
        conversations: Sequence[Sequence[str]],
        *,
        min_context: int,
        longest: int,
    ) -> None:
        """
        Args:
            conversations: the user's turns of each.
            min_context: tokens of a prompt after which nothing more is asked.
            longest: tokens that a prompt may have.
        """
        self._chat = chat
        self._conversations = conversations
        self._answers: list[list[str]] = [[] for _ in conversations]
        self._min_context = min_context
        self._longest = longest

    def follow_up(self, number: int, answer: Sequence[int]) -> list[int] | None:
        """Token ids of the prompt after `answer`; None where the chat is long enough, has no more
        turns, or gets too long."""
        turns, answers = self._conversations[number], self._answers[number]
        asked = self._chat.encode(next_turn(turns, answers))
        answers.append(self._chat.decode(answer))
        if len(asked) >= self._min_context or len(answers) == len(turns):
            return None
        prompt = self._chat.encode(next_turn(turns, answers))
        return prompt if len(prompt) <= self._longest else None


def keep_long_contexts(path: Path, min_context: int) -> int:
    """Leave only trees with `min_context` tokens of context in a trace; returns how many there are.

    Raises:
        TraceError: it is not a whole trace.
    """
    header, steps = read_trace(path)
    kept = []
    for step in steps:
        found = [request for request in step.requests if request.context >= min_context]
        if found:
            kept.append(replace(step, requests=found))
    with TraceWriter(path, header) as writer:
        for step in kept:
            writer.append(step)
    return sum(len(step.requests) for step in kept)
