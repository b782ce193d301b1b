# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Many requests at once, of every kind, some given up half-way; nothing may leak or break."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import openai
import pytest

from tests.conftest import Server
from tests.server.conftest import MAX_MODEL_LEN, MODEL, AsyncClient
from tests.server.metrics import Metrics
from tests.server.prompts import Prompt

pytestmark = pytest.mark.full

CONCURRENCY = 16


async def in_flight(jobs: list[Coroutine[Any, Any, str]]) -> list[str]:
    """Run the jobs in order, CONCURRENCY of them at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def run(job: Awaitable[str]) -> str:
        async with gate:
            return await job

    return await asyncio.gather(*(run(job) for job in jobs))


# ---- Kinds of requests: each checks its answer and returns how it ended ----


async def _complete(client: openai.AsyncOpenAI, prompt: str, **fields: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True, **fields.pop("extra", {})}
    return await client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **fields)


async def greedy(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await _complete(client, prompt, temperature=0, max_tokens=24)
    assert answer.usage.completion_tokens == len(answer.choices[0].token_ids) == 24
    return "whole"


async def chat(client: openai.AsyncOpenAI, prompt: str) -> str:
    messages: Any = [{"role": "user", "content": prompt}]
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0.7, top_p=0.9, max_tokens=20
    )
    assert answer.usage is not None
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert (answer.usage.completion_tokens == 20) or answer.choices[0].finish_reason == "stop"
    return "whole"


async def stream(client: openai.AsyncOpenAI, prompt: str, stop_after: int | None = None) -> str:
    """Read a stream, or close it after a number of chunks."""
    chunks = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        temperature=0,
        max_tokens=24 if stop_after is None else 400,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens = count = 0
    async with chunks:
        async for chunk in chunks:
            if chunk.usage is not None:
                assert chunk.usage.completion_tokens == tokens == 24
                return "whole"
            tokens += len(chunk.choices[0].token_ids)  # type: ignore[attr-defined]
            count += 1
            if count == stop_after:
                return "given up"
    raise AssertionError("a stream ended without its usage")


async def seeded(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await _complete(client, prompt, temperature=1.0, seed=5, max_tokens=16)
    assert answer.usage.completion_tokens == 16
    return "whole"


async def two_choices(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await _complete(client, prompt, temperature=1.0, n=2, max_tokens=12)
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens == 24
    return "whole"


async def with_logprobs(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await _complete(client, prompt, temperature=0.8, logprobs=2, max_tokens=12)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 12
    assert all(value <= 0 for value in logprobs.token_logprobs)
    return "whole"


async def penalised(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await _complete(
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
    answer = await _complete(
        client, prompt, temperature=1.0, logit_bias={"2": -50}, max_tokens=16, extra=extra
    )
    assert 2 not in answer.choices[0].token_ids
    return "whole"


async def stopped(client: openai.AsyncOpenAI, prompt: str) -> str:
    answer = await _complete(client, prompt, temperature=0, stop=["e", "\n"], max_tokens=24)
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
    answer = await _complete(client, " ".join([prompt] * 200), max_tokens=8, extra=END)
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"
    return "whole"


END = {"truncate_prompt_tokens": MAX_MODEL_LEN - 8}
KINDS: list[tuple[Callable[[openai.AsyncOpenAI, str], Coroutine[Any, Any, str]], int]] = [
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
    (to_the_end_of_the_model, 1),
]


def test_two_hundred_requests_of_all_kinds_leave_nothing_behind(
    async_client: AsyncClient,
    settled: Callable[[], Metrics],
    served: Server,
    prompts: list[Prompt],
) -> None:
    choose = random.Random(200)
    functions, weights = zip(*KINDS, strict=True)
    chosen = [*functions, *choose.choices(functions, weights, k=200 - len(functions))]
    choose.shuffle(chosen)

    async def send_all() -> list[str]:
        async with async_client() as client:
            return await in_flight(
                [kind(client, prompts[i % len(prompts)].prompt) for i, kind in enumerate(chosen)]
            )

    before = settled()
    assert asyncio.run(send_all()) == ["whole"] * 200
    counted = settled() - before  # Idle again: no request runs, no KV block is in use.
    assert counted.total("echo_accepted_tokens_total") > 0
    assert served.is_healthy()


def test_streams_given_up_half_way_leave_nothing_behind(
    async_client: AsyncClient,
    settled: Callable[[], Metrics],
    served: Server,
    prompts: list[Prompt],
) -> None:
    """A third of 60 streams is closed after one to twenty chunks; the others are whole."""
    choose = random.Random(60)

    async def send_all() -> list[str]:
        async with async_client() as client:
            return await in_flight(
                [
                    stream(
                        client,
                        choose.choice(prompts).prompt,
                        stop_after=choose.randint(1, 20) if i % 3 == 0 else None,
                    )
                    for i in range(60)
                ]
            )

    before = settled()
    assert Counter(asyncio.run(send_all())) == {"given up": 20, "whole": 40}
    counted = settled() - before
    aborted = counted.by_label("request_success_total", "finished_reason").get("abort", 0)
    assert aborted == 20
    assert served.is_healthy()


def test_a_structured_request_keeps_no_other_from_drafting(
    async_client: AsyncClient, settled: Callable[[], Metrics], prompts: list[Prompt]
) -> None:
    """It stays in the batch from the first to the last step of its neighbours."""
    digits = {"regex": "[0-9]{120}"}

    async def send_all() -> list[Any]:
        async with async_client() as client:
            long = _complete(
                client,
                "Digits:",
                temperature=0,
                max_tokens=200,
                extra={"structured_outputs": digits, "ignore_eos": False},
            )
            return await asyncio.gather(
                long, *(greedy(client, prompt.prompt) for prompt in prompts[10:14])
            )

    before = settled()
    constrained, *_ = asyncio.run(send_all())
    assert len(constrained.choices[0].text) == 120
    assert json.loads(constrained.choices[0].text.lstrip("0") or "0") >= 0
    assert (settled() - before).total("echo_trees_total") > 0
