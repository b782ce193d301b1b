# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A mixture of experts as target: exact, and its cost is measured with rows that differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_vllm.startup.measure import _forwards
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate, runner
from tests.engine.test_exactness import check_forests, greedy, tiny_engine, tiny_prompts
from tests.engine.tiny import Shape, make_head, make_moe_target

pytestmark = pytest.mark.full

# Lets the measured cost decide, so that the whole way from experts to selection is walked.
EVICT = {"policy": "evict", "max_depth": 4, "top_k": 3}
GRAFT = {"policy": "graft", "max_depth": 4, "top_k": 3, "gates": {"1": 0.4}}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder, shape = tmp_path_factory.mktemp("moe"), Shape()
    return TinyModel(
        make_moe_target(folder / "target", shape), make_head(folder / "head", shape), shape
    )


@pytest.fixture(scope="module")
def plain_tokens(moe: TinyModel) -> list[list[int]]:
    with tiny_engine(moe, None) as llm:
        return generate(llm, tiny_prompts(32), greedy(64))


@pytest.mark.parametrize("section", [EVICT, GRAFT], ids=lambda section: section["policy"])
def test_a_mixture_of_experts_is_token_identical(
    section: dict[str, Any], moe: TinyModel, plain_tokens: list[list[int]]
) -> None:
    with tiny_engine(moe, echo(moe.head, 12, **section)) as llm:
        check_forests(llm, 12)
        assert generate(llm, tiny_prompts(32), greedy(64)) == plain_tokens
        found = counters(llm)
    assert found["spec_decode_num_accepted_tokens"] > 0.05 * found["spec_decode_num_drafts"]


@pytest.fixture
def router_logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """[rows, experts] of every layer of every forward, as they come."""
    from vllm.model_executor.models import qwen3_moe

    found: list[torch.Tensor] = []
    forward = qwen3_moe.Qwen3MoeSparseMoeBlock.forward

    def watched(self: Any, hidden_states: torch.Tensor) -> Any:
        found.append(self.gate(hidden_states)[0].detach())
        return forward(self, hidden_states)

    monkeypatch.setattr(qwen3_moe.Qwen3MoeSparseMoeBlock, "forward", watched)
    return found


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Every new tensor of floats begins as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # `fill_uninitialized_memory`
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_cost_is_measured_with_many_experts(
    moe: TinyModel, router_logits: list[torch.Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    """Equal rows would all take the same two of eight experts, and a large forward look cheap.
    So would rows of what happened to be in memory that nobody wrote."""
    monkeypatch.setenv("ECHO_VLLM_CACHE", str(tmp_path))
    with tiny_engine(moe, echo(moe.head, 12, **EVICT), enforce_eager=True) as llm:
        before = runner(llm).input_ids.gpu.clone()
        with _forwards(runner(llm)) as forwards:
            router_logits.clear()
            with unwritten_is_nan():
                forwards.target(16)
        assert torch.equal(runner(llm).input_ids.gpu, before)
    assert router_logits
    for logits in router_logits:
        assert len(set(logits.topk(2, dim=1).indices.flatten().tolist())) >= 5
