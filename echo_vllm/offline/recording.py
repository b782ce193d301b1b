# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs prompts through an engine of this process, so that its recorder writes a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from echo_vllm.conversations import Question
from echo_vllm.offline.engine import LocalEngine

KV_CACHE_BYTES = 1 << 30


def record(
    model: str,
    speculation: dict[str, Any],
    prompts: Sequence[list[int]],
    on_finished: Callable[[], None] = lambda: None,
    follow_up: Callable[[int, list[int]], list[int] | None] = lambda number, answer: None,
    *,
    max_tokens: int,
    concurrency: int,
    temperature: float,
    dtype: str,
    max_model_len: int,
    kv_cache_bytes: int = KV_CACHE_BYTES,
) -> int:
    """Answer every prompt and what follows it; the trace is complete when this returns.

    Args:
        model: the target: a folder or a name.
        speculation: vLLM's speculative_config, with `trace` in its echo section.
        prompts: token ids.
        on_finished: called for each prompt when nothing follows any more.
        follow_up: given the number of a prompt and the token ids of the answer to it, or to what
            followed it last, the token ids of the chat's next prompt; None ends it.
        max_tokens: generated for each prompt at most; a request also ends by itself.
        concurrency: requests at once.
        temperature: of sampling; seeds are the prompts' numbers.
        dtype: of the target, as in vLLM.
        max_model_len: tokens of a request, prompt and answer.
        kv_cache_bytes: KV cache of the engine. vLLM's own default is most of the machine's memory.

    Returns:
        Generated tokens.

    Raises:
        ValueError, OSError, RuntimeError: vLLM's own, if the target or the head do not load.
    """
    tokens = 0

    def ask(number: int, turn: int, ids: list[int]) -> Question:
        return Question(f"{number}.{turn}", ids, max_tokens, temperature, seed=number)

    def go_on(question: Question, answer: list[int], stopped: bool) -> Question | None:
        nonlocal tokens
        tokens += len(answer)
        number, turn = map(int, question.name.split("."))
        if (ids := follow_up(number, answer)) is None:
            on_finished()
            return None
        return ask(number, turn + 1, ids)

    nodes = int(speculation["num_speculative_tokens"])
    with LocalEngine(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=concurrency,
        # Room for whole trees beside a prompt: a tree that is cut is of less use.
        max_num_batched_tokens=max(2048, concurrency * (1 + nodes) + 512),
        kv_cache_memory_bytes=kv_cache_bytes,
        speculative_config=speculation,
    ) as engine:
        engine.answer((ask(i, 0, ids) for i, ids in enumerate(prompts)), go_on)
    return tokens
