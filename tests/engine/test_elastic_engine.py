# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Budgets, skipped drafting and traces in the real engine, on a tiny model in FP32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.offline.calibrate.samples import collect
from echo_vllm.offline.trace.exact import recorded_policy, replay_exact
from echo_vllm.offline.trace.recorded import replayable
from echo_vllm.trace_format import TraceError, read_trace
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate, runner
from tests.engine.test_exactness import check_forests, greedy, tiny_engine, tiny_prompts

AUTO = {"policy": "auto", "max_depth": 4, "top_k": 3}
PATTERN = [(None, 0)] * 4 + [(0, 0)] * 7 + [(0, 2)] * 2 + [(2, 1)] * 3 + [(0, 0)] * 60
"""(max_depth, probes) of consecutive steps: all draft, none drafts, some do."""


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def dictate(llm: Any, plans: Iterator[tuple[int | None, int]]) -> None:
    """Let `plans` decide in place of the forecast."""
    turn = itertools.count()

    def plan(load: Load) -> DraftPlan:
        depth, probes = next(plans)
        return DraftPlan(depth, probes, next(turn), load.prefill_tokens, reads_prompts=depth != 0)

    scheduler(llm)._policy.plan = plan


def record_drafts(llm: Any) -> dict[tuple[str, int], list[int]]:
    """Filled while the engine runs: (request, its tokens so far) -> the tree's tokens."""
    found: dict[tuple[str, int], list[int]] = {}
    model_runner = runner(llm)
    propose = model_runner.propose_draft_token_ids

    def recording(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        for req_id, tokens in zip(model_runner.input_batch.req_ids, drafts, strict=True):
            if tokens:
                # The random part of the id differs between engines.
                request = model_runner.requests[req_id]
                found[req_id.split("-")[0], request.num_tokens] = tokens
        return drafts

    model_runner.propose_draft_token_ids = recording
    return found


def record_kept(llm: Any) -> list[tuple[int, int]]:
    """Filled while the engine runs: (slot, position) of every token whose features are kept for a
    drafter that rests."""
    kept: list[tuple[int, int]] = []
    ring = runner(llm).ring
    put = ring.put

    def recording(layers: Any, slots: Any, positions: Any, rows: Any) -> None:
        kept.extend(zip(slots.tolist(), positions.tolist(), strict=True))
        put(layers, slots, positions, rows)

    ring.put = recording
    return kept


@pytest.fixture(scope="module")
def plain_tokens(tiny: TinyModel) -> list[list[int]]:
    """What the tiny target says to 32 prompts without speculation."""
    with tiny_engine(tiny, None) as llm:
        return generate(llm, tiny_prompts(32), greedy())


@pytest.mark.full
def test_drafts_after_a_pause_are_those_without_one(
    tiny: TinyModel, plain_tokens: list[list[int]]
) -> None:
    """The drafter's cache is made whole before it drafts again, whole prompts included, and no
    token changes."""
    prompts, wanted = tiny_prompts(24), plain_tokens[:24]
    spec = echo(tiny.head, 12, **AUTO)
    with tiny_engine(tiny, spec, enable_prefix_caching=False) as llm:
        dictate(llm, itertools.repeat((None, 0)))
        always = record_drafts(llm)
        assert generate(llm, prompts, greedy()) == wanted
    with tiny_engine(tiny, spec, enable_prefix_caching=False) as llm:
        # Trees of less than full depth would differ for that reason alone. The drafter rests when
        # the first prompts come, but for no longer than the ring holds.
        pattern = [plan for plan in PATTERN[4:-20] + PATTERN[:4] if plan != (2, 1)]
        dictate(llm, itertools.cycle(pattern))
        check_forests(llm, 12)
        paused = record_drafts(llm)
        kept = record_kept(llm)
        assert generate(llm, prompts, greedy()) == wanted
    lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts[:16]]
    assert len(set(kept[: sum(lengths)])) == sum(lengths)  # whole prompts
    common = always.keys() & paused.keys()
    assert len(common) > 100
    assert len(paused) < 0.6 * len(always)
    different = [key for key in common if always[key] != paused[key]]
    assert len(different) <= 0.01 * len(common), different[:5]


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {"num_gpu_blocks_override": 14, "block_size": 32},
        {"max_num_batched_tokens": 24, "max_num_seqs": 8},
        {"block_size": 32},
    ],
    ids=["preemption", "chunked-prefill-of-24", "prefix-cache"],
)
def test_pausing_is_exact_under_server_conditions(
    tiny: TinyModel, plain_tokens: list[list[int]], options: dict[str, Any]
) -> None:
    prompts = tiny_prompts(32)
    with tiny_engine(tiny, echo(tiny.head, 12, **AUTO), **options) as llm:
        dictate(llm, itertools.cycle(PATTERN))
        check_forests(llm, 12)
        for _ in range(2):  # The second time prompts and answers come from the prefix cache.
            assert generate(llm, prompts, greedy()) == plain_tokens
        assert counters(llm)["spec_decode_num_drafts"] > 100


