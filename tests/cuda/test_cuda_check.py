# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The CUDA sources compile for every architecture, without warnings and without spills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_every_kernel_compiles_for_every_architecture_and_none_spills(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "scripts/cuda_check.py", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.stdout.startswith("cuda-check: skipped"):
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    for arch in ("sm_80", "sm_90a", "sm_100"):
        assert arch in result.stdout
