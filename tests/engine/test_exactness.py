# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""T = 0, FP32: tree speculation gives the very tokens of the same engine without speculation.

A tiny random model goes through the whole matrix of policies, shapes and conditions, since it
costs little and its drafts are often rejected; `test_demo_exactness.py` asks the demo model.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, free_blocks, generate, runner
from tests.engine.tiny import Shape, make_head

# Fifteen nodes: wide at the top, deep along the first ranks.
STATIC_TREE = [
    *([0], [1], [2], [3]),
    *([0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0]),
    *([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]),
    *([0, 0, 0, 0],),
]

POLICIES: dict[str, tuple[int, dict[str, Any]]] = {
    "chain-1": (1, {"policy": "chain"}),
    "chain-5": (5, {"policy": "chain"}),
    "static-15": (15, {"policy": "static", "tree": STATIC_TREE}),
    "topn-16": (16, {"policy": "topn", "max_depth": 6, "top_k": 4}),
    "topn-64": (64, {"policy": "topn", "max_depth": 8, "top_k": 6}),
    "echo-16": (16, {"policy": "echo", "k_max": 40, "gates": {"1": 0.2, "2": 0.1, "4": 0.05}}),
    # The budget as measured could be none for 16 requests, on a machine that is busy then.
    "echo-64": (
        64,
        {"policy": "echo", "max_depth": 8, "top_k": 6, "gates": {"1": 0.3}, "k_max": 256},
    ),
    # A forward that costs the same whatever its size: everything pays.
    "auto-16": (16, {"policy": "auto", "k_max": 512, "gamma": 0.0}),
    "evict-16": (16, {"policy": "evict", "k_max": 100, "gamma": 0.02}),
    "graft-16": (16, {"policy": "graft", "gates": {"1": 0.4, "2": 0.3, "4": 0.1}}),
}


def tiny_prompts(count: int) -> list[dict[str, list[int]]]:
    """Random token prompts; every fourth starts with the same 40 tokens, for the prefix cache."""
    draw = random.Random(7)
    shared = [draw.randrange(2, 12) for _ in range(40)]
    prompts = []
    for i in range(count):
        own = [draw.randrange(2, 12) for _ in range(draw.randrange(1, 70))]
        prompts.append({"prompt_token_ids": shared + own if i % 4 == 0 else own})
    return prompts


def tiny_engine(tiny: TinyModel, spec: dict[str, Any] | None, **options: Any) -> Any:
    return engine(tiny.target, spec, skip_tokenizer_init=True, **{"max_model_len": 256, **options})


def greedy(num_tokens: int = 128, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **options
    )


def check_forests(llm: Any, num_nodes: int) -> None:
    """Let every real forest of the engine pass through `validate`."""
    drafter = runner(llm).drafter
    select = drafter.policy.select

    def checked(pool: Any, batch: Any) -> Any:
        forest = select(pool, batch)
        forest.validate(max_nodes=num_nodes, max_depth=drafter.policy.max_depth)
        return forest

    drafter.policy.select = checked


@pytest.fixture(scope="module")
def plain_tokens(tiny: TinyModel) -> list[list[int]]:
    """What the tiny target says without speculation."""
    with tiny_engine(tiny, None) as llm:
        return generate(llm, tiny_prompts(100), greedy())


@pytest.mark.full
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_token_identical_at_concurrency_16_and_1(
    name: str, tiny: TinyModel, plain_tokens: list[list[int]]
) -> None:
    num_nodes, section = POLICIES[name]
    prompts = tiny_prompts(100)
    with tiny_engine(tiny, echo(tiny.head, num_nodes, **section)) as llm:
        check_forests(llm, num_nodes)
        before = free_blocks(llm)
        assert generate(llm, prompts, greedy()) == plain_tokens
        found = counters(llm)
        assert generate(llm, prompts[:4], greedy(), one_by_one=True) == plain_tokens[:4]
        assert free_blocks(llm) == before
    drafts, accepted = found["spec_decode_num_drafts"], found["spec_decode_num_accepted_tokens"]
    assert accepted > 0.05 * drafts, "hardly a draft was accepted"
    # Each verified tree yields its accepted tokens and a bonus token; a request's first token
    # and steps without a tree yield one.
    assert drafts + accepted <= 100 * 128


CONDITIONS: dict[str, dict[str, Any]] = {
    "chunked-prefill-of-64": {"max_num_batched_tokens": 64, "max_num_seqs": 16},
    "chunked-prefill-of-24": {"max_num_batched_tokens": 24, "max_num_seqs": 8},
    "forced-preemption": {"num_gpu_blocks_override": 14, "block_size": 32},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "blocks-of-32": {"block_size": 32},
}


