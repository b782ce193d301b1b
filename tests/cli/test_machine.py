# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The number format that a processor is good at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from echo_vllm import machine


@pytest.mark.parametrize(
    ("line", "expected"),
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
def test_bfloat16_is_for_processors_that_have_it(
    monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    text = f"processor\t: 0\n{line}\n\nprocessor\t: 1\nflags: amx_bf16\n"
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: text)
    machine._first_processor.cache_clear()
    try:
        assert machine.fast_dtype() == expected
    finally:
        machine._first_processor.cache_clear()


def test_this_machine_has_a_description() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    assert machine.describe_cpu().endswith(f" x{os.cpu_count()}")
    assert not named or machine.describe_cpu().startswith(named[0])
