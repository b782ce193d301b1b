# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drawn candidates in the real engine: what it samples has the target's distribution.

As in `test_distribution`, by chi-square against the enumerated distribution of the first tokens of
a random model, with bugs planted that the same test must catch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine import test_distribution
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, generate, runner
from tests.engine.test_distribution import (
    LEAST_P,
    NUM_TOKENS,
    Setting,
    check_each,
    enumerated_logits,
    p_value,
    sample,
)

pytestmark = pytest.mark.full

tiny = test_distribution.tiny
target_logits = test_distribution.target_logits

SETTINGS = {
    "cool": Setting({"temperature": 0.6}),
    "plain": Setting(),
    "hot": Setting({"temperature": 1.5}),
    "top-k": Setting({"top_k": 3}),
    "top-p": Setting({"top_p": 0.7}),
    "min-p": Setting({"min_p": 0.15}),
    # These are judged level by level: what they sample from depends on the path, or is reported.
    "penalties": Setting({"presence_penalty": 0.8, "repetition_penalty": 1.4, "top_p": 0.9}),
    "biased": Setting({"logit_bias": {1: 1.5}, "allowed_token_ids": [0, 1, 2, 4], "min_p": 0.05}),
    "reported": Setting({"logprobs": 2}),
}
GREEDY = Setting({"temperature": 0.0})

EACH = 1000
"""Samples of a setting and a shape: 45 000 in all."""

WIDE = [[0], [1], [2], [3], [0, 0], [1, 0], [0, 1]]

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "chain": (3, {"policy": "chain"}),
    "wide": (len(WIDE), {"policy": "static", "tree": WIDE}),
    "deep": (8, {"policy": "topn", "max_depth": 4, "top_k": 2}),
    # A budget that is short, and gates that fire.
    "gated": (6, {"policy": "echo", "top_k": 2, "width": 3, "k_max": 800, "gates": {"1": 0.3}}),
}


