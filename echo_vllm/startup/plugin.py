# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The `vllm.general_plugins` entry point, loaded by vLLM in every one of its processes."""

from __future__ import annotations


def register() -> None:
    """Warn at start-up where the installed vLLM does not carry this package's patches.

    vLLM would otherwise answer method "echo" with a list of the methods that it knows. Everything
    else is wired up by the patches, only when the method is chosen.
    """
    from vllm.config.speculative import SpeculativeConfig
    from vllm.logger import init_logger

    if "echo" not in SpeculativeConfig.__dataclass_fields__:
        init_logger("vllm.echo_vllm").warning(
            "echo-vllm is installed but vLLM is not patched; run: echo-vllm patch apply"
        )
