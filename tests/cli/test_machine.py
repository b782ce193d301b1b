# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The number format that a processor is good at."""

from __future__ import annotations

import pytest

from echo_vllm.machine import fast_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2 fma", "float32"),
        ("flags\t\t: avx512f avx512bw", "float32"),
        ("flags\t\t: avx512f avx512_bf16", "bfloat16"),
        ("flags\t\t: avx512f amx_bf16 amx_tile", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("Features\t: fp asimd", "float32"),
        ("something else", "bfloat16"),
    ],
)
def test_bfloat16_is_for_processors_that_have_it(flags: str, expected: str) -> None:
    assert fast_dtype(f"processor\t: 0\n{flags}\n") == expected
