# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One budget for a batch on Model Runner V2: the host says how many nodes, the device who gets
them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from echo_vllm.step.v2.budget import TreeBudget, tell
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate, runner
from tests.engine.test_exactness import POLICIES, greedy
from tests.v2.stock import PROMPTS, TOKENS, v2_engine
from tests.v2.trees import both, plain

__all__ = ["plain"]

K_MAX = 20
GATES = {"1": 0.2, "2": 0.1, "4": 0.05}


@dataclass
class Decided:
    """What the scheduler said of a step, and what became of it on the device.

    Attributes:
        prompt_rows: rows of prompts.
        placeholders: of each request with a draft.
        num_nodes: what the host said.
        given: [R], nodes of each request on the device; None where nothing was shared out.
    """

    prompt_rows: int
    placeholders: list[int]
    num_nodes: int
    given: list[int] | None = None


@dataclass
class Watch:
    """Every step's decision."""

    steps: list[Decided] = field(default_factory=list)
    _open: list[Decided] = field(default_factory=list)

    def decided(self, scheduler_output: Any, num_nodes: int) -> None:
        if not scheduler_output.num_scheduled_tokens:
            return  # Nothing runs.
        drafts = scheduler_output.scheduled_spec_decode_tokens
        others = [
            count - len(drafts.get(req_id, ()))
            for req_id, count in scheduler_output.num_scheduled_tokens.items()
        ]
        step = Decided(
            sum(count for count in others if count > 1),
            [len(tokens) for tokens in drafts.values()],
            num_nodes,
        )
        self.steps.append(step)
        if drafts:
            self._open.append(step)

    def given(self, bounds: torch.Tensor) -> None:
        self._open.pop(0).given = (bounds.diff() - 1).tolist()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    reallocate = TreeBudget.reallocate_drafts

    def told(scheduler_output: Any, plan: Any, num_nodes: int, *requests: Any) -> None:
        found.decided(scheduler_output, num_nodes)
        tell(scheduler_output, plan, num_nodes, *requests)

    def reallocated(budget: TreeBudget, *args: Any, **kwargs: Any) -> Any:
        result = reallocate(budget, *args, **kwargs)
        found.given(result[0].clone())
        return result

    monkeypatch.setattr("echo_vllm.step.v2.scheduler.tell", told)
    monkeypatch.setattr(TreeBudget, "reallocate_drafts", reallocated)
    return found


def sharing(tiny: TinyModel, **section: Any) -> dict[str, Any]:
    return echo(tiny.head, 16, policy="echo", **{"k_max": K_MAX, "gates": GATES, **section})


@both
def test_the_device_gives_what_the_host_said_and_never_more_than_there_is(
    tiny: TinyModel, plain: list[list[int]], is_async: bool, watch: Watch
) -> None:
    with v2_engine(tiny, sharing(tiny), async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        count = counters(llm)
    shared = [step for step in watch.steps if step.given is not None]
    assert len(shared) > 10
    for step in shared:
        assert step.given is not None
        assert sum(step.given) == step.num_nodes <= max(0, K_MAX - step.prompt_rows)
        assert max(step.given) <= max(step.placeholders)
    # Not in equal parts: that is what a budget for the batch is for.
    full = [step.given for step in shared if step.given and len(step.placeholders) == 4]
    assert any(max(given) > 2 * min(given) for given in full)
    assert count["spec_decode_num_accepted_tokens"] > 10
    assert count["spec_decode_num_draft_tokens"] <= K_MAX * len(watch.steps)


@pytest.mark.full
@pytest.mark.parametrize(
    "section",
    [{"share": "equal"}, {"width_at": "anywhere", "floor": 0}, {"k_max": 3}, {"k_max": 1000}],
    ids=str,
)
def test_every_way_to_share_is_exact(
    tiny: TinyModel, plain: list[list[int]], section: dict[str, Any], watch: Watch
) -> None:
    with v2_engine(tiny, sharing(tiny, **section), async_scheduling=True) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 3
    if section.get("share") == "equal":
        for step in watch.steps:
            assert max(step.given or [0]) <= K_MAX // max(1, len(step.placeholders))


@pytest.mark.full
def test_rows_follow_what_the_gates_let_through(
    tiny: TinyModel, plain: list[list[int]], watch: Watch
) -> None:
    """Where a gate stops everybody at the first level, trees have its width, and once that is known
    there are no rows for more."""
    section = {"k_max": 1000, "gates": {"1": 0.9999}, "width": 5, "top_k": 3}
    with v2_engine(tiny, sharing(tiny, **section), async_scheduling=True) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
    full = [step for step in watch.steps if len(step.placeholders) == 4]
    assert len(full) > 10
    late = [step.num_nodes for step in full[4:]]
    assert sum(late) / len(late) < 4 * 8
    assert min(late) == 4 * 5


@both
@pytest.mark.full
def test_a_budget_of_nothing_is_plain_decoding(
    tiny: TinyModel,
    plain: list[list[int]],
    is_async: bool,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No placeholder, no level drafted."""
    from echo_vllm.step.v2.drafter import TreeSpeculator

    monkeypatch.delattr(TreeSpeculator, "_grow")
    with v2_engine(tiny, sharing(tiny, k_max=0), async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
    assert not any(step.placeholders for step in watch.steps)


@pytest.mark.full
@pytest.mark.parametrize("name", ["topn-64", "echo-64"])
def test_prompts_are_read_while_large_trees_decode(
    tiny: TinyModel, name: str, watch: Watch
) -> None:
    """With room for 48 rows and three requests that would take 65 each, a prompt gets half of what
    the decoding requests leave, and `echo` charges no more placeholders than it has nodes."""
    num_nodes, section = POLICIES[name]
    if name == "echo-64":
        section = {**section, "k_max": 60}
    prompts = sorted(PROMPTS, key=lambda prompt: len(prompt["prompt_token_ids"]))
    params = [greedy(60), greedy(60), greedy(60), greedy(8)]
    chosen = [*prompts[:3], {"prompt_token_ids": [2 + i % 9 for i in range(150)]}]
    with v2_engine(tiny, None) as llm:
        plain = generate(llm, chosen, params)
    watch.steps.clear()
    spec = echo(tiny.head, num_nodes, **section)
    options = {"max_num_batched_tokens": 48, "async_scheduling": True}
    with v2_engine(tiny, spec, **options) as llm:
        core = llm.llm_engine
        for i in range(3):
            core.add_request(str(i), chosen[i], params[i])
        found: dict[str, list[int]] = {}

        def step() -> None:
            for output in core.step():
                if output.finished:
                    found[output.request_id] = list(output.outputs[0].token_ids)

        for _ in range(8):
            step()
        before = len(watch.steps)
        core.add_request("3", chosen[3], params[3])
        while core.has_unfinished_requests():
            step()
        assert [found[str(i)] for i in range(4)] == plain
        assert runner(llm).policy.max_nodes == num_nodes
    reading = [one for one in watch.steps[before:] if one.prompt_rows]
    assert len(reading) <= 8
    assert all(one.prompt_rows >= 22 for one in reading[:-1])
    if name == "echo-64":
        assert all(sum(one.placeholders) <= 60 - one.prompt_rows for one in reading)
