# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drafting on a pretended GPU: the forests of the CPU, and the host waits once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from echo_vllm import ops
from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies import DraftBatch, DraftPolicy, make_policy, parse_section
from echo_vllm.policies.graft import GraftPolicy
from echo_vllm.step.attention.tree import TreeAttention
from echo_vllm.step.v1.drafter import DraftReport, EchoProposer
from echo_vllm.trees.forest import DraftForest
from tests.device.pretended import GPU, OnGPU, on_gpu, pretended_gpu

VOCAB, HIDDEN, HEADS, HEAD_SIZE, BLOCK = 23, 32, 2, 16, 16
CONTEXTS = (5, 40, 17, 33, 2)


class TinyDrafter(EchoProposer):
    """The proposer with one attention layer of random weights in place of vLLM's model."""

    def __init__(self, policy: DraftPolicy, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=draw) / shape[0] ** 0.5
            return values if device.type == "cpu" else on_gpu(values)

        self.policy, self.device = policy, device
        self.max_num_tokens, self.max_draft_len = 64, 10_000
        self._draft_attn_layer_names = {"layer"}
        self.embedding, self.head = weights(VOCAB, HIDDEN), weights(HIDDEN, VOCAB) * 3
        self.key_of, self.value_of = weights(HIDDEN, HIDDEN), weights(HIDDEN, HIDDEN)
        blocks = len(CONTEXTS) * 4
        self.cache = weights(2, blocks, BLOCK, HEADS, HEAD_SIZE)
        self.block_table = torch.arange(blocks, dtype=torch.int32).view(len(CONTEXTS), 4)
        self.forwards = 0

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        metadata: Any,
        slot_mapping: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.forwards += 1
        assert slot_mapping is None
        assert token_ids.dtype == torch.int32
        tree: TreeAttention = metadata["layer"].tree
        states = hidden_states + self.embedding[token_ids.long()] + positions.unsqueeze(1) / 100
        key = (states @ self.key_of).view(-1, HEADS, HEAD_SIZE)
        value = (states @ self.value_of).view(-1, HEADS, HEAD_SIZE)
        query, out = states.view(-1, HEADS, HEAD_SIZE), torch.empty_like(key)
        suffix_key, suffix_value = tree.suffix("layer", key, value)
        ops.tree_attention(
            query, self.cache[0], self.cache[1], tree.block_table, tree.context_lens,
            tree.query_start, tree.row_start, suffix_key, suffix_value, tree.suffix_start,
            tree.suffix_len, tree.mask, tree.positions, 0.3, 0.0, 0, "nhd", out,
        )  # fmt: skip
        states = (states + out.view(-1, HIDDEN)).tanh()
        return states, states

    def _top_tokens(self, output: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, ids = (output @ self.head).log_softmax(1).topk(k)
        return ids, values

    def draft(self, batch: DraftBatch) -> DraftForest:
        """Trees for all requests of `CONTEXTS`."""
        first = torch.randn(len(CONTEXTS), HIDDEN, generator=torch.Generator().manual_seed(2))
        lengths = torch.tensor(CONTEXTS, dtype=torch.int32)
        roots = torch.arange(len(CONTEXTS))
        tensors = [first, lengths, self.block_table, roots]
        if self.device.type != "cpu":
            tensors = [on_gpu(x) for x in tensors]
        first, lengths, block_table, roots = tensors
        if isinstance(self.policy, GraftPolicy) and self.policy.table is None:
            said = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
            tokens = torch.arange(VOCAB)
            if self.device.type != "cpu":
                tokens, said = on_gpu(tokens), on_gpu(said)
            self.policy.observe_logits(tokens, said)
        self.report = DraftReport()
        return self.draft_trees(
            output=first,
            features=first,
            context_lens=lengths,
            last_positions=lengths - 1,
            block_table=block_table,
            roots=roots,
            batch=batch,
        )


def policy_of(name: str, max_nodes: int = 12, **fields: Any) -> DraftPolicy:
    section = {"policy": name, **fields}
    config = parse_section(section, num_speculative_tokens=max_nodes)
    return make_policy(config, max_nodes)


def elastic(name: str, **fields: Any) -> DraftPolicy:
    return policy_of(name, **{"max_depth": 5, "top_k": 3, "width": 4, **fields})


def auto_policy(survival: SurvivalModel | None = None) -> DraftPolicy:
    policy: Any = elastic("auto", floor=1)
    policy.survival = survival or policy.survival
    return policy  # type: ignore[no-any-return]


def measured() -> SurvivalModel:
    return SurvivalModel([((-4.0, 0.0), (0.05, 0.9)), ((-6.0, 0.0), (0.02, 0.7))])


COST = StepCost(
    verify=CostCurve.from_points([1, 32, 256], [1.0, 1.2, 6.0]),
    draft_level=CostCurve.from_points([1, 64], [0.05, 0.1]),
    catch_up=CostCurve.from_points([1, 64], [0.05, 0.1]),
)
PAYING = DraftPlan(cost=COST, price=1.0, factors=(1.0, 0.9))
BATCH = DraftBatch.of(len(CONTEXTS))

# Policy, batch, and how often the host may wait: once for the forest; `auto` weighs time against
# tokens on the host, once a level, then for its budget (scores, level sizes), and so does `evict`;
# `graft` joins what it drafted and what it retrieved there.
CASES: dict[str, tuple[Callable[[], DraftPolicy], DraftBatch, int]] = {
    "chain": (lambda: policy_of("chain", 6), BATCH, 1),
    "static": (
        lambda: policy_of("static", tree=[[0], [1], [0, 0], [0, 2], [1, 0], [0, 0, 0]]), BATCH, 1),
    "topn": (lambda: policy_of("topn", 16, max_depth=6, top_k=4), BATCH, 1),
    "echo": (lambda: elastic("echo", k_max=30, gates={"1": 0.2, "3": 0.02}), BATCH, 1),
    "echo-that-stops": (lambda: elastic("echo", k_max=9, gates={"1": 0.9, "2": 0.5}), BATCH, 1),
    "echo-equal": (lambda: elastic("echo", k_max=25, gates={"2": 0.1}, share="equal"), BATCH, 1),
    "auto-without-costs": (auto_policy, BATCH, 2),
    "auto": (auto_policy, replace(BATCH, plan=PAYING), 7),
    "auto-measured": (lambda: auto_policy(measured()), replace(BATCH, plan=PAYING), 7),
    "auto-probes": (
        auto_policy,
        replace(BATCH, plan=replace(PAYING, max_depth=2, probes=1), probes=torch.tensor([3])),
        7,
    ),
    "evict": (lambda: elastic("evict"), replace(BATCH, plan=PAYING), 3),
    "graft": (lambda: elastic("graft", gates={"1": 0.3, "3": 0.02}), BATCH, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_forest_is_that_of_the_cpu_and_the_host_hardly_waits(name: str) -> None:
    make, batch, most = CASES[name]
    wanted = TinyDrafter(make(), torch.device("cpu")).draft(batch)
    wanted.validate(max_nodes=16, max_depth=6)
    assert wanted.num_nodes > 0
    with pretended_gpu() as waits:
        drafter = TinyDrafter(make(), GPU)
        drafter.draft(batch)  # the first moves tables that stay there
        waits.places.clear()
        found = drafter.draft(batch)
    for field in ("token_ids", "parents", "depths", "cu_nodes"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field
    if name != "graft":  # Its nodes are not all the drafter's.
        assert found.columns is not None
        assert wanted.columns is not None
        assert torch.equal(found.columns, wanted.columns)
    assert torch.allclose(found.path_logprobs, wanted.path_logprobs, atol=1e-5)
    assert not isinstance(found.token_ids, OnGPU)
    assert 1 <= waits.total <= most, waits.places


def test_a_level_of_more_rows_than_a_batch_runs_in_parts_on_the_device() -> None:
    forests = []
    for device in (torch.device("cpu"), GPU):
        with pretended_gpu() as waits:
            drafter = TinyDrafter(policy_of("topn", 16, max_depth=4, top_k=4), device)
            drafter.max_num_tokens = 8  # two requests at a time
            forests.append(drafter.draft(BATCH))
        assert drafter.forwards == 3 * 3
    assert forests[0].trees() == forests[1].trees()
    assert waits.total == 1, waits.places


def test_what_the_forecast_remembers_comes_in_one_transfer() -> None:
    probes = torch.tensor([0, 2])
    wanted = TinyDrafter(auto_policy(), torch.device("cpu"))
    wanted.draft(BATCH)
    with pretended_gpu() as waits:
        drafter = TinyDrafter(auto_policy(), GPU)
        drafter.draft(BATCH)
        before = waits.total
        found = drafter.policy.samples(drafter.report.pool, probes)  # type: ignore[attr-defined]
    assert waits.total == before + 1
    policy, pool = wanted.policy, wanted.report.pool
    assert pool is not None
    assert [d[1:] for d in found] == [d[1:] for d in policy.samples(pool, probes)]  # type: ignore[attr-defined]
    assert len(found) == len(probes)
