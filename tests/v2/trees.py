# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees on Model Runner V2: the very tokens of the same runner without speculation.

Synchronous and asynchronous, in float32, on the tests' tiny model. What only trees that share a
budget have is in `budget.py`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from echo_vllm import ops
from echo_vllm.policies import policy_class
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, free_blocks, generate, runner
from tests.engine.test_exactness import POLICIES, greedy, tiny_prompts
from tests.engine.tiny import make_head
from tests.v2.emulated_graph import HOST_READS
from tests.v2.stock import PROMPTS, TOKENS, scheduler, v2_engine

UNSEEN = ("chain-5", "static-15", "topn-64", "echo-16", "graft-16")
MANY = tiny_prompts(14)

both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def trees(tiny: TinyModel, name: str = "topn-16") -> dict[str, Any]:
    num_nodes, section = POLICIES[name]
    return echo(tiny.head, num_nodes, **section)


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> list[list[int]]:
    with v2_engine(tiny, None) as llm:
        return generate(llm, PROMPTS, greedy(TOKENS))


@pytest.fixture(scope="module")
def plain_many(tiny: TinyModel) -> list[list[int]]:
    with v2_engine(tiny, None) as llm:
        return generate(llm, MANY, greedy(TOKENS))


@both
def test_topn_is_exact(tiny: TinyModel, plain: list[list[int]], is_async: bool) -> None:
    from echo_vllm.step.v2.runner import EchoRunnerV2Mixin

    with v2_engine(tiny, trees(tiny), async_scheduling=is_async) as llm:
        assert isinstance(runner(llm), EchoRunnerV2Mixin)
        assert type(scheduler(llm)).__name__ == f"Echo{'Async' if is_async else ''}SchedulerV2"
        free = free_blocks(llm)
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        assert free_blocks(llm) == free
        count = counters(llm)
        assert count["spec_decode_num_accepted_tokens"] > 20
        assert count["spec_decode_num_draft_tokens"] == 16 * count["spec_decode_num_drafts"]


