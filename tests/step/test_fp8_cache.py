# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""An FP8 cache on a CPU: a tree's rows see each other as they will be read back from it."""

from __future__ import annotations

import pytest
import torch

from echo_vllm.ops import reference
from echo_vllm.step.attention.cpu import FP8, through_fp8
from tests.ops.cases import load_vllm_cpu_kernels, split_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_numbers_go_through_the_cache_as_vllm_writes_them(dtype: torch.dtype, scale: float) -> None:
    """To the bit, as they are read from a cache with blocks of another size."""
    if not (torch.cpu._is_avx512_supported() and load_vllm_cpu_kernels()):
        pytest.skip("vLLM has an FP8 cache on CPUs with AVX-512 only, and this is none")
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 64, 2, 32, generator=generator)
    magnitudes = torch.logspace(-4, 3, 64).view(-1, 1, 1)
    key, value = (key * magnitudes).to(dtype), (value * magnitudes).to(dtype)
    cache = torch.zeros(1, 2, 64, 64, dtype=torch.uint8)
    halves = split_cache(cache)
    slots = torch.arange(64)
    torch.ops._C.cpu_attn_reshape_and_cache(
        key, value, *halves, slots, "vec", scale, scale, "fp8_e4m3"
    )
    keys, values = (half.view(FP8) for half in halves)
    found = reference.gather_context(keys, values, torch.tensor([0]), 64, "vec")
    read = through_fp8(key, value, scale, scale)
    for written, again in zip(found, read, strict=True):
        assert torch.equal((written.float() * scale).to(dtype), again)
    assert (read[0] != key).any()
