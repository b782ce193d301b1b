# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
from __future__ import annotations

from collections.abc import Iterator

import pytest

from echo_vllm import ops
from tests.ops.cases import load_vllm_cpu_kernels


@pytest.fixture(scope="module", params=ops.supported_cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces each instruction set that this machine has, one after the other."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHO_VLLM_CPU_ISA", name)
        yield name


@pytest.fixture(scope="session")
def vllm_cpu_kernels() -> None:
    """vLLM's own CPU operators in `torch.ops._C`, which our kernels must agree with."""
    if not load_vllm_cpu_kernels():
        pytest.skip("the installed vLLM has no CPU kernels (a CUDA build)")
