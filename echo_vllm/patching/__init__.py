# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Puts the patch series of this project into an installed vLLM, and takes it out again.

`diff` applies unified diffs, `series` finds and reads the patches, `installation` finds vLLM's
files without importing them, `state` compares and changes what lies on disk. The command line is
the only caller. Every error is a PatchError: one sentence with what to do.
"""

from echo_vllm.patching.diff import PatchError
from echo_vllm.patching.installation import Installation, find_installation
from echo_vllm.patching.series import Series, load_series
from echo_vllm.patching.state import Condition, PatchState

__all__ = [
    "Condition",
    "Installation",
    "PatchError",
    "PatchState",
    "Series",
    "find_installation",
    "load_series",
]
