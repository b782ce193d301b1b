# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Traces on Model Runner V2: what was drafted, verified and accepted, though the host sees it late;
`echo-vllm calibrate` reads them as those of V1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.offline.calibrate.samples import collect
from echo_vllm.trace_format import TraceStep, read_trace
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate, runner
from tests.engine.test_exactness import greedy
from tests.offline.calibrate.test_calibrate_command import run
from tests.v2.stock import PROMPTS, TOKENS, v2_engine
from tests.v2.trees import plain, sampling

__all__ = ["plain"]

pytestmark = pytest.mark.full


def steps_of(llm: Any, path: Path) -> list[TraceStep]:
    """The whole trace; the engine has ended its requests."""
    runner(llm).end_trace()
    runner(llm).recorder.close()
    steps = list(read_trace(path)[1])
    for step in steps:
        assert step.verify_s > 0
        assert step.plan is not None
        assert step.plan["batch"]["num_requests"] >= len(step.requests)
        for request in step.requests:
            request.validate()
    return steps


@pytest.mark.parametrize(
    ("section", "is_async"),
    [
        ({"policy": "topn", "max_depth": 3, "top_k": 3}, False),
        ({"policy": "echo", "max_depth": 4, "top_k": 3, "k_max": 40, "gates": {"1": 0.3}}, True),
    ],
    ids=["topn", "echo"],
)
def test_a_trace_holds_what_was_drafted_and_accepted(
    tiny: TinyModel, plain: list[list[int]], section: dict[str, Any], is_async: bool, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    num_nodes = 21 if section["policy"] == "topn" else 12
    spec = echo(tiny.head, num_nodes, **section, trace=str(path))
    with v2_engine(tiny, spec, async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        steps, found = steps_of(llm, path), counters(llm)
    requests = [request for step in steps for request in step.requests]
    # vLLM counts no step behind a request's end, which an asynchronous engine still runs.
    ends = 2 * 6 * section["max_depth"]
    accepted = sum(len(request.accepted) for request in requests)
    assert 0 <= accepted - found["spec_decode_num_accepted_tokens"] <= ends
    selected = sum(len(request.selected) for request in requests)
    if section["policy"] == "topn":
        # Not all, because what prompts leave of a batch cuts trees.
        assert sum(request.is_fully_verified for request in requests) > 0.8 * len(requests)
        assert selected >= found["spec_decode_num_draft_tokens"]
        samples = collect(steps, num_nodes)
        assert samples.num_trees > 0.8 * len(requests)
    # What follows in the same request begins where this one's path and its bonus token end, or
    # later where a step had no tree of it.
    lasts: dict[str, int] = {}
    exact = 0
    for request in requests:
        if request.id in lasts:
            assert request.context >= lasts[request.id]
            exact += request.context == lasts[request.id]
        lasts[request.id] = request.context + len(request.accepted) + 1
    assert exact > 0.8 * len(requests)


def test_a_trace_holds_both_kinds_of_candidates(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    section = {"policy": "topn", "max_depth": 3, "top_k": 2, "candidates": "drawn"}
    spec = echo(tiny.head, 10, **section, trace=str(path))
    params = [greedy(TOKENS), sampling()] * 3
    with v2_engine(tiny, spec, async_scheduling=True) as llm:
        generate(llm, PROMPTS, params)
        steps = steps_of(llm, path)
    requests = [request for step in steps for request in step.requests]
    assert 0.3 < np.mean([request.drawn for request in requests]) < 0.7
    assert len({(request.id, request.drawn) for request in requests}) == 6
    samples = collect(steps, 10, kind="drawn")
    expected = np.exp(samples.node_logprob[samples.node_depth == 1]).sum()
    accepted = samples.node_accepted[samples.node_depth == 1].sum()
    assert 0.2 < accepted / expected < 1.7


def test_calibrate_makes_of_traces_a_profile_that_an_engine_starts_with(
    tiny: TinyModel, plain: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trace with the drafter's best candidates, one with drawn ones."""
    monkeypatch.setenv("ECHO_VLLM_CACHE", str(tmp_path / "cache"))
    traces = []
    for candidates, params in (("best", greedy(TOKENS)), ("drawn", sampling(max_tokens=12))):
        traces.append(tmp_path / f"{candidates}.jsonl")
        section = {"policy": "topn", "max_depth": 2, "top_k": 3, "candidates": candidates}
        with v2_engine(tiny, echo(tiny.head, 12, **section, trace=str(traces[-1]))) as llm:
            generate(llm, PROMPTS, params)
            steps_of(llm, traces[-1])
    profile = tmp_path / "profile.json"
    result = run(
        *(tiny.target, "--drafter", tiny.head, "-o", profile),
        *("--trace", traces[0], "--trace", traces[1]),
    )
    assert result.exit_code == 0, result.output
    made = DrafterProfile.load(profile)
    assert [depth.depth for depth in made.depths] == [1, 2]
    assert made.drawn is not None
    assert [depth.depth for depth in made.drawn.depths] == [1, 2]
    assert made.num_steps > 40
    first, second = made.depths
    for policy, is_async in (("echo", True), ("auto", False)):
        spec = echo(tiny.head, 12, policy=policy, profile=str(profile))
        with v2_engine(tiny, spec, async_scheduling=is_async) as llm:
            if policy == "auto":
                growth = runner(llm).policy.growth[0]
                assert growth == pytest.approx(min(1, second.acceptance / first.acceptance))
            assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
