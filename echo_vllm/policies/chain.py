# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`chain`: one path of fixed length, the drafter's best token at every step.

The baseline that vLLM's own EAGLE-3 runs, on this project's runtime, so that a comparison with it
measures the runtime and a comparison with the trees measures the policy.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from echo_vllm.config import MAX_DEPTH, SECTION, EchoConfig, EchoConfigError
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.policies.static import FixedShapePolicy


class ChainConfig(EchoConfig):
    """The section of `chain`."""

    policy: Literal["chain"] = Field(
        default="chain", description="One path of num_speculative_tokens nodes."
    )

    def filled(self, num_nodes: int) -> Self:
        if num_nodes > MAX_DEPTH:
            raise EchoConfigError(
                f"speculative_config.num_speculative_tokens must be at most {MAX_DEPTH} for "
                f"policy chain, which drafts one node a level, got {num_nodes}; lower it, or "
                f"choose another {SECTION}.policy."
            )
        if "max_depth" in self.model_fields_set and self.max_depth != num_nodes:
            raise EchoConfigError(
                f"{SECTION}.max_depth must equal speculative_config.num_speculative_tokens "
                f"({num_nodes}) for policy chain, got {self.max_depth}; remove it, or make the "
                "two equal."
            )
        if "top_k" in self.model_fields_set and self.top_k != 1:
            raise EchoConfigError(
                f"{SECTION}.top_k must be 1 for policy chain, got {self.top_k}; remove it, or "
                f"set {SECTION}.policy to topn for a tree."
            )
        return self.with_fields(max_depth=num_nodes, top_k=1)


class ChainPolicy(FixedShapePolicy):
    """A chain of as many nodes as a request may have."""

    Config = ChainConfig

    def __init__(
        self, config: ChainConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        super().__init__([(0,) * depth for depth in range(1, max_nodes + 1)])
