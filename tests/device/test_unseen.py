# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What policies compute where the host never sees a tree, on a pretended GPU: the trees and notes
of the CPU, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool
from echo_vllm.trees.ranked import RankedTrees
from tests.device.pretended import GPU, OnGPU, held, on_gpu, pretended_gpu
from tests.device.test_drafting import (
    BATCH,
    PAYING,
    TinyDrafter,
    auto_policy,
    elastic,
    measured,
    policy_of,
)

PROBES = replace(
    BATCH, plan=replace(PAYING, max_depth=2, probes=2, width=2), probes=torch.tensor([1, 3])
)
CASES: dict[str, tuple[Callable[[], DraftPolicy], DraftBatch]] = {
    "topn": (lambda: policy_of("topn", 16, max_depth=6, top_k=4), BATCH),
    "echo": (lambda: elastic("echo", k_max=30, gates={"1": 0.2, "3": 0.02}), BATCH),
    "auto": (auto_policy, replace(BATCH, plan=PAYING)),
    "auto-measured": (lambda: auto_policy(measured()), replace(BATCH, plan=PAYING)),
    "auto-probes": (auto_policy, PROBES),
    "evict": (lambda: elastic("evict"), replace(BATCH, plan=PAYING)),
}


@pytest.fixture(autouse=True)
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafters fill pools that nobody asks."""
    stock = CandidatePool.empty

    def empty(num_requests: int, device: torch.device) -> CandidatePool:
        pool = stock(num_requests, device, compacts=False)
        pool.unseen = True
        return pool

    monkeypatch.setattr(CandidatePool, "empty", empty)


def drafted(
    drafter: TinyDrafter, batch: DraftBatch
) -> tuple[RankedTrees, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Trees, and the policy's notes of the drafting and of a verification."""
    pools: list[CandidatePool] = []

    def select(pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        pools.append(pool)
        return DraftForest.empty(pool.num_requests)

    drafter.policy.select = select  # type: ignore[method-assign]
    drafter.draft(batch)
    trees = drafter.policy.ranked(pools[0], batch)
    accepted = torch.tensor([0, 2, 1, 3, 0], dtype=torch.int32)
    verified = drafter.policy.notes_of_verified(
        trees.path_logprobs.flatten(),
        trees.depths.flatten(),
        accepted if drafter.device.type == "cpu" else on_gpu(accepted),
    )
    return trees, drafter.policy.notes_of_drafted(pools[0], trees, batch.probes), verified


@pytest.mark.parametrize("name", CASES)
def test_trees_and_notes_are_those_of_the_cpu_and_the_host_never_waits(name: str) -> None:
    make, batch = CASES[name]
    wanted = drafted(TinyDrafter(make(), torch.device("cpu")), batch)
    with pretended_gpu() as waits:
        drafter = TinyDrafter(make(), GPU)
        drafted(drafter, batch)  # the first moves tables that stay there
        waits.places.clear()
        trees, *notes = drafted(drafter, batch)
    assert waits.total == 0, waits.places
    for field in ("token_ids", "parents", "tiers", "depths"):
        assert torch.equal(held(getattr(trees, field)), getattr(wanted[0], field)), field
    for field in ("scores", "path_logprobs"):
        assert torch.allclose(held(getattr(trees, field)), getattr(wanted[0], field), atol=1e-5)
    for found, of_cpu in zip(notes, wanted[1:], strict=True):
        assert len(found) == len(of_cpu)
        for one, other in zip(found, of_cpu, strict=True):
            assert isinstance(one, OnGPU)
            assert torch.allclose(held(one).double(), other.double(), atol=1e-4)
    learns = name.startswith("auto")
    assert [len(each) for each in notes] == [
        {"auto-probes": 6, "evict": 1}.get(name, 2 * learns),
        int(learns),
    ]
