# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees on Model Runner V2 on a GPU, in full CUDA graphs: the very tokens of plain V2, in float32.

    VLLM_USE_V2_MODEL_RUNNER=1 pytest tests/gpu/test_engine_v2.py

The tiny random models of tests/engine; nothing is downloaded. With `python -m tests.v2.on_cpu -m
pytest ...` the same runs on a CPU, eagerly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Triton's float32 products are TF32 unless told otherwise, and a thousand times less exact.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import pytest

pytest.importorskip("vllm", reason="vLLM is not importable here")
if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
    pytest.skip("VLLM_USE_V2_MODEL_RUNNER=1 is not set", allow_module_level=True)

import torch
from vllm.config import CUDAGraphMode

from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, free_blocks, generate, runner
from tests.engine.test_exactness import POLICIES, greedy, tiny_prompts
from tests.engine.tiny import Shape, add_letters, make_head, make_target
from tests.gpu.test_engine import assert_near_ties, differing
from tests.v2 import grammar

# `DRY=1 scripts/gpu_v2.sh` runs it without a GPU.
pytestmark = pytest.mark.full if os.environ.get("DRY") else pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
REQUESTS, TOKENS = (32, 64) if ON_GPU else (6, 12)
PROMPTS = tiny_prompts(REQUESTS)
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
NAMES = ["chain-5", "static-15", "topn-16", "echo-16", "auto-16", "evict-16", "graft-16"]

CONDITIONS: dict[str, dict[str, Any]] = {
    "prompts come in chunks": {"max_num_batched_tokens": 320, "long_prefill_token_threshold": 12},
    "requests are preempted": {"num_gpu_blocks_override": 18, "block_size": 32},
    "the prefix is cached": {"enable_prefix_caching": True, "block_size": 32},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder, shape = tmp_path_factory.mktemp("tiny"), Shape(head_dim=64)
    return TinyModel(
        make_target(folder / "target", shape), make_head(folder / "head", shape), shape
    )


@contextmanager
def v2(tiny: TinyModel, spec: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An engine whose decoding runs in full graphs, where there is a GPU."""
    usual: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "async_scheduling": True,
    }
    if ON_GPU:
        usual |= {
            "kv_cache_memory_bytes": 1 << 28,
            "gpu_memory_utilization": 0.05,
            "enforce_eager": False,
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": SIZES,
            },
        }
    with engine(tiny.target, spec, **{**usual, **options}) as llm:
        yield llm


def spec_of(tiny: TinyModel, name: str) -> dict[str, Any]:
    num_nodes, section = POLICIES[name]
    return echo(tiny.head, num_nodes, **section)


def sampling(**options: Any) -> Any:
    from vllm import SamplingParams

    usual = {"temperature": 1.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**usual, **options})


def mixed() -> list[Any]:
    """Greedy and seeded requests, some that look back, some that say one token."""
    kinds = [
        greedy(TOKENS),
        sampling(seed=1),
        sampling(seed=2, temperature=0.6, top_p=0.9),
        sampling(seed=3, top_k=4),
        greedy(1),
        sampling(seed=4, min_p=0.1),
        greedy(TOKENS, repetition_penalty=1.3),
        greedy(TOKENS, presence_penalty=1.0, frequency_penalty=0.5),
    ]
    return [kinds[i % len(kinds)] for i in range(REQUESTS)]


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> dict[str, list[list[int]]]:
    with v2(tiny, None) as llm:
        return {
            "greedy": generate(llm, PROMPTS, greedy(TOKENS)),
            "mixed": generate(llm, PROMPTS, mixed()),
        }


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_gives_the_tokens_of_plain_v2(
    name: str, tiny: TinyModel, plain: dict[str, list[list[int]]]
) -> None:
    with v2(tiny, spec_of(tiny, name)) as llm:
        if ON_GPU:
            manager = runner(llm).cudagraph_manager
            assert any(graph.cg_mode is CUDAGraphMode.FULL for graph in manager.graphs)
            assert runner(llm).speculator.level_graphs.graphs
        free = free_blocks(llm)
        assert not differing(generate(llm, PROMPTS, greedy(TOKENS)), plain["greedy"])
        assert not differing(generate(llm, PROMPTS, mixed()), plain["mixed"])
        assert not differing(
            generate(llm, PROMPTS[:2], greedy(TOKENS), one_by_one=True), plain["greedy"][:2]
        )
        assert free_blocks(llm) == free
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_graphs_draft_what_eager_mode_drafts(tiny: TinyModel, is_async: bool) -> None:
    """Verification says nothing of a drafter that goes astray."""
    accepted = []
    for eager in (False, True):
        options = {"enforce_eager": True, "compilation_config": {}} if eager else {}
        with v2(tiny, spec_of(tiny, "topn-16"), async_scheduling=is_async, **options) as llm:
            generate(llm, PROMPTS, greedy(TOKENS))
            accepted.append(counters(llm)["spec_decode_num_accepted_tokens"])
    assert abs(accepted[0] - accepted[1]) <= 0.02 * accepted[1]


@pytest.mark.parametrize("name", ["topn-16", "echo-16"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_trees_stay_exact_where(
    condition: str, name: str, tiny: TinyModel, plain: dict[str, list[list[int]]]
) -> None:
    with v2(tiny, spec_of(tiny, name), **CONDITIONS[condition]) as llm:
        assert not differing(generate(llm, PROMPTS, greedy(TOKENS)), plain["greedy"])
        if condition == "requests are preempted" and ON_GPU:
            values = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
            assert values[0] > 0
        if condition == "the prefix is cached":
            assert not differing(generate(llm, PROMPTS, greedy(TOKENS)), plain["greedy"])


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_trees_under_a_grammar_are_exact(tiny: TinyModel, is_async: bool) -> None:
    """Half of the batch, whose trees come to the host and go back."""
    add_letters(tiny.target, grammar.LETTERS, eos_token=grammar.END)
    options = {"skip_tokenizer_init": False, "async_scheduling": is_async}
    with v2(tiny, None, **options) as llm:
        plain = generate(llm, grammar.PROMPTS, grammar.asked())
    with v2(tiny, spec_of(tiny, "echo-16"), **options) as llm:
        for _ in range(2):
            assert not differing(generate(llm, grammar.PROMPTS, grammar.asked()), plain)
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 20


def test_in_half_precision_a_first_difference_is_a_near_tie(tiny: TinyModel) -> None:
    """The kernels of FlashAttention's backend, whose order of adding up is another one."""
    with v2(tiny, None, dtype="bfloat16") as llm:
        outputs = llm.generate(PROMPTS, greedy(TOKENS, logprobs=12), use_tqdm=False)
    with v2(tiny, spec_of(tiny, "topn-16"), dtype="bfloat16") as llm:
        assert_near_ties(outputs, generate(llm, PROMPTS, greedy(TOKENS)))
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5
