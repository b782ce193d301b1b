# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs prompts through an engine of this process, so that its recorder writes a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from echo_vllm.offline.engine import LocalEngine

KV_CACHE_BYTES = 1 << 30


def record(
    model: str,
    speculation: dict[str, Any],
    prompts: Sequence[list[int]],
    on_finished: Callable[[], None] = lambda: None,
    *,
    max_tokens: int,
    concurrency: int,
    temperature: float,
    dtype: str,
    max_model_len: int,
    kv_cache_bytes: int = KV_CACHE_BYTES,
) -> int:
    """Answer every prompt once; the trace is complete when this returns.

    Args:
        model: the target: a folder or a name.
        speculation: vLLM's speculative_config, with `trace` in its echo section.
        prompts: token ids.
        on_finished: called for each request that ends.
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
        return sum(map(len, engine.answer_each(prompts, max_tokens, temperature, on_finished)))
