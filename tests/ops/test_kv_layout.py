# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The cache layouts are those that vLLM's own kernel writes, element by element."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import write_cache, write_cache_by_vllm


@pytest.mark.parametrize(
    ("layout", "dtype", "block_size", "head_size"),
    [
        ("vec", torch.float32, 32, 64),
        ("vec", torch.float32, 128, 32),
        ("vec", torch.bfloat16, 96, 256),
        ("vec", torch.float16, 64, 128),
        ("vec16", torch.float32, 16, 80),
        ("vec16", torch.bfloat16, 48, 112),
        ("amx", torch.bfloat16, 32, 64),
        ("amx", torch.bfloat16, 96, 96),
        ("amx", torch.bfloat16, 128, 128),
        ("amx", torch.bfloat16, 64, 256),
    ],
)
def test_offsets_are_vllms(
    vllm_cpu_kernels: None, layout: str, dtype: torch.dtype, block_size: int, head_size: int
) -> None:
    if layout == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM writes the amx layout on machines with AMX only")
    num_blocks, num_kv_heads = 3, 2
    slots = torch.randperm(num_blocks * block_size)[: 2 * block_size]
    key = torch.randn(len(slots), num_kv_heads, head_size).to(dtype)
    value = torch.randn(len(slots), num_kv_heads, head_size).to(dtype)
    by_vllm, ours = (
        torch.full((num_blocks, num_kv_heads, block_size, 2 * head_size), -7.0, dtype=dtype)
        for _ in range(2)
    )
    write_cache_by_vllm(by_vllm, slots, key, value, layout)
    write_cache(ours, slots, key, value, layout)
    assert torch.equal(ours, by_vllm)
