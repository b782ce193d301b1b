# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The real engine on a GPU: the exactness suite of tests/engine, with its tiny random models.

FP32 is token-identical to the same engine without speculation, and its samples have the target's
distribution; in FP16 and BF16 a first difference must be a near-tie. Nothing is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Triton's float32 products are TF32 unless told otherwise, and a thousand times less exact.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import pytest

pytest.importorskip("vllm", reason="vLLM is not importable here")

from tests.engine import test_exactness as exactness
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, free_blocks, generate, runner
from tests.engine.test_exactness import CONDITIONS, POLICIES, greedy, tiny_prompts
from tests.engine.tiny import Shape, make_head, make_target

pytestmark = pytest.mark.gpu

PROMPTS, TOKENS = 32, 64
MEMORY = {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.3}
NEAR_TIE = 0.25
"""Nats between two tokens that half precision may swap in a random model."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder, shape = tmp_path_factory.mktemp("tiny"), Shape(head_dim=64)
    return TinyModel(
        make_target(folder / "target", shape), make_head(folder / "head", shape), shape
    )


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of the shared helpers take a part of the GPU."""

    def small(model: Path, spec: dict[str, Any] | None = None, **options: Any) -> Any:
        return engine(model, spec, **{**MEMORY, **options})

    monkeypatch.setattr(exactness, "engine", small)


def gpu_engine(tiny: TinyModel, spec: dict[str, Any] | None, **options: Any) -> Any:
    return exactness.tiny_engine(tiny, spec, **{**MEMORY, **options})


def differing(found: list[list[int]], wanted: list[list[int]]) -> list[str]:
    """Where answers differ first. pytest would compare the lists by difflib, for minutes."""
    places = []
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
            places.append(f"answer {number}, token {at}")
    return places


@pytest.fixture(scope="module")
def plain_tokens(tiny: TinyModel) -> list[list[int]]:
    with gpu_engine(tiny, None) as llm:
        return generate(llm, tiny_prompts(PROMPTS), greedy(TOKENS))


def test_the_engine_is_the_one_of_a_gpu(tiny: TinyModel) -> None:
    """Worker, runner, backend of both models, device of the step, CUDA kernels."""
    import torch

    from echo_vllm.ops.dispatch import choose
    from echo_vllm.step.v1.cuda import EchoGPUModelRunner, EchoWorker

    for dtype, impl in (("float32", "Triton"), ("bfloat16", "Flash")):
        with gpu_engine(tiny, echo(tiny.head, 8), dtype=dtype) as llm:
            core = llm.llm_engine.engine_core.engine_core
            assert type(core.model_executor.driver_worker.worker) is EchoWorker
            assert type(runner(llm)) is EchoGPUModelRunner
            layers = runner(llm).compilation_config.static_forward_context.values()
            assert {type(x.impl).__name__ for x in layers} == {f"Echo{impl}AttentionImpl"}
            policy = runner(llm).drafter.policy
            devices: set[str] = set()

            def select(pool: Any, batch: Any, policy: Any = policy, seen: Any = devices) -> Any:
                seen.add(pool.device.type)
                return type(policy).select(policy, pool, batch)

            policy.select = select
            generate(llm, tiny_prompts(4), greedy(8))
            assert devices == {"cuda"}
    assert torch.cuda.is_available()
    for op in ("tree_attention", "commit_kv", "build_super_tree", "accept_path", "select_budget"):
        assert choose(op, "cuda").name in ("extension", "triton"), op


@pytest.mark.parametrize(
    "name",
    ["chain-5", "static-15", "topn-16", "topn-64", "echo-16", "auto-16", "evict-16", "graft-16"],
)
def test_every_policy_is_token_identical_at_concurrency_16_and_1(
    name: str, tiny: TinyModel, plain_tokens: list[list[int]]
) -> None:
    num_nodes, section = POLICIES[name]
    prompts = tiny_prompts(PROMPTS)
    with gpu_engine(tiny, echo(tiny.head, num_nodes, **section)) as llm:
        exactness.check_forests(llm, num_nodes)
        before = free_blocks(llm)
        assert not differing(generate(llm, prompts, greedy(TOKENS)), plain_tokens)
        assert not differing(
            generate(llm, prompts[:4], greedy(TOKENS), one_by_one=True), plain_tokens[:4]
        )
        assert free_blocks(llm) == before
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 50