def drawn_engine(tiny: TinyModel, num_nodes: int, section: dict[str, Any], **options: Any) -> Any:
    return engine(
        tiny.target,
        echo(tiny.head, num_nodes, candidates="drawn", **section),
        **{"skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 256, **options},
    )


def greedy_tokens(target_logits: Any) -> tuple[int, ...]:
    output: tuple[int, ...] = ()
    while len(output) < NUM_TOKENS:
        output += (int(target_logits(output).argmax()),)
    return output


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_batch_has_the_targets_distribution(
    shape: str, tiny: TinyModel, target_logits: Any
) -> None:
    with drawn_engine(tiny, *SHAPES[shape]) as llm:
        sampled = sample(llm, [*SETTINGS.values(), GREEDY], EACH)
        found = counters(llm)
    assert found["spec_decode_num_accepted_tokens"] > 0.2 * EACH * len(SETTINGS), "nothing at stake"
    assert set(sampled.pop()) == {greedy_tokens(target_logits)}
    check_each(sampled, SETTINGS, target_logits, tiny.shape.vocab)


def test_auto_has_the_targets_distribution(
    free_drafting: None, tiny: TinyModel, target_logits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth and size of each tree by what a slot must be worth; greedy requests in the batch."""
    section = {"policy": "auto", "max_depth": 3, "top_k": 2, "width": 3, "k_max": 900}
    with drawn_engine(tiny, 8, {**section, "gamma": 0.002}) as llm:
        model_runner = runner(llm)
        put, sizes = model_runner.drawn.put, []

        def watch(slots: Any, pool: Any, forest: Any) -> None:
            sizes.append(forest.cu_nodes.diff())
            put(slots, pool, forest)

        monkeypatch.setattr(model_runner.drawn, "put", watch)
        sampled = sample(llm, [*SETTINGS.values(), GREEDY], EACH)
        found = counters(llm)
    nodes = torch.cat(sizes)
    accepted = found["spec_decode_num_accepted_tokens"]
    assert accepted > 0.05 * EACH * len(SETTINGS), "nothing at stake"
    assert len(set(nodes.tolist())) > 4, "trees are of one size"
    assert set(sampled.pop()) == {greedy_tokens(target_logits)}
    check_each(sampled, SETTINGS, target_logits, tiny.shape.vocab)


def plant_a_residual_that_is_not_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child is held against p itself, and the last token comes from p."""
    from echo_vllm import ops
    from echo_vllm.ops import reference

    def stale(
        p: torch.Tensor, q: torch.Tensor, children: list[int]
    ) -> tuple[list[float], torch.Tensor]:
        left, chances = 1.0, []
        for token in children:
            chances.append(min(1.0, float(p[token]) * left / max(1e-9, float(q[token]))))
            left -= float(q[token])
        return chances, p

    monkeypatch.setattr(reference, "rejection", stale)
    monkeypatch.setattr(ops, "sample_path", reference.sample_path)


def plant_a_q_of_another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification believes that the drafter was surer than it was."""
    from echo_vllm.trees.drawn import DrawnPool

    draft_probs = DrawnPool.draft_probs

    def sharper(pool: DrawnPool, rows: torch.Tensor) -> torch.Tensor:
        probs = draft_probs(pool, rows) ** 2
        return probs / probs.sum(1, keepdim=True)

    monkeypatch.setattr(DrawnPool, "draft_probs", sharper)


def plant_a_node_dropped_by_its_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn tokens that will hardly be accepted are left out."""
    from echo_vllm.trees.drawn import NO_SLOT, DrawnPool

    take = DrawnPool.take

    def choosy(pool: DrawnPool, *args: Any) -> Any:
        pool._worths = pool._worths.where(pool._reaches > 0.25, NO_SLOT)
        return take(pool, *args)

    monkeypatch.setattr(DrawnPool, "take", choosy)


def plant_a_slot_that_depends_on_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a node has children is settled when they are known."""
    from echo_vllm.trees.drawn import DrawnPool

    fill = DrawnPool.fill

    def late(
        pool: DrawnPool, level: Any, widths: torch.Tensor, draws: Any, ids: Any, reaches: Any
    ) -> None:
        unwanted = (ids[:, 0] % 2 == 0).view(widths.shape)
        fill(pool, level, widths.masked_fill(unwanted, 0), draws, ids, reaches)

    monkeypatch.setattr(DrawnPool, "fill", late)


def test_planted_bugs_are_caught(tiny: TinyModel, target_logits: Any) -> None:
    """In a walk over all rows, and in one level by level."""
    section: dict[str, Any] = {"policy": "topn", "max_depth": 2, "top_k": 3}
    plants: list[Callable[[pytest.MonkeyPatch], None]] = [
        lambda monkeypatch: None,
        plant_a_residual_that_is_not_updated,
        plant_a_q_of_another_temperature,
        plant_a_node_dropped_by_its_own_score,
        plant_a_slot_that_depends_on_its_child,
    ]
    settings = [SETTINGS["plain"], SETTINGS["penalties"]]
    values = []
    with drawn_engine(tiny, 6, section) as llm:
        for plant in plants:
            with pytest.MonkeyPatch.context() as monkeypatch:
                plant(monkeypatch)
                sampled = sample(llm, settings, 3000)
            vocab = tiny.shape.vocab
            values.append(
                [
                    p_value(samples, setting, target_logits, vocab)
                    for samples, setting in zip(sampled, settings, strict=True)
                ]
            )
    sound, *planted = values
    assert all(value > LEAST_P / 2 for value in sound), values
    # A node that is dropped by its score shows little where penalties have flattened the target.
    plain, penalised = zip(*planted, strict=True)
    assert all(value < LEAST_P for value in plain), values
    assert all(penalised[i] < LEAST_P for i in (0, 1, 3)), values


def test_log_probabilities_are_those_of_the_target(tiny: TinyModel, target_logits: Any) -> None:
    """Of every token of the accepted path, of the target's logits as they are."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=1.3, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=1
    )
    prompt = {"prompt_token_ids": test_distribution.PROMPT}
    with drawn_engine(tiny, *SHAPES["wide"]) as llm:
        outputs = llm.generate([prompt] * 60, [params] * 60, use_tqdm=False)
        accepted = counters(llm)["spec_decode_num_accepted_tokens"]
    assert accepted > 10, "nothing was at stake"
    for output in outputs:
        answer = output.outputs[0]
        for i, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            wanted = target_logits(tuple(answer.token_ids[:i])).log_softmax(0)[token]
            assert found[token].logprob == pytest.approx(float(wanted), abs=1e-4)


def test_a_seed_gives_the_same_answer_again(tiny: TinyModel) -> None:
    """Alone, whatever ran before; and other seeds give other answers."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": test_distribution.PROMPT}
    params = [
        SamplingParams(temperature=1.0, seed=s, max_tokens=24, ignore_eos=True, detokenize=False)
        for s in range(6)
    ]
    with drawn_engine(tiny, *SHAPES["deep"]) as llm:
        first = generate(llm, [prompt] * 6, params, one_by_one=True)
        again = generate(llm, [prompt] * 6, params[::-1], one_by_one=True)
    assert first == again[::-1]
    assert len(set(map(tuple, first))) == 6


LONG_PROMPT = [3, 5, 2, 4, 5, 2] * 4 + [3, 5, 2]


@pytest.mark.parametrize("concurrency", [1, 16])
def test_chunked_prompts_preemption_and_one_request_alone(
    concurrency: int, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_distribution, "PROMPT", LONG_PROMPT)
    known = enumerated_logits(tiny, LONG_PROMPT)
    options: dict[str, Any] = {
        "max_num_seqs": concurrency,
        # Three and a half prompts, and blocks for four requests that decode.
        "max_num_batched_tokens": 96,
        "block_size": 32,
        "num_gpu_blocks_override": 10,
        "enable_prefix_caching": False,
    }
    each = 750 if concurrency == 1 else 2000
    with drawn_engine(tiny, *SHAPES["deep"], **options) as llm:
        sampled = sample(llm, [SETTINGS["plain"], SETTINGS["top-k"]], each)
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    if concurrency > 1:
        assert preemptions[0] > 10, "the condition did not preempt"
    for samples, name in zip(sampled, ("plain", "top-k"), strict=True):
        value = p_value(samples, SETTINGS[name], known, tiny.shape.vocab)
        assert value > LEAST_P / 2, name


def test_draws_of_a_row_are_all_different(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forest of the engine keeps the invariants; a draw with replacement would not."""
    from echo_vllm import ops
    from echo_vllm.trees import draws

    def replacing(probs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        through = probs.cumsum(1, dtype=torch.float64)
        return torch.searchsorted(through, numbers * through[:, -1:]).clamp(max=probs.shape[1] - 1)

    with drawn_engine(tiny, *SHAPES["wide"]) as llm:
        model_runner = runner(llm)
        put, found = model_runner.drawn.put, []

        def check(slots: Any, pool: Any, forest: Any) -> None:
            try:
                forest.validate(max_nodes=len(WIDE), max_depth=2)
            except ValueError as error:
                found.append(str(error))
            put(slots, pool, forest)

        monkeypatch.setattr(model_runner.drawn, "put", check)
        sample(llm, [SETTINGS["plain"]], 200)
        assert not found
        monkeypatch.setattr(ops, "has_extension", lambda op: False)
        monkeypatch.setattr(draws, "_draw", replacing)
        sample(llm, [SETTINGS["plain"]], 200)
    assert found
    assert all("stands twice under one parent" in message for message in found)
