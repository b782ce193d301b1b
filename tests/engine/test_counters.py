# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the counters say is what users got, and what a step may have; blocks in use."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from echo_vllm.step import acceptance_watch
from echo_vllm.step.acceptance_watch import AcceptanceWatch
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine
from tests.engine.test_elastic_engine import scheduler
from tests.engine.test_exactness import greedy, tiny_engine, tiny_prompts
from tests.engine.tiny import Shape, add_letters, make_head, make_target

LETTERS = "abcdefghijkl"
K_MAX = 10


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny target whose tokens are letters, and its head."""
    folder = tmp_path_factory.mktemp("spelled")
    target, head = make_target(folder / "target", Shape()), make_head(folder / "head", Shape())
    add_letters(target, LETTERS)
    return target, head


@pytest.fixture(scope="module")
def speaking(spelled: tuple[Path, Path]) -> Iterator[Any]:
    target, head = spelled
    spec = echo(head, 8, policy="echo", k_max=K_MAX)
    with engine(target, spec, max_model_len=256, max_num_seqs=4) as llm:
        yield llm


def tokens_by_step(llm: Any, params: list[Any]) -> list[int]:
    """How many tokens each request got in each step in which it got any."""
    from vllm.sampling_params import RequestOutputKind

    core = llm.llm_engine
    for number, (prompt, own) in enumerate(zip(tiny_prompts(len(params)), params, strict=True)):
        own.output_kind = RequestOutputKind.DELTA
        core.add_request(str(number), prompt, own)
    found = []
    while core.has_unfinished_requests():
        for output in core.step():
            found += [len(part.token_ids) for part in output.outputs if part.token_ids]
    return found


@pytest.mark.full
@pytest.mark.parametrize("kind", ["limit", "stop token", "stop string"])
def test_accepted_tokens_are_those_that_users_got(speaking: Any, kind: str) -> None:
    from vllm import SamplingParams

    ends: dict[str, dict[str, Any]] = {
        "limit": {"ignore_eos": True},
        "stop token": {"stop_token_ids": [5, 7], "ignore_eos": True},
        "stop string": {"stop": ["cd", "f", "ja"], "ignore_eos": True},
    }
    params = [SamplingParams(temperature=0, max_tokens=3 + i % 20, **ends[kind]) for i in range(32)]
    before = counters(speaking)
    by_step = tokens_by_step(speaking, params)
    speaking.llm_engine.step()  # What was aborted leaves the engine.
    after = counters(speaking)
    counted = {name: after[name] - before[name] for name in before}
    assert counted["spec_decode_num_accepted_tokens"] == sum(count - 1 for count in by_step) > 0
    for theirs, ours in (
        ("spec_decode_num_drafts", "echo_trees"),
        ("spec_decode_num_draft_tokens", "echo_verified_nodes"),
        ("spec_decode_num_accepted_tokens", "echo_accepted_tokens"),
    ):
        assert counted[theirs] == counted[ours], theirs


@pytest.mark.full
def test_the_budget_is_what_the_batch_could_have(speaking: Any) -> None:
    """Four requests may have K_MAX nodes together, and not eight each."""
    core = scheduler(speaking)
    schedule, shares = core.schedule, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        sizes = list(map(len, output.scheduled_spec_decode_tokens.values()))
        if sizes:
            shares.append((len(sizes), sum(sizes)))
        return output

    before = counters(speaking)
    core.schedule = recording
    try:
        tokens_by_step(speaking, [greedy(32) for _ in range(8)])
    finally:
        core.schedule = schedule
    after = counters(speaking)
    given = after["echo_budget_nodes"] - before["echo_budget_nodes"]
    used = after["echo_verified_nodes"] - before["echo_verified_nodes"]
    assert used == sum(nodes for _, nodes in shares) <= given
    most = sum(min(K_MAX, 8 * trees) for trees, _ in shares)
    assert 0.8 * most < given <= most, "steps that read prompts may have less"


@pytest.mark.full
def test_blocks_are_reserved_for_rows_and_not_for_drafts_to_come(tiny: TinyModel) -> None:
    spec = echo(tiny.head, 64, max_depth=6)
    with tiny_engine(tiny, spec, block_size=32, enable_prefix_caching=False) as llm:
        core = scheduler(llm)
        pool = core.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        schedule, most, seen = core.schedule, [0], []

        def recording(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if core.running:
                # Scheduled rows count as computed from here on.
                most[0] = max(most[0], core.running[0].num_computed_tokens)
                seen.append((free - pool.get_num_free_blocks(), ceil(most[0] / 32)))
            return output

        core.schedule = recording
        tokens_by_step(llm, [greedy(100)])
    assert len(seen) > 20
    assert all(used == needed for used, needed in seen), seen


def test_a_head_that_is_never_right_is_reported_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records: list[tuple[Any, ...]] = []
    monkeypatch.setattr(acceptance_watch.logger, "warning", lambda *args: records.append(args))
    watch = AcceptanceWatch("a head")
    for _ in range(10):
        watch.observe([1] * 100)
    assert not records
    for _ in range(20):
        watch.observe([0] * 100)
    [(message, *values)] = records
    said = message % tuple(values)
    for cause in ("a head", "another model", "layers", "revision", "chat template"):
        assert cause in said
