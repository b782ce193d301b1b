# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Replays against a drafter that is a table: what is recorded, and what is decided again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from echo_vllm.forecast import CostCurve, Hinge, StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.offline.trace.contenders import BestTable, Contender, parse_contender
from echo_vllm.offline.trace.exact import recorded_policy, replay_exact
from echo_vllm.offline.trace.recorded import STAND_IN, RecordedDrafter, fully_verified
from echo_vllm.offline.trace.replay import BLOCK_SIZE, Backlog, replay
from echo_vllm.offline.trace.summary import summary
from echo_vllm.policies import DraftBatch, DraftPolicy, make_policy, parse_section
from echo_vllm.step.v1.window import WINDOW, DrafterWindow
from echo_vllm.trace_format import TraceError, TraceHeader, TraceRequest, TraceStep
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import CandidatePool

VOCAB = 12
COST = StepCost(
    verify=Hinge(k_max=16, gamma=0.03, base=0.01).to_curve(),
    draft_level=CostCurve((1, 64), (0.0008, 0.002)),
    catch_up=CostCurve((1, 64), (0.0008, 0.002)),
    other=0.001,
)
FULL: dict[str, Any] = {"policy": "topn", "max_depth": 4, "top_k": 3}
FULL_NODES = 3 + 3 * 9


def logprobs_after(request: int, path: tuple[int, ...]) -> torch.Tensor:
    """[VOCAB], the drafter's and the target's distribution after `path`, a fixed function."""
    seed = hash((request, path)) % 2**31
    sharpness = 1.0 + 3.0 * (request % 3)
    noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(sharpness * noise, dim=0)


class LiveStep:
    """The engine's drafting and verification of some requests, with the table for both models."""

    def __init__(self, policy: DraftPolicy, requests: list[int], batch: DraftBatch) -> None:
        self.requests = requests
        pool = CandidatePool.empty(len(requests))
        paths: list[dict[int, tuple[int, ...]]] = [{ROOT: ()} for _ in requests]
        self.level_rows: list[int] = []
        active = pool.active
        for depth in range(1, policy.max_depth + 1):
            expansion = policy.expand(depth, pool, batch)
            if expansion is None:
                break
            if expansion.requests is not None:
                active = expansion.requests
            columns = expansion.frontier
            if columns is None:
                columns = torch.full((len(active), 1), ROOT)
            else:
                self.level_rows.append(columns.numel())
            tops = [
                [
                    logprobs_after(requests[r], paths[r][c]).topk(policy.num_ranks)
                    for c in columns[a].tolist()
                ]
                for a, r in enumerate(active.tolist())
            ]
            first = pool.num_columns
            pool.grow(
                expansion,
                torch.stack([torch.stack([t.indices for t in row]) for row in tops]),
                torch.stack([torch.stack([t.values for t in row]) for row in tops]),
            )
            for r in active.tolist():
                for column in range(first, pool.num_columns):
                    above = paths[r][int(pool.parents[r, column])]
                    paths[r][column] = (*above, int(pool.token_ids[r, column]))
        self.pool, self.paths = pool, paths
        self.forest: DraftForest = policy.select(pool, batch)

    def record(self, number: int, batch: DraftBatch) -> TraceStep:
        """Verify with the target, which samples from the same table, and write it down."""
        assert self.forest.columns is not None
        cu = self.forest.cu_nodes.tolist()
        found = []
        for r, request in enumerate(self.requests):
            finite = (self.pool.path_logprobs[r] > -torch.inf).nonzero().flatten().tolist()
            place = {column: i for i, column in enumerate(finite)} | {ROOT: ROOT}
            selected = self.forest.columns[cu[r] : cu[r + 1]].tolist()
            column_of = {self.paths[r][column]: column for column in selected}
            accepted: list[int] = []
            path: tuple[int, ...] = ()
            generator = torch.Generator().manual_seed(7919 * number + request)
            while True:
                chances = logprobs_after(request, path).exp()
                path = (*path, int(chances.multinomial(1, generator=generator)))
                if path not in column_of:
                    break
                accepted.append(place[column_of[path]])
            starts = [sum(c < start for c in finite) for start in self.pool.level_starts]
            found.append(
                TraceRequest(
                    id=f"{request}",
                    context=10,
                    parents=[place[int(self.pool.parents[r, c])] for c in finite],
                    logprobs=self.pool.path_logprobs[r, finite].tolist(),
                    level_starts=[start for start in starts if start < len(finite)],
                    selected=[place[column] for column in selected],
                    accepted=accepted,
                )
            )
        told = {
            "num_requests": batch.num_requests,
            "num_decoding": batch.num_decoding,
            "probes": batch.probes.tolist(),
        }
        return TraceStep(
            step=number,
            rows=len(self.requests) + self.forest.num_nodes,
            decoding=len(self.requests),
            prefill_tokens=0,
            verify_s=0.02,
            draft_s=0.01,
            draft_levels=self.level_rows,
            plan={**batch.plan.to_dict(), "batch": told},
            requests=found,
        )


