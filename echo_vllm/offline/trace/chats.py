# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Chats whose prompts are long, for recordings with contexts like those of real traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from echo_vllm.conversations import Chat, Question, next_turn
from echo_vllm.offline.engine import LocalEngine


def long_prompts(
    model: str,
    chat: Chat,
    conversations: Sequence[Sequence[str]],
    *,
    min_context: int,
    max_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """Token ids of each conversation's first prompt that has `min_context` tokens.

    The turns before it are asked one after another, and the target's own greedy answers are part of
    it. A conversation that has too few turns for that is left out.

    Args:
        model: the target: a folder or a name.
        chat: its tokenizer.
        conversations: the user's turns of each.
        min_context: tokens.
        max_tokens: of each answer.
        options: of the plain engine that answers.
    """
    prompts: dict[int, list[int]] = {}
    answers: list[list[str]] = [[] for _ in conversations]

    def ask(number: int) -> Question | None:
        turns, known = conversations[number], answers[number]
        ids = chat.encode(next_turn(turns, known))
        if len(ids) >= min_context:
            prompts[number] = ids
        elif len(known) + 1 < len(turns):
            return Question(f"{number}.{len(known)}", ids, max_tokens)
        return None

    def go_on(question: Question, answer: list[int], stopped: bool) -> Question | None:
        number = int(question.name.partition(".")[0])
        answers[number].append(chat.decode(answer))
        return ask(number)

    firsts = [question for number in range(len(conversations)) if (question := ask(number))]
    if firsts:
        with LocalEngine(model, **options) as engine:
            engine.answer(firsts, go_on)
    return [prompts[number] for number in sorted(prompts)]
