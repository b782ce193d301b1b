# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From the configuration to a policy object."""

from __future__ import annotations

from echo_vllm.config import EchoConfig
from echo_vllm.policy.base import DraftPolicy
from echo_vllm.policy.chain import ChainPolicy
from echo_vllm.policy.static import StaticPolicy
from echo_vllm.policy.topn import TopNPolicy


def make_policy(config: EchoConfig, num_speculative_tokens: int) -> DraftPolicy:
    """The policy that `config` names.

    Args:
        config: the validated `echo` section.
        num_speculative_tokens: the most nodes a request may have (N).
    """
    match config.policy:
        case "chain":
            return ChainPolicy(num_speculative_tokens)
        case "static":
            assert config.tree is not None  # EchoConfig refuses `static` without a tree.
            return StaticPolicy(config.tree)
        case "topn":
            return TopNPolicy(num_speculative_tokens, config.max_depth, config.top_k)