def header_of(section: dict[str, Any], num_nodes: int) -> TraceHeader:
    config = parse_section(section, num_speculative_tokens=num_nodes)
    echo = config.model_dump(mode="json", exclude={"trace"})
    return TraceHeader("target", "head", "float32", num_nodes, echo, "2026-01-01")


def recording(
    section: dict[str, Any],
    num_nodes: int,
    *,
    steps: int = 12,
    concurrency: int = 3,
    plans: Iterable[DraftPlan] | None = None,
) -> tuple[TraceHeader, list[TraceStep]]:
    config = parse_section(section, num_speculative_tokens=num_nodes)
    policy = make_policy(config, num_nodes)
    every = list(plans) if plans is not None else [DraftPlan()]
    found = []
    for number in range(steps):
        plan = every[number % len(every)]
        requests = [concurrency * number + i for i in range(concurrency)]
        probes = torch.tensor(plan.probed(concurrency), dtype=torch.int64)
        batch = DraftBatch(concurrency, concurrency + 1, plan, probes)
        found.append(LiveStep(policy, requests, batch).record(number, batch))
    return header_of(section, num_nodes), found


@pytest.fixture(scope="module")
def full() -> list[TraceStep]:
    return recording(FULL, FULL_NODES, steps=60)[1]


@pytest.fixture(scope="module")
def drafter(full: list[TraceStep]) -> RecordedDrafter:
    return RecordedDrafter(fully_verified(full))


# --- the same decisions --------------------------------------------------------------------

PLANS = [
    DraftPlan(max_depth=depth, probes=1, turn=turn, prefill_tokens=2, max_rows=20.0, price=90.0,
              cost=COST, factors=(0.9, 1.1))
    for turn, depth in enumerate([1, 2, 3, 4, 4])
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "num_nodes"),
    [
        (FULL, FULL_NODES),
        ({"policy": "topn", "max_depth": 3, "top_k": 2}, 5),
        ({"policy": "chain"}, 4),
        ({"policy": "static", "tree": [[1], [0], [0, 2], [1, 1], [1, 1, 0]]}, 6),
        ({"policy": "echo", "max_depth": 4, "top_k": 2, "width": 3, "k_max": 14}, 8),
        ({"policy": "echo", "max_depth": 4, "top_k": 2, "width": 3, "gates": {"1": 0.4}}, 8),
        ({"policy": "echo", "max_depth": 3, "top_k": 2, "width": 2, "share": "equal"}, 6),
        ({"policy": "auto", "max_depth": 4, "top_k": 2, "width": 3}, 8),
        ({"policy": "auto", "max_depth": 4, "top_k": 3, "width": 3, "floor": 1}, 12),
    ],
)
def test_a_replay_decides_as_the_recording_did(section: dict[str, Any], num_nodes: int) -> None:
    header, steps = recording(section, num_nodes, plans=PLANS)
    report = replay_exact(steps, recorded_policy(header))
    assert report.first is None
    assert (report.steps, report.equal, report.different) == (12, 36, 0)
    assert report.agrees


def test_another_decision_is_found() -> None:
    header, steps = recording(FULL, 8, plans=PLANS)
    request = steps[2].requests[1]
    swapped = replace(request, selected=[request.selected[0], *request.selected[:0:-1]])
    steps[2] = replace(steps[2], requests=[steps[2].requests[0], swapped, steps[2].requests[2]])
    report = replay_exact(steps, recorded_policy(header))
    assert (report.equal, report.different) == (35, 1)
    assert report.first is not None
    assert report.first.startswith("step 2, request 7: ")
    assert not report.agrees


