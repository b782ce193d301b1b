# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests that few people make and that vLLM treats in a way of their own under speculation."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, generate, runner
from tests.engine.test_elastic_engine import AUTO, dictate, record_drafts
from tests.engine.test_exactness import check_forests, greedy, tiny_engine, tiny_prompts

pytestmark = pytest.mark.full


def test_a_thinking_budget_ends_the_thinking_of_its_own_request(
    demo_target: Path, demo_head: Path
) -> None:
    """Not that of the request at the head of the batch, where those with trees are."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.config import ReasoningConfig

    tokenizer = AutoTokenizer.from_pretrained(demo_target)
    begin, end = (tokenizer.encode(text) for text in ("<think>", "</think>"))
    budgets = (None, 6, None, 11)
    prompts = [
        {"prompt_token_ids": tokenizer.encode(f"{what} is") + (begin if budget else [])}
        for what, budget in zip(("Rain", "The sea", "Snow", "Fire"), budgets, strict=True)
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, thinking_token_budget=budget)
        for budget in budgets
    ]
    found = []
    for spec in (None, echo(demo_head, 12, max_depth=4, top_k=3)):
        reasoning = ReasoningConfig(reasoning_start_str="<think>", reasoning_end_str="</think>")
        options = {"max_model_len": 256, "max_num_seqs": 4, "reasoning_config": reasoning}
        with engine(demo_target, spec, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([list(output.outputs[0].token_ids) for output in outputs])
            accepted = spec and counters(llm)["spec_decode_num_accepted_tokens"]
    assert found[1] == found[0]
    assert accepted
    for tokens, budget in zip(found[1], budgets, strict=True):
        places = [i for i in range(len(tokens)) if tokens[i : i + len(end)] == end]
        assert bool(places) == (budget is not None), tokens


def test_log_probabilities_of_given_tokens_of_different_lengths(tiny: TinyModel) -> None:
    from vllm import SamplingParams

    wanted = [[1, 2, 3], [4], None, [5, 6, 7, 8], None]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=40,
            ignore_eos=True,
            detokenize=False,
            **({"logprob_token_ids": ids} if ids else {"logprobs": 1}),
        )
        for ids in wanted
    ]
    prompts = tiny_prompts(len(params))
    found = []
    for spec in (None, echo(tiny.head, 12, max_depth=4, top_k=4)):
        with tiny_engine(tiny, spec) as llm:
            found.append(llm.generate(prompts, params, use_tqdm=False))
            accepted = spec and counters(llm)["spec_decode_num_accepted_tokens"]
    assert accepted
    for plain, trees, ids in zip(*found, wanted, strict=True):
        plain, trees = plain.outputs[0], trees.outputs[0]
        assert trees.token_ids == plain.token_ids
        for one, other in zip(plain.logprobs, trees.logprobs, strict=True):
            for token in ids or []:
                assert other[token].logprob == pytest.approx(one[token].logprob, abs=2e-4)


@pytest.mark.timeout(900)
def test_a_session_whose_input_comes_in_parts_answers_as_without_trees(tiny: TinyModel) -> None:
    """Each part ends within a path that is accepted, and the next one begins there."""
    parts = [prompt["prompt_token_ids"][:20] for prompt in tiny_prompts(6)]
    plain, trees = (
        asyncio.run(session_answers(tiny, spec, parts))
        for spec in (None, echo(tiny.head, 12, max_depth=4, top_k=4))
    )
    gc.collect()  # vLLM's own end of an engine does not work at the end of the process.
    assert trees == plain
    assert sum(map(len, trees)) > 3 * len(parts)


async def session_answers(
    tiny: TinyModel, spec: dict[str, Any] | None, parts: list[list[int]]
) -> list[list[int]]:
    """What a session answers, and beside it an ordinary request."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    new_tokens = {"output_kind": RequestOutputKind.DELTA, "detokenize": False}
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, **new_tokens)
    arguments = AsyncEngineArgs(
        model=str(tiny.target),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        speculative_config=spec,
        block_size=32,
    )
    llm = AsyncLLM.from_engine_args(arguments)
    answered = asyncio.Event()

    async def inputs() -> AsyncGenerator[StreamingInput, None]:
        for part in parts:
            yield StreamingInput({"prompt_token_ids": [*part]}, params)  # vLLM appends to it
            await answered.wait()
            answered.clear()

    async def session() -> list[int]:
        tokens: list[int] = []
        async for output in llm.generate(inputs(), params, "session"):
            tokens += output.outputs[0].token_ids
            if len(tokens) % 3 == 0:
                answered.set()
        return tokens

    async def ordinary() -> list[int]:
        longer = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, **new_tokens)
        prompt: Any = {"prompt_token_ids": [*parts[0]]}
        tokens: list[int] = []
        async for output in llm.generate(prompt, longer, "ordinary"):
            tokens += output.outputs[0].token_ids
        return tokens

    try:
        return list(await asyncio.gather(session(), ordinary()))
    finally:
        llm.shutdown()


def test_a_request_that_rests_for_long_catches_up_and_can_draft_again(tiny: TinyModel) -> None:
    """For longer than the ring holds: behind a hole in the drafter's cache."""
    prompts = tiny_prompts(4)
    with tiny_engine(tiny, None) as llm:
        wanted = generate(llm, prompts, greedy())
    with tiny_engine(tiny, echo(tiny.head, 12, **AUTO), block_size=32) as llm:
        window, holes = runner(llm).window, list[int]()
        compact = window.compact

        def recording(table: Any, slots: Any) -> Any:
            holes.extend(window.skipped_blocks(slots).tolist())
            return compact(table, slots)

        window.compact = recording
        pause = itertools.repeat((0, 0), 100)
        dictate(llm, itertools.chain(pause, itertools.repeat((None, 0))))
        check_forests(llm, 12)
        drafts = record_drafts(llm)
        assert generate(llm, prompts, greedy()) == wanted
    assert len({request for request, _ in drafts}) == len(prompts), "some drafted no more"
    assert max(holes) > 0, "nobody had a hole"
