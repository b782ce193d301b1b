# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""ECHO: tree speculation for vLLM.

Importing the package itself stays light: neither torch nor vLLM is loaded here, so that the
command line and the patch tool start at once and work on a broken installation too.
"""

from echo_vllm.version import VLLM_DISTRIBUTIONS, VLLM_VERSION, __version__

__all__ = ["VLLM_DISTRIBUTIONS", "VLLM_VERSION", "__version__"]