def test_another_policy_decides_differently() -> None:
    _, steps = recording({"policy": "auto", "max_depth": 4, "top_k": 3, "width": 3}, 8)
    other = header_of({"policy": "topn", "max_depth": 4, "top_k": 3}, 5)
    assert not replay_exact(steps, recorded_policy(other)).agrees


def test_what_the_engine_cut_is_told_apart() -> None:
    header, steps = recording(FULL, 8)
    request = steps[0].requests[0]
    cut = replace(request, selected=request.selected[:3], accepted=[])
    steps[0] = replace(steps[0], requests=[cut, *steps[0].requests[1:]])
    report = replay_exact(steps, recorded_policy(header))
    assert (report.equal, report.cut, report.different) == (35, 1, 0)


def test_a_step_without_all_of_its_requests_is_left_out() -> None:
    header, steps = recording(FULL, 8)
    steps[0] = replace(steps[0], requests=steps[0].requests[1:])
    report = replay_exact(steps, recorded_policy(header))
    assert (report.steps, report.incomplete, report.equal) == (11, 1, 33)


# --- other decisions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "num_nodes"),
    [
        ({"policy": "topn", "max_depth": 4, "top_k": 3}, 6),
        ({"policy": "topn", "max_depth": 2, "top_k": 3}, 12),
        ({"policy": "echo", "max_depth": 3, "top_k": 3, "width": 3, "k_max": 20}, 10),
    ],
)
def test_what_a_replay_accepts_is_what_the_target_would_have(
    section: dict[str, Any], num_nodes: int, full: list[TraceStep], drafter: RecordedDrafter
) -> None:
    """A policy whose frontier the recording covers: compare with running it for real."""
    policy = make_policy(parse_section(section, num_speculative_tokens=num_nodes), num_nodes)
    for number, step in enumerate(full):
        requests = [int(request.id) for request in step.requests]
        batch = DraftBatch(3, 4)
        live = LiveStep(policy, requests, batch).record(number, batch)
        samples = np.arange(3 * number, 3 * number + 3)
        draft = drafter.draft(policy, batch, samples)
        accepted, unknown = drafter.accepted(draft, samples)
        assert accepted.tolist() == [len(request.accepted) for request in live.requests]
        assert not unknown.any()
        assert draft.level_rows == list(live.draft_levels)
        assert draft.forest.cu_nodes.diff().tolist() == [len(r.selected) for r in live.requests]


def test_what_was_not_expanded_is_a_stand_in_and_is_counted() -> None:
    # Depth 2 was drafted after candidate 0 alone; a chain along 0 and a tree of both are asked for.
    request = TraceRequest("r", 5, [-1, -1, 0, 0], [-0.2, -1.8, -0.5, -1.6], [0, 2], range(4), [1])
    drafter = RecordedDrafter([request])
    chain = Contender.of("chain", {"policy": "chain"}, 2).policy()
    tree = Contender.of("tree", {"policy": "topn", "max_depth": 2, "top_k": 2}, 6).policy()
    assert chain is not None
    assert tree is not None
    one = np.array([0])
    draft = drafter.draft(chain, DraftBatch.of(1), one)
    assert draft.selected() == [[0, 2]]
    assert [a.tolist() for a in drafter.accepted(draft, one)] == [[0], [False]]
    draft = drafter.draft(tree, DraftBatch.of(1), one)
    assert draft.selected() == [[0, 2, 3, 1, STAND_IN, STAND_IN]]
    # Candidate 1 was accepted, and what comes after it is not known.
    assert [a.tolist() for a in drafter.accepted(draft, one)] == [[1], [True]]
    # Stand-ins score as the known candidates of their rank below their parent.
    scores = draft.forest.path_logprobs.tolist()
    assert scores[-2:] == pytest.approx([-1.8 - 0.3, -1.8 - 1.4])


def test_a_policy_that_wants_more_than_was_recorded_is_refused(drafter: RecordedDrafter) -> None:
    deep = Contender.of("deep", {"policy": "chain"}, 5)
    with pytest.raises(TraceError, match="drafts 5 levels and the trace has 4; lower"):
        replay(drafter, deep, 1, COST)
    wide = Contender.of("wide", {"policy": "topn", "max_depth": 2, "top_k": 4}, 8)
    with pytest.raises(TraceError, match="drafts 4 children after a node and the trace has 3"):
        replay(drafter, wide, 1, COST)