@pytest.mark.parametrize(
    "condition", ["chunked-prefill-of-24", "forced-preemption", "no-prefix-cache"]
)
def test_topn_is_token_identical_under_server_conditions(
    condition: str, tiny: TinyModel, plain_tokens: list[list[int]]
) -> None:
    spec = echo(tiny.head, 16, max_depth=6, top_k=4)
    with gpu_engine(tiny, spec, **CONDITIONS[condition]) as llm:
        assert not differing(generate(llm, tiny_prompts(PROMPTS), greedy(TOKENS)), plain_tokens)
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    if condition == "forced-preemption":
        assert preemptions[0] > 0, "the condition did not preempt"


def test_a_prefix_hit_behind_an_accepted_path_is_right(tiny: TinyModel) -> None:
    with gpu_engine(tiny, None) as llm:
        answers = generate(llm, tiny_prompts(8), greedy(128))
    exactness.test_a_prefix_hit_behind_an_accepted_path_is_right(tiny, answers)


def test_the_last_positions_before_max_model_len_are_exact(tiny: TinyModel) -> None:
    exactness.test_the_last_positions_before_max_model_len_are_exact(tiny)


def test_seeded_samples_are_those_without_speculation(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    # The other model runner draws other numbers from the same seed.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")

    params = [
        SamplingParams(
            temperature=1.0, seed=i, max_tokens=TOKENS, ignore_eos=True, detokenize=False
        )
        for i in range(PROMPTS)
    ]
    with gpu_engine(tiny, None) as llm:
        wanted = generate(llm, tiny_prompts(PROMPTS), params)
    with gpu_engine(tiny, echo(tiny.head, 16)) as llm:
        assert not differing(generate(llm, tiny_prompts(PROMPTS), params), wanted)


def test_samples_have_the_targets_distribution(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that sample all rows at once, and settings that walk."""
    pytest.importorskip("scipy", reason="the chi-square test needs scipy")
    from tests.engine import test_distribution as distribution

    monkeypatch.setattr(
        distribution, "engine", lambda *a, **options: engine(*a, **{**MEMORY, **options})
    )
    shape = Shape(vocab=6, head_dim=64)
    folder = tmp_path_factory.mktemp("six")
    six = TinyModel(make_target(folder / "target", shape), make_head(folder / "head", shape), shape)
    logits = distribution.target_logits.__wrapped__(six)  # type: ignore[attr-defined]
    with distribution.tree_engine(six) as llm:
        for names in (["plain", "hot", "top-k", "top-p"], ["penalties", "min-p"]):
            settings = [distribution.SETTINGS[name] for name in names]
            sampled = distribution.sample(llm, settings, 4000)
            for name, samples, setting in zip(names, sampled, settings, strict=True):
                value = distribution.p_value(samples, setting, logits, shape.vocab)
                assert value > distribution.LEAST_P / 6, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_a_first_difference_is_a_near_tie(dtype: str, tiny: TinyModel) -> None:
    prompts = tiny_prompts(PROMPTS)
    with gpu_engine(tiny, None, dtype=dtype) as llm:
        outputs = llm.generate(prompts, greedy(TOKENS, logprobs=12), use_tqdm=False)
    with gpu_engine(tiny, echo(tiny.head, 16), dtype=dtype) as llm:
        found = generate(llm, prompts, greedy(TOKENS))
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 50
    assert_near_ties(outputs, found)


def assert_near_ties(outputs: list[Any], found: list[list[int]]) -> None:
    """Of each answer in `found` the first token that differs from `outputs`, which have
    log-probabilities, is about as likely."""
    identical = 0
    for output, tokens in zip(outputs, found, strict=True):
        plain = output.outputs[0]
        differ = [i for i, (a, b) in enumerate(zip(plain.token_ids, tokens, strict=True)) if a != b]
        if not differ:
            identical += 1
            continue
        at = differ[0]
        seen = plain.logprobs[at]
        gap = seen[plain.token_ids[at]].logprob - seen[tokens[at]].logprob
        assert gap < NEAR_TIE, f"{gap:.3f} nats at token {at}"
    assert identical > 0


def test_piecewise_graphs_give_the_tokens_of_eager_mode(
    tiny: TinyModel, plain_tokens: list[list[int]]
) -> None:
    from vllm.config import CUDAGraphMode

    with gpu_engine(tiny, echo(tiny.head, 16), enforce_eager=False) as llm:
        mode = runner(llm).compilation_config.cudagraph_mode
        assert mode == CUDAGraphMode.PIECEWISE
        assert not differing(generate(llm, tiny_prompts(PROMPTS), greedy(TOKENS)), plain_tokens)