def count_drafts(llm: Any, prompts: list[Any], turns: int, rests: int) -> list[int]:
    """Trees verified in each turn of chats, in the first `rests` of which the drafter rests. A turn
    begins with all that was said before."""
    counts = []
    before = counters(llm).get("spec_decode_num_drafts", 0)
    for turn in range(turns):
        dictate(llm, itertools.repeat((0 if turn < rests else None, 0)))
        answers = generate(llm, prompts, greedy(60))
        prompts = [
            {"prompt_token_ids": [*p["prompt_token_ids"], *a, 5, 6, 7]}
            for p, a in zip(prompts, answers, strict=True)
        ]
        after = counters(llm).get("spec_decode_num_drafts", 0)
        counts.append(int(after - before))
        before = after
    return counts


@pytest.mark.full
@pytest.mark.parametrize("block_size", [32, 128])
def test_a_chat_that_rested_drafts_again_in_its_next_turn(tiny: TinyModel, block_size: int) -> None:
    """With prefix caching, where later turns hit blocks that the drafter never saw."""
    spec = echo(tiny.head, 12, **AUTO)
    options = {"block_size": block_size, "max_model_len": 512, "num_gpu_blocks_override": 128}
    # Prompts that end with a turn's 60 tokens far beyond what the ring holds.
    prompts = [{"prompt_token_ids": 2 * p["prompt_token_ids"]} for p in tiny_prompts(4)]
    with tiny_engine(tiny, spec, **options) as llm:
        check_forests(llm, 12)
        rested = count_drafts(llm, prompts, 4, rests=1)
        assert rested[0] == 0
    with tiny_engine(tiny, spec, **options) as llm:
        never = count_drafts(llm, prompts, 4, rests=0)
    for with_rest, without in zip(rested[1:], never[1:], strict=True):
        assert with_rest >= 0.8 * without > 0


@pytest.mark.full
def test_acceptance_is_learnt_apart_for_requests_with_a_temperature(tiny: TinyModel) -> None:
    def learnt(*temperatures: float) -> list[bool]:
        found = [0.0, 0.0]
        with tiny_engine(tiny, echo(tiny.head, 8, **AUTO)) as llm:
            dictate(llm, itertools.repeat((None, 0)))

            def observe(
                predicted: Any, accepted: Any, kind: str = "best", sampled: bool = False
            ) -> None:
                found[sampled] += sum(predicted)

            scheduler(llm)._policy.forecaster.observe_acceptance = observe
            params = [SamplingParams(temperature=t, max_tokens=8) for t in temperatures]
            generate(llm, tiny_prompts(len(params)), params)
        return [total > 0 for total in found]

    assert learnt(0.0) == [True, False]
    # Below the temperature from which candidates are drawn.
    assert learnt(0.4) == [False, True]
    assert learnt(0.0, 0.4) == [True, True]


def limit_depths(llm: Any, limits: list[tuple[int, int]]) -> None:
    """Filled while the engine runs: (depth, the most it may be) of every node that is selected."""
    policy = runner(llm).drafter.policy
    select = policy.select

    def recording(pool: Any, batch: Any) -> Any:
        forest = select(pool, batch)
        of_node = batch.depth_limits[forest.request_of_node()]
        limits.extend(zip(forest.depths.tolist(), of_node.tolist(), strict=True))
        return forest

    policy.select = recording


@pytest.mark.full
def test_a_request_is_never_drafted_deeper_than_it_may_emit(tiny: TinyModel) -> None:
    """An answer of three tokens has use for two levels, one of one token for none."""
    for section in ({"policy": "topn", "max_depth": 4, "top_k": 2}, AUTO, {"policy": "chain"}):
        nodes = 4 if section["policy"] == "chain" else 8
        with tiny_engine(tiny, echo(tiny.head, nodes, **section)) as llm:
            if section is AUTO:
                dictate(llm, itertools.repeat((None, 0)))
            limits: list[tuple[int, int]] = []
            limit_depths(llm, limits)
            params = [greedy(1 + i % 4) for i in range(8)]
            answers = generate(llm, tiny_prompts(8), params)
            assert [len(answer) for answer in answers] == [1 + i % 4 for i in range(8)]
        assert {limit for _, limit in limits} <= {1, 2}
        assert any(depth == limit for depth, limit in limits)
        assert all(depth <= limit for depth, limit in limits)


@pytest.mark.full
@pytest.mark.parametrize("k_max", [5, 24, 100])
def test_the_batch_never_verifies_more_than_k_max(tiny: TinyModel, k_max: int) -> None:
    """In every step, also where a step cannot schedule every request."""
    spec = echo(tiny.head, 16, policy="echo", k_max=k_max, gates={"1": 0.1})
    seen = []
    with tiny_engine(tiny, spec, max_num_batched_tokens=40, max_num_seqs=16) as llm:
        schedule = scheduler(llm).schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            seen.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
            return output

        scheduler(llm).schedule = counting
        generate(llm, tiny_prompts(32), greedy(64))
    assert 0 < max(seen) <= k_max


