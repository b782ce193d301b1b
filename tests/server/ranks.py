# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tiny targets behind a server of several ranks, and what one rank without speculation answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai

from tests.conftest import Server, ServerFactory
from tests.engine.conftest import TinyModel
from tests.engine.engines import echo, generate
from tests.engine.test_exactness import greedy, tiny_engine, tiny_prompts

TOKENS = 24


def prompts(number: int) -> list[list[int]]:
    return [prompt["prompt_token_ids"] for prompt in tiny_prompts(number)]


def plain_answers(tiny: TinyModel, number: int) -> list[list[int]]:
    """Of one rank in this process, without speculation."""
    with tiny_engine(tiny, None) as llm:
        return generate(llm, tiny_prompts(number), greedy(TOKENS))


def serve_ranks(
    server: ServerFactory,
    tiny: TinyModel,
    *arguments: str,
    env: dict[str, str] | None = None,
    **section: Any,
) -> Server:
    """A server in float32 with trees of up to 12 nodes, to be asked with `complete`."""
    return server(
        tiny.target,
        *("--speculative-config", json.dumps(echo(tiny.head, 12, **section))),
        *("--dtype", "float32"),
        *("--max-model-len", "256"),
        *("--max-num-seqs", "8"),
        *("--served-model-name", "tiny"),
        "--skip-tokenizer-init",
        "--enforce-eager",
        *arguments,
        env=env,
        timeout_s=300,
    )


def complete(served: Server, prompts: list[list[int]], at_once: int) -> list[list[int]]:
    """Token ids of the greedy completion of each prompt.

    Raises:
        openai.APIError: if the server does not answer one.
    """

    async def all_of_them() -> list[list[int]]:
        places = asyncio.Semaphore(at_once)
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:

            async def one(prompt: list[int]) -> list[int]:
                async with places:
                    answer = await client.completions.create(
                        model="tiny",
                        prompt=prompt,
                        max_tokens=TOKENS,
                        temperature=0,
                        extra_body={
                            "ignore_eos": True,
                            "return_token_ids": True,
                            "detokenize": False,
                        },
                    )
                ids: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
                return ids

            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    return asyncio.run(all_of_them())
