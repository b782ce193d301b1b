# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A tiny model that the tests of the engine share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.tiny import Shape, make_head, make_target


@dataclass(frozen=True)
class TinyModel:
    """A tiny random target and a random head for it."""

    target: Path
    head: Path
    shape: Shape


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("tiny")
    shape = Shape()
    return TinyModel(
        make_target(folder / "target", shape), make_head(folder / "head", shape), shape
    )


@pytest.fixture
def free_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that costs nothing, so that no clock decides whether `auto` drafts."""
    from echo_vllm.forecast import CostCurve, StepCost
    from echo_vllm.policies.cost_aware import CostAwarePolicy

    free = CostCurve((1.0,), (1e-9,))
    set_cost = CostAwarePolicy.set_cost
    monkeypatch.setattr(
        CostAwarePolicy,
        "set_cost",
        lambda self, cost: set_cost(self, StepCost(cost.verify, free, free)),
    )
