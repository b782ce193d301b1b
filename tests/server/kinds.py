# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Kinds of requests for a test under load; each checks its answer and returns how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import openai

from tests.server.conftest import MAX_MODEL_LEN, MODEL

CONCURRENCY = 16
TOKENS = 16
"""Of an answer that is read to its end."""

LONG = 800
"""Tokens of an answer that nobody reads to its end: on a busy machine a client comes late to close
the stream, and a fast engine is far ahead of it."""

Kind = Callable[[openai.AsyncOpenAI, str], Coroutine[Any, Any, str]]


async def in_flight(jobs: list[Coroutine[Any, Any, str]]) -> list[str]:
    """Run the jobs in order, CONCURRENCY of them at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def run(job: Awaitable[str]) -> str:
        async with gate:
            return await job

    return await asyncio.gather(*(run(job) for job in jobs))


async def complete(client: openai.AsyncOpenAI, prompt: str, **fields: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True, **fields.pop("extra", {})}
    return await client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **fields)


async def greedy(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await complete(client, prompt, temperature=0, max_tokens=TOKENS)
    assert answer.usage.completion_tokens == len(answer.choices[0].token_ids) == TOKENS
    return "whole"


async def chat(client: openai.AsyncOpenAI, prompt: str) -> str:
    messages: Any = [{"role": "user", "content": prompt}]
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0.7, top_p=0.9, max_tokens=TOKENS
    )
    assert answer.usage is not None
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert (answer.usage.completion_tokens == TOKENS) or answer.choices[0].finish_reason == "stop"
    return "whole"


async def stream(client: openai.AsyncOpenAI, prompt: str, stop_after: int | None = None) -> str:
    """Read a stream, or close it after a number of chunks."""
    chunks = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        temperature=0,
        max_tokens=TOKENS if stop_after is None else LONG,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens = count = 0
    async with chunks:
        async for chunk in chunks:
            if chunk.usage is not None:
                assert chunk.usage.completion_tokens == tokens == TOKENS
                return "whole"
            tokens += len(chunk.choices[0].token_ids)  # type: ignore[attr-defined]
            count += 1
            if count == stop_after:
                return "given up"
    raise AssertionError("a stream ended without its usage")


async def seeded(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await complete(client, prompt, temperature=1.0, seed=5, max_tokens=16)
    assert answer.usage.completion_tokens == 16
    return "whole"


async def two_choices(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await complete(client, prompt, temperature=1.0, n=2, max_tokens=12)
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens == 24
    return "whole"


async def with_logprobs(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await complete(client, prompt, temperature=0.8, logprobs=2, max_tokens=12)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 12
    assert all(value <= 0 for value in logprobs.token_logprobs)
    return "whole"


async def penalised(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await complete(
        client,
        prompt,
        temperature=0,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        max_tokens=16,
        extra={"repetition_penalty": 1.2, "bad_words": ["the"]},
    )
    assert answer.usage.completion_tokens == 16
    return "whole"


async def filtered(client: openai.AsyncOpenAI, prompt: str) -> str:
    extra = {"min_p": 0.2, "top_k": 20}
    answer = await complete(
        client, prompt, temperature=1.0, logit_bias={"2": -50}, max_tokens=16, extra=extra
    )
    assert 2 not in answer.choices[0].token_ids
    return "whole"


async def stopped(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await complete(client, prompt, temperature=0, stop=["e", "\n"], max_tokens=24)
    [choice] = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert "e" not in choice.text
    assert "\n" not in choice.text
    return "whole"


async def structured(client: openai.AsyncOpenAI, prompt: str) -> str:
    messages: Any = [{"role": "user", "content": prompt}]
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_tokens=32,
        extra_body={"structured_outputs": {"choice": ["red", "green", "blue and white"]}},
    )
    assert answer.choices[0].message.content in ("red", "green", "blue and white")
    return "whole"


async def to_the_end_of_the_model(client: openai.AsyncOpenAI, prompt: str) -> str:
    extra = {"truncate_prompt_tokens": MAX_MODEL_LEN - 8}
    # Words enough, however short the prompt: each is a token at least.
    words = (prompt.split() * MAX_MODEL_LEN)[:MAX_MODEL_LEN]
    answer = await complete(client, " ".join(words), max_tokens=8, extra=extra)
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"
    return "whole"


# With how often each is drawn.
KINDS: list[tuple[Kind, float]] = [
    (greedy, 5),
    (chat, 5),
    (stream, 4),
    (seeded, 2),
    (two_choices, 2),
    (with_logprobs, 2),
    (penalised, 2),
    (filtered, 2),
    (stopped, 2),
    (structured, 2),
    (to_the_end_of_the_model, 0.3),  # by far the dearest
]
