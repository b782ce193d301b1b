# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The paths of a GPU in a real engine on the CPU: everything but the device itself.

The CUDA attention backend over a stand-in for FlashAttention, its cache layout, the padding that
piecewise graphs bring and the drafter's buffers for them, requests that stay in the frontier, and
all rows sampled at once: token-identical at T = 0, and the target's distribution at T = 1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.device import flash
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate, runner
from tests.engine.test_exactness import POLICIES, check_forests, greedy, tiny_engine, tiny_prompts

pytestmark = pytest.mark.full

PAD_TO = 8
PROMPTS, TOKENS = 20, 40


def pad_like_graphs(patch: pytest.MonkeyPatch) -> list[int]:
    """Rows come in multiples of PAD_TO, as if each had its captured graph; returns real counts."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    from echo_vllm.step.v1.cpu import EchoCPUModelRunner
    from echo_vllm.step.v1.drafter import EchoProposer

    counts: list[int] = []

    def padded(count: int) -> int:
        counts.append(count)
        return -(-count // PAD_TO) * PAD_TO

    decide = EchoCPUModelRunner._determine_batch_execution_and_padding

    def of_target(self: Any, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        decided = decide(self, num_tokens, *args, **kwargs)
        if kwargs.get("force_eager"):
            return decided
        _, _, *others = decided
        return CUDAGraphMode.PIECEWISE, BatchDescriptor(padded(num_tokens)), *others

    def of_drafter(self: Any, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        return CUDAGraphMode.PIECEWISE, padded(num_tokens), None

    patch.setattr(EchoCPUModelRunner, "_determine_batch_execution_and_padding", of_target)
    patch.setattr(EchoProposer, "_determine_batch_execution_and_padding", of_drafter)
    return counts


def draw_at_once(patch: pytest.MonkeyPatch) -> None:
    """Engines sample the rows of a tree at once from now on, as on a GPU."""
    from echo_vllm.step.v1.runner import EchoRunnerMixin

    make = EchoRunnerMixin.__init__

    def making(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.draws_at_once = True

    patch.setattr(EchoRunnerMixin, "__init__", making)


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> list[int]:
    """Engines take the paths of a GPU from now on; gives the rows of their forwards."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from echo_vllm.step import commit
    from echo_vllm.step.attention.cuda import EchoFlashAttentionBackend
    from echo_vllm.step.v1 import drafter
    from echo_vllm.step.v1.cpu import EchoCPUWorker
    from echo_vllm.trees.pool import CPU, CandidatePool

    flash.install(patch)
    patch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 2)
    patch.setattr(
        EchoCPUWorker,
        "tree_backend",
        lambda self: (AttentionBackendEnum.CPU_ATTN, EchoFlashAttentionBackend),
    )
    patch.setattr(commit, "kv_layout", lambda layer: "nhd")
    draw_at_once(patch)

    class Pool(CandidatePool):
        @classmethod
        def empty(
            cls, num_requests: int, device: torch.device = CPU, compacts: bool | None = None
        ) -> CandidatePool:
            return CandidatePool.empty(num_requests, device, compacts=False)

    patch.setattr(drafter, "CandidatePool", Pool)
    return pad_like_graphs(patch)


@pytest.fixture(scope="module")
def plain_tokens(tiny: TinyModel) -> list[list[int]]:
    with tiny_engine(tiny, None) as llm:
        return generate(llm, tiny_prompts(PROMPTS), greedy(TOKENS))


@pytest.mark.parametrize("name", ["topn-16", "echo-16"])
def test_the_paths_of_a_gpu_are_token_identical(
    name: str, tiny: TinyModel, plain_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_nodes, section = POLICIES[name]
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 16}  # prompts in chunks beside trees
    counts = as_on_a_gpu(monkeypatch)
    with tiny_engine(tiny, echo(tiny.head, num_nodes, **section), **options) as llm:
        check_forests(llm, num_nodes)
        layer = runner(llm).compilation_config.static_forward_context
        assert {type(x.impl).__name__ for x in layer.values()} == {"EchoFlashAttentionImpl"}
        assert generate(llm, tiny_prompts(PROMPTS), greedy(TOKENS)) == plain_tokens
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 50
    assert any(count % PAD_TO for count in counts), "nothing was padded"


def test_all_rows_at_once_have_the_targets_distribution(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echo_vllm.step import verification
    from tests.engine import test_distribution as distribution

    six = distribution.tiny.__wrapped__(tmp_path_factory)  # type: ignore[attr-defined]
    logits = distribution.target_logits.__wrapped__(six)  # type: ignore[attr-defined]
    at_once: list[int] = []
    sample_at_once = verification._sample_at_once

    def counted(*args: Any) -> torch.Tensor:
        tokens = sample_at_once(*args)
        at_once.append(len(tokens))
        return tokens

    monkeypatch.setattr(verification, "_sample_at_once", counted)
    draw_at_once(monkeypatch)
    names = ["plain", "hot", "top-k", "top-p"]
    settings = [distribution.SETTINGS[name] for name in names]
    with distribution.tree_engine(six) as llm:
        sampled = distribution.sample(llm, settings, 1500)
        found = counters(llm)
    assert sum(at_once) > found["spec_decode_num_draft_tokens"]
    assert found["spec_decode_num_accepted_tokens"] > 0.2 * 1500 * len(names)
    for samples, setting in zip(sampled, settings, strict=True):
        value = distribution.p_value(samples, setting, logits, six.shape.vocab)
        assert value > distribution.LEAST_P / len(names)
