# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the scheduler does to drafts and tells the policies."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.step.scheduler import trimmed
from tests.engine.conftest import TinyModel
from tests.engine.engines import echo, generate
from tests.engine.test_elastic_engine import AUTO, dictate, scheduler
from tests.engine.test_exactness import greedy, tiny_engine, tiny_prompts


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(-5, 400))
def test_the_longest_drafts_are_cut_first_and_no_more_than_needed(
    sizes: list[int], budget: int
) -> None:
    kept = trimmed(sizes, budget)
    assert sum(kept) == max(0, min(sum(sizes), budget))
    assert all(0 <= k <= size for k, size in zip(kept, sizes, strict=True))
    cut = [k for k, size in zip(kept, sizes, strict=True) if k < size]
    if cut:
        assert max(cut) - min(cut) <= 1
        assert max(kept) <= min(cut) + 1


def record_plans(llm: Any) -> list[tuple[int, int, int]]:
    """Filled while the engine runs: (prompt tokens that were expected in a step, prompt tokens in
    it, requests that wait after it)."""
    found: list[tuple[int, int, int]] = []
    core = scheduler(llm)
    schedule, expected = core.schedule, [0]

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        drafts = output.scheduled_spec_decode_tokens
        prompts = sum(
            count - 1 - len(drafts.get(request, ()))
            for request, count in output.num_scheduled_tokens.items()
        )
        found.append((expected[0], prompts, len(core.waiting)))
        expected[0] = output.echo_plan.prefill_tokens
        return output

    core.schedule = recording
    return found


@pytest.mark.full
def test_prompts_that_find_no_block_are_not_expected_in_the_next_step(tiny: TinyModel) -> None:
    """Or they would be expected in every step, and the policies would prepare for them."""
    spec = echo(tiny.head, 12, **AUTO)
    options = {"num_gpu_blocks_override": 14, "block_size": 32, "enable_prefix_caching": False}
    with tiny_engine(tiny, spec, **options) as llm:
        dictate(llm, itertools.repeat((None, 0)))
        plans = record_plans(llm)
        generate(llm, tiny_prompts(24), greedy())
    crowded = [(wanted, came) for wanted, came, waiting in plans if waiting]
    assert len(crowded) > 50
    assert sum(wanted for wanted, _ in crowded) <= sum(came for _, came in crowded) + 64


@pytest.mark.full
@pytest.mark.parametrize(
    "section", [{"policy": "topn", "max_depth": 6, "top_k": 4}, {"policy": "echo", "width": 4}]
)
def test_every_running_request_keeps_its_row(tiny: TinyModel, section: dict[str, Any]) -> None:
    """Eight requests with trees of sixteen in steps of 32 tokens."""
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "enable_prefix_caching": False}
    with tiny_engine(tiny, echo(tiny.head, 16, **section), **options) as llm:
        core = scheduler(llm)
        schedule = core.schedule
        left_out: list[str] = []
        trees: list[int] = []

        def recording(*args: Any, **kwargs: Any) -> Any:
            running = [r.request_id for r in core.running]
            output = schedule(*args, **kwargs)
            left_out.extend(r for r in running if r not in output.num_scheduled_tokens)
            trees.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
            return output

        core.schedule = recording
        generate(llm, tiny_prompts(16), greedy())
    assert max(trees) > 0
    assert not left_out


@pytest.mark.full
def test_a_budget_from_measured_costs_holds_when_drafts_of_different_steps_meet(
    tiny: TinyModel,
) -> None:
    spec = echo(tiny.head, 12, policy="echo", max_depth=4, width=4)
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "enable_prefix_caching": False}
    with tiny_engine(tiny, spec, **options) as llm:
        core = scheduler(llm)
        schedule = core.schedule
        found: list[int] = []

        def recording(*args: Any, **kwargs: Any) -> Any:
            if core._policy._max_rows is not None:
                core._policy._max_rows = 15.0
            output = schedule(*args, **kwargs)
            drafts = output.scheduled_spec_decode_tokens
            if core._policy._max_rows is not None and drafts:
                found.append(sum(map(len, drafts.values())) + len(output.num_scheduled_tokens))
            return output

        core.schedule = recording
        generate(llm, tiny_prompts(16), greedy())
    assert len(found) > 20
    assert max(found) <= 15