@both
@pytest.mark.full
@pytest.mark.parametrize("name", UNSEEN)
def test_every_policy_is_exact(
    tiny: TinyModel, plain: list[list[int]], name: str, is_async: bool
) -> None:
    with v2_engine(tiny, trees(tiny, name), async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5


@pytest.mark.full
@pytest.mark.parametrize("name", ["chain-5", "static-15", "topn-16"])
def test_trees_are_those_of_v1(tiny: TinyModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much is accepted, so the drafter sees what it sees there; but for the last steps of each
    request, in which V1 drafts no deeper than the request may still emit."""
    drafts, accepted = [], []
    for v2 in ("1", "0"):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", v2)
        with engine(
            tiny.target, trees(tiny, name), skip_tokenizer_init=True, max_model_len=256
        ) as llm:
            generate(llm, PROMPTS, greedy(3 * TOKENS), one_by_one=True)
            count = counters(llm)
            drafts.append(count["spec_decode_num_drafts"])
            accepted.append(count["spec_decode_num_accepted_tokens"])
    assert abs(drafts[0] - drafts[1]) <= len(PROMPTS)
    assert abs(accepted[0] - accepted[1]) <= len(PROMPTS)
    assert accepted[1] > 5 * len(PROMPTS)


CONDITIONS: dict[str, dict[str, Any]] = {
    "slots are used again": {},
    "prompts come in chunks": {"max_num_batched_tokens": 40, "long_prefill_token_threshold": 12},
    "requests are preempted": {"num_gpu_blocks_override": 9, "block_size": 32},
    "the prefix is cached": {"enable_prefix_caching": True, "block_size": 32},
}


@pytest.mark.full
@pytest.mark.parametrize(("name", "is_async"), [("topn-16", False), ("echo-16", True)])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_trees_stay_exact_where(
    tiny: TinyModel, plain_many: list[list[int]], condition: str, name: str, is_async: bool
) -> None:
    options = CONDITIONS[condition]
    with v2_engine(tiny, trees(tiny, name), async_scheduling=is_async, **options) as llm:
        assert generate(llm, MANY, greedy(TOKENS)) == plain_many
        if condition == "the prefix is cached":
            assert generate(llm, MANY, greedy(TOKENS)) == plain_many
            assert metric(llm, "vllm:prefix_cache_hits") > 0
        if condition == "requests are preempted":
            assert metric(llm, "vllm:num_preemptions") > 0
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 20


def metric(llm: Any, name: str) -> float:
    value: float = next(m.value for m in llm.get_metrics() if m.name == name)
    return value


@pytest.mark.full
@pytest.mark.parametrize(("name", "is_async"), [("topn-16", False), ("echo-16", True)])
def test_requests_run_to_the_very_end_of_the_context(
    tiny: TinyModel, name: str, is_async: bool
) -> None:
    prompts = [prompt for prompt in MANY if len(prompt["prompt_token_ids"]) < 60]
    with v2_engine(tiny, None, max_model_len=96) as llm:
        plain = generate(llm, prompts, greedy(1000))
    with v2_engine(tiny, trees(tiny, name), max_model_len=96, async_scheduling=is_async) as llm:
        assert generate(llm, prompts, greedy(1000)) == plain
    assert {len(p["prompt_token_ids"]) + len(t) for p, t in zip(prompts, plain, strict=True)} == {
        96
    }


@both
@pytest.mark.full
def test_other_requests_do_not_notice_an_abort(
    tiny: TinyModel, plain: list[list[int]], is_async: bool
) -> None:
    with v2_engine(tiny, trees(tiny), async_scheduling=is_async) as llm:
        core, free = llm.llm_engine, free_blocks(llm)
        for i, prompt in enumerate(PROMPTS):
            core.add_request(str(i), prompt, greedy(TOKENS))
        finished: dict[str, list[int]] = {}
        for step in range(400):
            for output in core.step():
                if output.finished:
                    finished[output.request_id] = list(output.outputs[0].token_ids)
            if step == 4:
                core.abort_request(["1"])
            if step == 7:
                core.abort_request(["4"])
            if not core.has_unfinished_requests():
                break
        assert finished.keys() == {"0", "2", "3", "5"}
        assert all(finished[name] == plain[int(name)] for name in finished)
        assert free_blocks(llm) == free


def sampling(**options: Any) -> Any:
    from vllm import SamplingParams

    usual = {"temperature": 1.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**usual, **options})


@both
@pytest.mark.full
def test_seeds_give_what_plain_decoding_gives(tiny: TinyModel, is_async: bool) -> None:
    """Whatever edits a row by its position or its request alone, in one batch with greedy ones."""
    params = [
        sampling(seed=1),
        sampling(seed=2, temperature=0.6, top_p=0.9),
        greedy(TOKENS),
        sampling(seed=3, top_k=4),
        sampling(seed=4, min_p=0.1),
        sampling(seed=5, logit_bias={3: 1.5, 7: -2.0}, temperature=1.5),
    ]
    with v2_engine(tiny, None) as llm:
        plain = generate(llm, PROMPTS, params)
    for name in ("topn-16", "echo-16"):
        with v2_engine(tiny, trees(tiny, name), async_scheduling=is_async) as llm:
            assert generate(llm, PROMPTS, params) == plain
            assert counters(llm)["spec_decode_num_accepted_tokens"] > 10


def looking_back() -> list[Any]:
    """Sampling that depends on what stands before a row, greedy and with seeds."""
    params = [
        greedy(TOKENS),
        greedy(TOKENS, repetition_penalty=1.3),
        sampling(seed=6, frequency_penalty=0.4, logprobs=0),
        greedy(TOKENS, logprobs=2, presence_penalty=1.0, frequency_penalty=0.5),
        greedy(TOKENS),
        sampling(seed=7, presence_penalty=0.5, top_k=6),
        greedy(1),
        greedy(TOKENS, logprobs=3),
    ]
    for each in params[4:6]:  # Which vLLM makes of text.
        each._bad_words_token_ids = [[3, 5], [4, 4], [7, 2, 9], [8]]
    return params


def said(llm: Any) -> tuple[list[Any], list[float]]:
    """Tokens, and the ranks of all that have a log-probability; and these."""
    outputs = llm.generate(MANY[:8], looking_back(), use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    places = [place for each in completions for place in each.logprobs or ()]
    assert len(places) == 3 * TOKENS
    tokens = [list(each.token_ids) for each in completions]
    ranks = [[(value.rank, token) for token, value in place.items()] for place in places]
    return [tokens, ranks], [value.logprob for place in places for value in place.values()]


@pytest.fixture(scope="module")
def plain_said(tiny: TinyModel) -> tuple[list[Any], list[float]]:
    with v2_engine(tiny, None) as llm:
        return said(llm)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "is_async"), [("topn-16", False), ("echo-16", True), ("chain-5", True)]
)
def test_what_depends_on_the_path_follows_it(
    tiny: TinyModel, plain_said: tuple[list[Any], list[float]], name: str, is_async: bool
) -> None:
    """In one batch, in which each request has a tree but the one that says a single token."""
    with v2_engine(tiny, trees(tiny, name), async_scheduling=is_async) as llm:
        found, logprobs = said(llm)
        count = counters(llm)
    assert found == plain_said[0]
    assert logprobs == pytest.approx(plain_said[1], abs=1e-4)
    # More than two requests could have, and accepted.
    assert count["spec_decode_num_drafts"] > 3 * TOKENS
    assert count["spec_decode_num_accepted_tokens"] > 10


@pytest.mark.full
def test_nothing_is_drafted_for_who_has_no_tree(
    tiny: TinyModel, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests say one token, so that only three are ever drafted for, in one batch."""
    from echo_vllm.step.v2.drafter import TreeSpeculator

    drafted: list[tuple[int, int]] = []
    grow = TreeSpeculator._grow

    def watched(drafter: TreeSpeculator, roots: Any, batch: Any) -> Any:
        drafted.append((batch.num_requests, batch.num_decoding))
        pool, level_rows = grow(drafter, roots, batch)
        assert all(rows <= 4 * batch.num_requests for rows in level_rows)
        return pool, level_rows

    monkeypatch.setattr(TreeSpeculator, "_grow", watched)
    lengths = [1, TOKENS, 1, TOKENS, 1, TOKENS]
    with v2_engine(tiny, trees(tiny)) as llm:
        found = generate(llm, PROMPTS, [greedy(length) for length in lengths])
        assert found == [tokens[:n] for tokens, n in zip(plain, lengths, strict=True)]
        num_drafts = counters(llm)["spec_decode_num_drafts"]
        assert 0 < num_drafts <= 3 * TOKENS
        assert any(count < batch for count, batch in drafted)
        assert sum(count for count, _ in drafted) <= num_drafts + 3 * 2
        drafted.clear()
        generate(llm, PROMPTS, greedy(1))
        assert drafted == []


@pytest.mark.full
def test_a_head_with_a_vocabulary_of_its_own_is_exact(
    tiny: TinyModel, plain: list[list[int]], tmp_path: Any
) -> None:
    head = make_head(tmp_path / "head", tiny.shape, draft_vocab=8)
    spec = echo(head, 12, policy="topn", max_depth=4, top_k=4)
    with v2_engine(tiny, spec, async_scheduling=True) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func._schema.name not in HOST_READS, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["topn-16", "echo-16", "auto-16", "graft-16"])
def test_the_host_waits_for_nothing(
    tiny: TinyModel, plain: list[list[int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all that this package adds to a step of V2."""
    from echo_vllm.forecast import CostCurve, StepCost
    from echo_vllm.step.v2 import runner as module
    from echo_vllm.step.v2.budget import TreeBudget
    from echo_vllm.step.v2.drafter import TreeSpeculator
    from echo_vllm.step.v2.state import TreeSlots

    calls = []

    def watched(owner: Any, name: str) -> None:
        stock = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            with ExitStack() as stack:
                stack.enter_context(NoHostReads())  # type: ignore[no-untyped-call]
                return stock(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watched(module, "scheduled_trees")
    watched(ops, "accept_path")
    watched(module.EchoRunnerV2Mixin, "commit")
    watched(TreeSpeculator, "_grow")
    watched(TreeSlots, "write")
    watched(TreeBudget, "reallocate_drafts")
    spec = trees(tiny, name)
    policy = policy_class(spec["echo"]["policy"])
    for of_policy in ("ranked", "notes_of_verified", "notes_of_drafted", "observe_logits"):
        watched(policy, of_policy)
    free = CostCurve((1.0,), (1e-6,))
    monkeypatch.setattr(
        "echo_vllm.step.v2.worker.measured_cost", lambda *_: StepCost(free, free, free)
    )
    if name == "auto-16":
        spec["echo"]["online"] = False
    with v2_engine(tiny, spec, async_scheduling=True) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
    assert set(calls) == {
        *("scheduled_trees", "accept_path", "commit", "_grow", "write"),
        *("ranked", "notes_of_verified", "notes_of_drafted"),
        *(() if name == "topn-16" else ("reallocate_drafts",)),
        *(("observe_logits",) if name == "graft-16" else ()),
    }


def test_what_does_not_run_there_is_one_sentence(tiny: TinyModel) -> None:
    sentence = r"VLLM_USE_V2_MODEL_RUNNER=1\) and --kv-cache-dtype fp8.*; unset"
    with (
        pytest.raises(ValueError, match=sentence),
        v2_engine(tiny, echo(tiny.head, 8, policy="topn"), kv_cache_dtype="fp8"),
    ):
        pass


def test_the_tree_of_columns_has_its_parents_first() -> None:
    from echo_vllm.trees.pool import CandidatePool

    pool = CandidatePool(
        token_ids=torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]),
        parents=torch.tensor([[-1, -1, 1, 0], [-1, -1, 0, 0]]),
        path_logprobs=torch.tensor([[-2.0, -1, -1.5, -3], [-1.0, -9, -2, -3]]),
        level_starts=[0, 2],
        active=torch.arange(2),
    )
    tokens, parents = pool.tree_of(pool.best_first()[:, :3])
    assert tokens.tolist() == [[6, 7, 5], [1, 3, 4]]
    assert parents.tolist() == [[-1, 0, -1], [-1, 0, 0]]