@pytest.mark.full
def test_echo_rests_while_there_is_no_budget_and_drafts_when_there_is(
    tiny: TinyModel, plain_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than the budget has rows: the drafter rests until they are gone."""
    monkeypatch.setattr("echo_vllm.policies.echo.budget_rows", lambda curve: 6.0)
    prompts = tiny_prompts(8)
    lengths = [96 if i < 3 else 24 for i in range(8)]
    params = [greedy(length) for length in lengths]
    wanted = [t[:length] for t, length in zip(plain_tokens, lengths, strict=False)]
    spec = echo(tiny.head, 8, policy="echo", max_depth=3, gates={})
    with tiny_engine(tiny, spec) as llm:
        runs: list[tuple[int, int]] = []
        model_runner = runner(llm)
        sample, draft = model_runner.sample_tokens, model_runner._draft

        def counting(*args: Any) -> Any:
            runs.append((model_runner.input_batch.num_reqs, 0))
            return sample(*args)

        def drafting(*args: Any) -> Any:
            batch = args[-1]
            runs[-1] = (batch.num_decoding, batch.num_requests)
            return draft(*args)

        model_runner.sample_tokens, model_runner._draft = counting, drafting
        assert generate(llm, prompts, params) == wanted
        found = counters(llm)
    # What a step costs is known after the first one.
    assert not any(drafting for decoding, drafting in runs[1:] if decoding > 6)
    assert any(drafting for decoding, drafting in runs if decoding <= 3)
    assert found["spec_decode_num_accepted_tokens"] > 0


@pytest.mark.full
def test_a_trace_holds_both_kinds_of_candidates(tiny: TinyModel, tmp_path: Path) -> None:
    """Greedy requests have the best ones, those with a temperature drawn ones."""
    path = tmp_path / "trace.jsonl"
    section = {"policy": "topn", "max_depth": 3, "top_k": 2, "candidates": "drawn"}
    spec = echo(tiny.head, 10, **section, trace=str(path))
    prompts = tiny_prompts(12)
    hot = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, detokenize=False)
    with tiny_engine(tiny, spec) as llm:
        generate(llm, prompts, [greedy(30), hot] * 6)
        found = counters(llm)
        runner(llm).recorder.close()
    steps = list(read_trace(path)[1])
    requests = [request for step in steps for request in step.requests]
    for request in requests:
        request.validate()
    kinds = [request.drawn for request in requests]
    assert 0.3 < np.mean(kinds) < 0.7
    # A request is of one kind all the time.
    assert len({(request.id, request.drawn) for request in requests}) == 12
    assert sum(len(r.selected) for r in requests) == found["spec_decode_num_draft_tokens"]
    samples = collect(steps, 10, kind="drawn")
    expected = np.exp(samples.node_logprob[samples.node_depth == 1]).sum()
    accepted = samples.node_accepted[samples.node_depth == 1].sum()
    # The guess is made for trained heads; this one is right by chance.
    assert 0.2 < accepted / expected < 1.5
    with pytest.raises(TraceError, match="has drawn candidates, which cannot be chosen again"):
        list(replayable(steps))


@pytest.mark.full
@pytest.mark.parametrize(
    "section",
    [
        {"policy": "topn", "max_depth": 3, "top_k": 3},
        {"policy": "echo", "max_depth": 4, "top_k": 3, "k_max": 40, "gates": {"1": 0.3}},
        {"policy": "auto", "max_depth": 4, "top_k": 3, "k_max": 64, "gamma": 0.0},
        {"policy": "evict", "max_depth": 4, "top_k": 3, "k_max": 64, "gamma": 0.02},
    ],
    ids=lambda section: section["policy"],
)
def test_a_trace_holds_what_was_drafted_and_accepted(
    tiny: TinyModel, section: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl.gz"
    num_nodes = 21 if section["policy"] == "topn" else 12
    spec = echo(tiny.head, num_nodes, **section, trace=str(path))
    with tiny_engine(tiny, spec) as llm:
        generate(llm, tiny_prompts(20), greedy(40))
        found = counters(llm)
        runner(llm).recorder.close()
    header, read = read_trace(path)
    steps = list(read)
    assert header.echo["policy"] == section["policy"]
    accepted = trees = nodes = 0
    for step in steps:
        assert step.verify_s > 0
        assert step.draft_s > 0
        assert step.plan is not None
        assert step.plan["batch"]["num_requests"] >= len(step.requests)
        for request in step.requests:
            request.validate()
            trees += bool(request.selected)
            nodes += len(request.selected)
            accepted += len(request.accepted)
            if section["policy"] == "topn":
                assert request.is_fully_verified or len(request.selected) < 21
    assert trees == found["spec_decode_num_drafts"]
    assert nodes == found["spec_decode_num_draft_tokens"]
    # The trace has whole paths, the counters what requests got of them before their limit.
    got = found["spec_decode_num_accepted_tokens"]
    assert got <= accepted <= got + 20 * header.echo["max_depth"]
    # Offline, the same policy decides the same.
    report = replay_exact(steps, recorded_policy(header))
    assert report.different == 0, report
    assert report.equal > 100, report
