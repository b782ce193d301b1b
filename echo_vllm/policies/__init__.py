# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Policies: which nodes are drafted, and which of them are verified.

`make_policy` turns the `echo` section of echo.json into one of the policies of this package.
A policy is a pure function of draft scores, a plan and a profile; it never sees vLLM.
"""

from echo_vllm.policies.base import DraftBatch, DraftPolicy
from echo_vllm.policies.registry import make_policy

__all__ = ["DraftBatch", "DraftPolicy", "make_policy"]