# --- figures -------------------------------------------------------------------------------


def test_plain_decoding_costs_what_the_curve_says(drafter: RecordedDrafter) -> None:
    result = replay(drafter, Contender("plain"), 8, COST, prefill_tokens=4)
    assert result.tokens == 1
    assert result.nodes == result.drafting == 0
    assert result.tokens_per_second == pytest.approx(8 / COST.plain_step(8, 4))


def test_figures_are_those_of_the_recording_where_nothing_changes(
    full: list[TraceStep], drafter: RecordedDrafter
) -> None:
    result = replay(drafter, Contender.of("full", FULL, FULL_NODES), 3, COST, request_steps=1500)
    wanted = 1 + np.mean([len(r.accepted) for step in full for r in step.requests])
    assert result.tokens == pytest.approx(wanted, rel=0.05)
    assert result.nodes == 3 * FULL_NODES
    assert (result.drafter_levels, result.drafter_rows) == (3, 3 * 3 * 3)
    assert result.unknown == result.starved == 0
    # Committed tokens vary around their mean, and the curve is linear there.
    seconds = COST.step(3 + 3 * FULL_NODES, [9, 9, 9], 3 * result.tokens)
    assert result.seconds == pytest.approx(seconds, rel=1e-3)
    assert result.tokens_per_second == pytest.approx(3 * result.tokens / seconds, rel=2e-3)


