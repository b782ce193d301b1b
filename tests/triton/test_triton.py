# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs the Triton tests in processes that have Triton, which vLLM's environment has not on a CPU.

`make test` puts Triton into `.build/triton`; it must not lie where vLLM finds it, because vLLM and
torch choose other ways with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / ".build" / "triton"


@pytest.mark.parametrize(
    ("script", "interpret"),
    [
        ("interpreted_attention.py", "1"),
        ("interpreted_forest.py", "1"),
        pytest.param("compiled.py", "0", marks=pytest.mark.full),
    ],
)
def test_triton_kernels(script: str, interpret: str, tmp_path: Path) -> None:
    if not (TRITON / "triton").is_dir():
        pytest.skip(f"Triton is not in {TRITON}: `make test` fetches it, and could not")
    options = [
        "-q",
        "-W",
        "ignore:Conversion of an array:DeprecationWarning",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--durations=5",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).parent / script)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(TRITON),
            "TRITON_INTERPRET": interpret,
            "TRITON_CACHE_DIR": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
