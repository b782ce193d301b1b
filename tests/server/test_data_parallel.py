# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Two data-parallel ranks behind one server: exact, each with a budget of its own.

Of a dense model: vLLM's ranks on a CPU cannot share the experts of a mixture.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import Server, ServerFactory
from tests.engine.conftest import TinyModel
from tests.engine.engines import echo, generate
from tests.engine.test_exactness import greedy, tiny_engine, tiny_prompts
from tests.engine.tiny import Shape, make_head, make_target
from tests.server.metrics import Metrics

pytestmark = pytest.mark.full

TOKENS = 24
# The nodes of a step, of each rank.
SECTION = {"policy": "echo", "k_max": 6, "max_depth": 4, "top_k": 3}


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    shape = Shape()
    target = make_target(tmp_path / "target", shape)
    return TinyModel(target, make_head(tmp_path / "head", shape), shape)


def test_two_ranks_answer_as_one_without_speculation(
    tiny: TinyModel, server: ServerFactory
) -> None:
    prompts = [prompt["prompt_token_ids"] for prompt in tiny_prompts(64)]
    with tiny_engine(tiny, None) as llm:
        wanted = generate(llm, tiny_prompts(64), greedy(TOKENS))
    served = server(
        tiny.target,
        *("--speculative-config", json.dumps(echo(tiny.head, 12, **SECTION))),
        *("--data-parallel-size", "2"),
        *("--api-server-count", "1"),
        *("--dtype", "float32"),
        *("--max-model-len", "256"),
        *("--max-num-seqs", "8"),
        *("--served-model-name", "tiny"),
        "--skip-tokenizer-init",
        "--enforce-eager",
        timeout_s=300,
    )
    assert asyncio.run(complete(served, prompts, at_once=16)) == wanted
    # One at a time: a rank is idle.
    assert asyncio.run(complete(served, prompts[:6], at_once=1)) == wanted[:6]
    metrics = Metrics.read(served)
    for engine in "01":
        assert metrics.total("echo_steps_total", engine=engine) > 0
        assert metrics.total("echo_accepted_tokens_total", engine=engine) > 0, f"rank {engine}"


async def complete(served: Server, prompts: list[list[int]], at_once: int) -> list[list[int]]:
    """Token ids of the greedy completion of each prompt."""
    places = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def one(prompt: list[int]) -> list[int]:
            async with places:
                extra: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
                answer = await client.completions.create(
                    model="tiny",
                    prompt=prompt,
                    max_tokens=TOKENS,
                    temperature=0,
                    extra_body={**extra, "detokenize": False},
                )
            ids: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
            return ids

        return await asyncio.gather(*(one(prompt) for prompt in prompts))