def test_a_replay_is_deterministic_and_depends_on_its_seed(drafter: RecordedDrafter) -> None:
    auto = {"policy": "auto", "max_depth": 4, "top_k": 3, "width": 3}
    first, again, other = (
        replay(
            drafter, Contender.of("auto", auto, 12), 4, COST, request_steps=64, warm_up=8, seed=seed
        )
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("concurrency", [4, 64])
def test_auto_is_not_below_plain_or_any_chain_by_more_than_its_probes(
    concurrency: int, drafter: RecordedDrafter
) -> None:
    def run(contender: Contender | BestTable) -> Any:
        return replay(drafter, contender, concurrency, COST, request_steps=200)

    auto = run(Contender.of("auto", {"policy": "auto", "max_depth": 4, "top_k": 3, "width": 3}, 12))
    plain = run(Contender("plain"))
    assert auto.tokens_per_second > 0.97 * plain.tokens_per_second
    assert auto.tokens_per_second > 0.97 * run(BestTable()).tokens_per_second


def test_the_budget_holds_at_every_load(drafter: RecordedDrafter) -> None:
    section = {"policy": "echo", "max_depth": 4, "top_k": 3, "width": 3, "k_max": 40}
    for concurrency in (1, 100):
        result = replay(
            drafter, Contender.of("echo", section, 12), concurrency, COST, request_steps=200
        )
        assert 0 < result.most_nodes <= 40
        assert (result.starved > 0) == (concurrency == 100)


def test_more_requests_than_samples_are_drawn_again(drafter: RecordedDrafter) -> None:
    result = replay(
        drafter, Contender.of("topn", {**FULL, "top_k": 2}, 4), 500, COST, request_steps=500
    )
    assert result.nodes == 2000


def test_a_trace_that_was_not_fully_verified_is_refused() -> None:
    _, steps = recording(FULL, 8)
    with pytest.raises(TraceError, match="only 0 of the trace's 36 trees were verified with all"):
        fully_verified(steps)
    with pytest.raises(TraceError, match="only 0 of the trace's 0 trees"):
        fully_verified([])


def test_a_summary_counts_what_is_there() -> None:
    header, steps = recording(FULL, 8, steps=4)
    found = summary(header, steps)
    assert (found["steps"], found["trees"], found["concurrency"]) == (4, 12, 3)
    assert (found["candidates"], found["nodes"], found["levels"]) == (30, 8, 4)
    assert found["fully_verified"] == 0
    accepted = [len(request.accepted) for step in steps for request in step.requests]
    assert found["accepted"] == pytest.approx(np.mean(accepted))
    assert found["accepted_by_depth"][0] == pytest.approx(np.mean([a >= 1 for a in accepted]))
    with pytest.raises(TraceError, match="has no steps"):
        summary(header, [])


@pytest.mark.parametrize(
    "text",
    ["", "topn", "topn:", "topn:0", "topn:999", "topn:x", "topn:8:[1]", "topn:8:{", "x.json"],
)
def test_what_is_not_a_policy_is_refused(text: str) -> None:
    with pytest.raises(TraceError, match="a policy must be plain, best table, oracle, oracle tree"):
        parse_contender(text)


def test_policies_can_be_written_on_a_command_line() -> None:
    def policy(text: str) -> DraftPolicy | None:
        contender = parse_contender(text)
        assert isinstance(contender, Contender)
        return contender.policy()

    assert policy("plain") is None
    small = policy('topn:6:{"max_depth": 3, "top_k": 2}')
    assert small is not None
    assert (small.max_depth, small.num_ranks) == (3, 2)
    assert policy("examples/topn-64.json") is not None
    assert parse_contender("best table") == BestTable()
    with pytest.raises(ValueError, match=r"echo\.policy must be one of"):
        parse_contender("tpon:6")


# --- the end of an answer, and coming back after a rest ------------------------------------


def test_a_request_near_its_end_drafts_no_deeper_than_it_may() -> None:
    # The recording could draft one level for the second of these, because two tokens were left.
    parents, scores = [-1, -1, 0, 0], [-0.2, -1.8, -0.5, -1.6]
    long = TraceRequest("a", 20, parents, scores, [0, 2], range(4), [0, 2])
    short = TraceRequest("a", 23, parents[:2], scores[:2], [0], range(2), [0])
    step = TraceStep(1, 8, 2, 0, 0.02, 0.01, [1], None, [long, short])
    kept = fully_verified([step])
    assert kept == [long, short]
    drafter = RecordedDrafter(kept)
    assert drafter.levels.tolist() == [2, 1]
    result = replay(drafter, Contender.chain(2), 2, COST, request_steps=64)
    assert result.nodes == 2 + 1
    assert result.tokens == 1 + (2 + 1) / 2


def test_a_tree_that_is_short_for_another_reason_is_left_out(full: list[TraceStep]) -> None:
    first, *others = full[0].requests
    narrow = replace(
        first,
        parents=first.parents[:2],
        logprobs=first.logprobs[:2],
        level_starts=[0],
        selected=[0, 1],
        accepted=[],
    )
    kept = fully_verified([replace(full[0], requests=[narrow, *others])])
    assert kept == others


def test_catching_up_passes_what_the_engine_would_pass() -> None:
    """Requests that draft now and then, against the engine's own book."""
    rng = np.random.default_rng(0)
    count, start = 6, 200
    window = DrafterWindow(count, count * 64, BLOCK_SIZE, WINDOW)
    table = np.arange(count * 64, dtype=np.int32).reshape(count, 64)
    slots, ends = np.arange(count), np.full(count, start)
    for slot in range(count):
        window.begin(slot, table[slot].tolist(), 0)
    window.seen(slots, np.zeros(count, np.int64), ends, table)
    backlog = Backlog(count)
    tokens = np.ones(count, np.int64)
    lengths = set()
    for number in range(400):
        # Each step commits `tokens`; rests are short and long ones.
        begins, stops = ends, ends + tokens
        firsts = window.firsts(slots, begins, stops)
        rows = backlog.rows(stops + 1)
        assert rows.tolist() == (stops - firsts).tolist()
        assert backlog.missed(stops + 1) == window.num_behind(slots, begins)
        lengths |= set(rows.tolist())
        drafting = slots[rng.random(count) < (0.02 if number % 200 < 120 else 0.6)]
        window.seen(drafting, firsts[drafting], stops[drafting], table[drafting])
        more = np.ones(count, np.int64)
        more[drafting] += rng.integers(0, 3, len(drafting))
        backlog.commit(more, drafting)
        tokens, ends = more, stops
    assert max(lengths) == WINDOW + BLOCK_SIZE + 1
    assert len([length for length in lengths if length > 3]) > 20


def test_a_context_has_its_price_at_every_load() -> None:
    from echo_vllm.offline.trace.published import specdecode_bench

    published = specdecode_bench()
    near, far = published.with_context(0), published.with_context(10_000)
    assert far.plain_step(4) - near.plain_step(4) == pytest.approx(0.393e-3)
    assert far.step(8, [4], 4) - near.step(8, [4], 4) == pytest.approx(0.393e-3 + 0.024e-3)
