# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From the configuration to a policy object."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from echo_vllm.config import EchoConfig
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies.auto import AutoPolicy
from echo_vllm.policies.base import DraftPolicy
from echo_vllm.policies.chain import ChainPolicy
from echo_vllm.policies.echo import EchoPolicy
from echo_vllm.policies.evict import EvictPolicy
from echo_vllm.policies.graft import GraftPolicy
from echo_vllm.policies.static import StaticPolicy
from echo_vllm.policies.topn import TopNPolicy

DEFAULT_GATES = {1: 0.2, 3: 0.2, 6: 0.3}
"""Gates without a profile: about those of the authors' published code (arXiv 2604.09603), which
tests the root, the third and the sixth level."""

DEFAULT_GROWTH = 0.6
"""Without a profile: how often an accepted node has an accepted child."""


def make_policy(
    config: EchoConfig, num_speculative_tokens: int, profile: DrafterProfile | None = None
) -> DraftPolicy:
    """The policy that `config` names.

    Args:
        config: the validated `echo` section.
        num_speculative_tokens: the most nodes a request may have (N).
        profile: of the drafter, for `echo`, `auto` and `graft`; None takes built-in values.
    """
    tree: dict[str, Any] = {
        "max_nodes": num_speculative_tokens,
        "max_depth": config.max_depth,
        "top_k": config.top_k,
        "width": config.width,
        "k_max": config.k_max,
    }
    elastic = {**tree, "floor": config.floor}
    match config.policy:
        case "chain":
            return ChainPolicy(num_speculative_tokens)
        case "static":
            assert config.tree is not None  # EchoConfig refuses `static` without a tree.
            return StaticPolicy(config.tree)
        case "topn":
            return TopNPolicy(num_speculative_tokens, config.max_depth, config.top_k)
        case "echo":
            return EchoPolicy(**elastic, gates=gates_of(config, profile), share=config.share)
        case "auto":
            return AutoPolicy(
                **elastic,
                survival=survival_of(config, profile),
                growth=growth_of(config, profile),
            )
        case "evict":
            return EvictPolicy(**tree)
        case "graft":
            return GraftPolicy(**tree, gates=gates_of(config, profile))


def gates_of(config: EchoConfig, profile: DrafterProfile | None) -> dict[int, float]:
    """Depth -> threshold: the configuration's, the profile's, or the built-in ones."""
    if config.gates is not None:
        return dict(config.gates)
    gates = DEFAULT_GATES if profile is None else profile.gates()
    return {depth: tau for depth, tau in gates.items() if depth <= config.max_depth}


def survival_of(config: EchoConfig, profile: DrafterProfile | None) -> SurvivalModel:
    """The profile's survival curves, or the drafter's own probabilities."""
    return SurvivalModel.default(config.max_depth) if profile is None else profile.survival()


def growth_of(config: EchoConfig, profile: DrafterProfile | None) -> list[float]:
    """How often depth d + 1 is accepted where depth d is, for d = 1 .. max_depth - 1."""
    growth: list[float] = []
    if profile is not None:
        growth = [
            min(1.0, below.acceptance / above.acceptance) if above.acceptance > 0 else 0.0
            for above, below in pairwise(profile.depths)
        ]
    last = growth[-1] if growth else DEFAULT_GROWTH
    return (growth + [last] * config.max_depth)[: config.max_depth - 1]
