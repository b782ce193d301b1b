# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drawn candidates where the host never sees a tree: on the pretended GPU the same trees, numbers
and notes as on the CPU, and nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch, DraftPolicy, make_policy, parse_section
from echo_vllm.step.drawn import draw_level
from echo_vllm.transfer import upload
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.draws import Sampling, root_keys
from echo_vllm.trees.forest import ROOT
from tests.device.pretended import GPU, held, on_gpu, pretended_gpu

REQUESTS, VOCAB = 5, 300
LOGITS = 3 * torch.randn(VOCAB + 1, VOCAB, generator=torch.Generator().manual_seed(3))

SECTIONS: dict[str, dict[str, Any]] = {
    "static": {"policy": "static", "tree": [[0], [1], [0, 0], [1, 0], [1, 1], [1, 1, 0]]},
    "topn": {"policy": "topn", "max_depth": 3, "top_k": 3},
    "echo": {"policy": "echo", "max_depth": 3, "top_k": 3, "gates": {"1": 0.2}, "k_max": 20},
    "auto": {"policy": "auto", "max_depth": 3, "top_k": 3},
}


def made(name: str) -> DraftPolicy:
    return make_policy(parse_section(SECTIONS[name], num_speculative_tokens=8), 8)


def drafted(policy: DraftPolicy, device: torch.device) -> list[torch.Tensor]:
    """Trees, what decides about them, and the policy's notes."""

    def there(values: torch.Tensor) -> torch.Tensor:
        return values if device.type == "cpu" else on_gpu(values)

    count = torch.arange(REQUESTS)
    probes = torch.tensor([1]) if policy.learns else torch.empty(0, dtype=torch.int64)
    plan = DraftPlan(max_depth=2 if policy.learns else None, drawn_factors=(0.9, 0.8, 0.7))
    batch = DraftBatch(REQUESTS, REQUESTS, plan, probes)
    keys, logits = root_keys(there(count), there(count + 7)), there(LOGITS)
    truncated = torch.tensor([True, False, True, False, False])
    sampling = Sampling(
        there(torch.tensor([1.0, 0.7, 1.5, 1.0, 0.9])),
        there(torch.tensor([4, 1 << 62, 1 << 62, 1 << 62, 1 << 62])),
        there(torch.tensor([1.0, 1.0, 0.8, 1.0, 1.0])),
        there(torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0])),
        truncated,
    )
    offsets = there(torch.zeros(VOCAB, dtype=torch.int64))
    pool = DrawnPool(keys, policy.drawn_survival(batch, device), unseen=True)
    going: torch.Tensor | None = there(torch.tensor([True, True, True, True, False]))
    parents = torch.full((REQUESTS, 1), ROOT, device=device)
    rows = torch.zeros(REQUESTS, dtype=torch.int64, device=device)
    for depth in range(1, policy.max_depth + 1):
        if depth > 1:
            stays = policy.planned(depth, pool.active, batch) | torch.isin(pool.active, probes)
            pool.go_on(pool.active[stays])
            level = pool.deepest()
            going = policy.promising(level, batch)
            parents = upload(policy.drawn_parents(level, batch), device)
            rows = 1 + pool.tokens_of(parents).flatten()
        draw_level(pool, policy, parents, logits[rows], sampling, offsets, going)
    trees = policy.drawn_ranked(pool, batch, policy.drawn_cut(batch))
    return [
        *(trees.token_ids, trees.parents, trees.tiers, trees.depths, trees.scores),
        *pool.deciding(trees),
        *policy.notes_of_drawn(pool, probes),
    ]


@pytest.mark.parametrize("name", SECTIONS)
def test_trees_are_those_of_the_cpu_and_the_host_never_waits(name: str) -> None:
    policy = made(name)
    wanted = drafted(policy, torch.device("cpu"))
    sizes = (wanted[3] > 0).sum(1)
    assert sizes[-1] == 0, "who reads a prompt has no tree"
    assert (sizes[:-1] > 0).all()
    with pretended_gpu() as waits:
        policy = made(name)
        drafted(policy, GPU)  # the first moves tables that stay there
        waits.places.clear()
        found = drafted(policy, GPU)
    assert waits.total == 0, waits.places
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(held(one).double(), other.double(), atol=1e-5)
