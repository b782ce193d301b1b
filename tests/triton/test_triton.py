# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs the Triton tests in processes that have Triton, which a CPU's environment has not.

`make test` puts Triton into `.build/triton`; it must not lie where vLLM finds it, because vLLM and
torch choose other ways with it. On a GPU it is installed, and the same tests run compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / ".build" / "triton"


def run_pytest(scripts: tuple[str, ...], **environment: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5"]
    options += ["-W", "ignore:Conversion of an array:DeprecationWarning"]  # in the interpreter
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(folder / script) for script in scripts)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def triton_beside() -> str:
    """The folder with Triton, for PYTHONPATH."""
    if not (TRITON / "triton").is_dir():
        pytest.skip(f"Triton is not in {TRITON}: `make test` fetches it, and could not")
    return str(TRITON)


def test_kernels_in_the_interpreter(triton_beside: str) -> None:
    scripts = ("attention.py", "forest.py", "sampling.py")
    run_pytest(scripts, PYTHONPATH=triton_beside, TRITON_INTERPRET="1")


@pytest.mark.full
def test_kernels_compile(triton_beside: str, tmp_path: Path) -> None:
    run_pytest(("compiled.py",), PYTHONPATH=triton_beside, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    pytest.importorskip("triton")
    run_pytest(("attention.py", "forest.py", "sampling.py"))
