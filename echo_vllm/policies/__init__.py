# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Policies: which nodes are drafted, and which of them are verified.

`parse_section` validates the `echo` section of echo.json, `make_policy` turns it into a policy of
this package or of another one. A policy is one file with everything that is said of it; it never
sees vLLM.
"""

from echo_vllm.policies.base import Cut, DraftBatch, DraftPolicy, Observation
from echo_vllm.policies.registry import draws_of, make_policy, parse_section, policy_class

__all__ = [
    "Cut",
    "DraftBatch",
    "DraftPolicy",
    "Observation",
    "draws_of",
    "make_policy",
    "parse_section",
    "policy_class",
]
