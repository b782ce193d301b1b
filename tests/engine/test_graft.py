# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`graft` in the real engine: what its table learns, and that it is of use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate, runner
from tests.engine.test_exactness import check_forests, greedy, tiny_engine, tiny_prompts
from tests.engine.tiny import make_head

pytestmark = pytest.mark.full

ALLOWED = 3

SECTION = {"policy": "graft", "max_depth": 4, "top_k": 3, "gates": {"1": 0.4}}


def test_the_table_learns_what_the_target_said_after_each_token(tiny: TinyModel) -> None:
    """Every row of every request, in chunks of prompts and beside other requests' trees."""
    prompts = tiny_prompts(12)
    with tiny_engine(tiny, None) as llm:
        wanted = generate(llm, prompts, greedy(40))
    with tiny_engine(tiny, echo(tiny.head, 12, **SECTION), max_num_batched_tokens=64) as llm:
        check_forests(llm, 12)
        model_runner, policy = runner(llm), runner(llm).drafter.policy
        observe, roots = policy.observe_logits, []

        def recorded(tokens: torch.Tensor, logits: torch.Tensor) -> None:
            observe(tokens, logits)
            sizes = (model_runner.step.forest.cu_nodes.diff() + 1).tolist()
            first = 0
            for req_id, size in zip(model_runner.input_batch.req_ids, sizes, strict=True):
                request = model_runner.requests[req_id]
                answer = request.output_token_ids
                if request.num_computed_tokens >= request.num_prompt_tokens:
                    row = int(tokens[first]), int(logits[first].argmax())
                    roots.append((req_id, len(answer), row))
                first += size
            assert first == len(tokens) == len(logits)

        policy.observe_logits = recorded
        assert generate(llm, prompts, greedy(40)) == wanted
    assert len(roots) > 200
    for req_id, length, (token, successor) in roots:
        answer = wanted[int(req_id.split("-")[0])]
        # The root is the last token so far; the target says the next.
        assert (token, successor) == (answer[length - 1], answer[length])


def test_retrieved_nodes_are_accepted_where_the_head_knows_nothing(
    tiny: TinyModel, tmp_path: Path
) -> None:
    """A gate that nobody passes leaves two drafted nodes of twelve; the table has the others."""
    head = make_head(tmp_path / "head", tiny.shape, seed=9)
    accepted = {}
    # At depth 1 two of twelve nodes are kept.
    sections: dict[str, tuple[int, dict[str, Any]]] = {
        "pruned": (2, {"policy": "topn", "max_depth": 1}),
        "grafted": (12, {**SECTION, "gates": {"1": 0.99}}),
    }
    for name, (nodes, section) in sections.items():
        with tiny_engine(tiny, echo(head, nodes, **section)) as llm:
            generate(llm, tiny_prompts(16), greedy(64))
            found = counters(llm)
        accepted[name] = found["spec_decode_num_accepted_tokens"] / found["spec_decode_num_drafts"]
    assert accepted["grafted"] > accepted["pruned"] + 0.3


def test_a_grammars_mask_teaches_the_table_nothing(
    tiny: TinyModel,
) -> None:
    """The runner writes the mask into the logits; here one that leaves a single token."""

    def mask(logits: torch.Tensor, scheduler_output: Any, grammar: Any) -> None:
        logits[:, torch.arange(logits.shape[1]) != ALLOWED] = float("-inf")

    with tiny_engine(tiny, echo(tiny.head, 12, **SECTION)) as llm:
        model_runner, table_of = runner(llm), runner(llm).drafter.policy
        sample, model_runner._mask = model_runner.sample_tokens, mask
        model_runner.sample_tokens = lambda grammar: sample("any")
        answers = generate(llm, tiny_prompts(4), greedy(12))
        table = table_of.table
    assert answers == [[ALLOWED] * 12] * 4
    successors, logprobs = table._tokens[ALLOWED], table._logprobs[ALLOWED]
    assert len(set(successors.tolist())) == len(successors)
    assert torch.isfinite(logprobs).all()