@pytest.mark.full
@pytest.mark.parametrize("condition", CONDITIONS)
def test_topn_is_token_identical_under_server_conditions(
    condition: str, tiny: TinyModel, plain_tokens: list[list[int]]
) -> None:
    prompts = tiny_prompts(100)[:32]
    with tiny_engine(
        tiny, echo(tiny.head, 16, max_depth=6, top_k=4), **CONDITIONS[condition]
    ) as llm:
        check_forests(llm, 16)
        before = free_blocks(llm)
        assert generate(llm, prompts, greedy()) == plain_tokens[:32]
        assert free_blocks(llm) == before
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    if condition == "forced-preemption":
        assert preemptions[0] > 10, "the condition did not preempt"


@pytest.mark.full
def test_a_prefix_hit_behind_an_accepted_path_is_right(
    tiny: TinyModel, plain_tokens: list[list[int]]
) -> None:
    """Blocks filled by accepted paths are found again and hold the right keys and values: what
    follows an answer that is part of the prompt is what followed it."""
    first = tiny_prompts(8)
    answers = [tokens[:100] for tokens in plain_tokens[:8]]
    wanted = [tokens[100:] for tokens in plain_tokens[:8]]
    longer = [
        {"prompt_token_ids": p["prompt_token_ids"] + a} for p, a in zip(first, answers, strict=True)
    ]
    with tiny_engine(tiny, echo(tiny.head, 16), block_size=32) as llm:
        assert generate(llm, first, greedy(100)) == answers
        outputs = llm.generate(longer, greedy(28), use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in outputs] == wanted
        # Every whole block that was computed before came from the cache, as without speculation.
        lengths = [len(p["prompt_token_ids"]) for p in first]
        assert [o.num_cached_tokens for o in outputs] == [(n + 99) // 32 * 32 for n in lengths]


@pytest.mark.full
def test_the_last_positions_before_max_model_len_are_exact(tiny: TinyModel) -> None:
    prompts = [{"prompt_token_ids": [2 + i % 9] * (40 + 3 * i)} for i in range(16)]
    params = greedy(10_000)
    with tiny_engine(tiny, None, max_model_len=128) as llm:
        wanted = generate(llm, prompts, params)
    with tiny_engine(tiny, echo(tiny.head, 16), max_model_len=128) as llm:
        assert generate(llm, prompts, params) == wanted
    assert [len(tokens) for tokens in wanted] == [128 - 40 - 3 * i for i in range(16)]


# Heads that stock vLLM loads, each unlike the default one in a way that the runtime could miss.
HEADS: dict[str, dict[str, Any]] = {
    "reduced-vocabulary": {"draft_vocab": 7},
    "other-kv-shape": {"shape": Shape(heads=4, kv_heads=1, head_dim=64)},
    "narrower-than-target": {"shape": Shape(hidden=48, mlp=64), "target_hidden": 64},
    "last-layer-only": {"aux": False},
    "norms": {"norm_before_residual": True, "norm_output": True},
    "two-layers": {"layers": 2},
}


@pytest.mark.full
@pytest.mark.parametrize("kind", HEADS)
def test_any_head_that_stock_vllm_loads_is_exact(
    kind: str, tiny: TinyModel, plain_tokens: list[list[int]], tmp_path: Path
) -> None:
    options = {"shape": tiny.shape, "seed": 5, **HEADS[kind]}
    head = make_head(tmp_path / "head", **options)
    stock = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    with tiny_engine(tiny, stock) as llm:
        generate(llm, tiny_prompts(4), greedy(16))
        assert counters(llm)["spec_decode_num_drafts"] > 0
    with tiny_engine(tiny, echo(head, 12, max_depth=4, top_k=3)) as llm:
        check_forests(llm, 12)
        assert generate(llm, tiny_prompts(32), greedy(64)) == [t[:64] for t in plain_tokens[:32]]
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 50


@pytest.mark.full
def test_our_chain_drafts_the_tokens_of_stock_eagle3(tiny: TinyModel) -> None:
    """Same drafter, same drafts: acceptance counts must agree with vLLM's own chain."""
    prompts = tiny_prompts(40)
    stock = {"method": "eagle3", "model": str(tiny.head), "num_speculative_tokens": 4}
    with tiny_engine(tiny, stock) as llm:
        wanted_tokens, wanted = generate(llm, prompts, greedy()), counters(llm)
    with tiny_engine(tiny, echo(tiny.head, 4, policy="chain")) as llm:
        tokens, found = generate(llm, prompts, greedy()), counters(llm)
    assert tokens == wanted_tokens
    # A request's last step differs: vLLM drafts, and counts, tokens that can no longer be emitted.
    for name in ("spec_decode_num_accepted_tokens", "spec_decode_num_drafts"):
        assert found[name] == pytest.approx(wanted[name], abs=len(prompts)), name
