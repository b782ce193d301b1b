# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The environment in which vLLM's Model Runner V2 runs on a CPU, in Triton's interpreter.

    python -m tests.v2.on_cpu -m pytest tests/v2/stock.py

runs Python with these arguments in it. It is for tests of what the step does: a token of the
tests' tiny model takes some 30 to 90 ms there, nearly all of it in the interpreter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / ".build" / "triton"
SHIM = Path(__file__).parent / "shim"


def environment() -> dict[str, str]:
    """Variables for a process whose engines are to run on V2; its own processes inherit them.

    Raises:
        FileNotFoundError: where the set-up could not fetch Triton.
    """
    if not (TRITON / "triton").is_dir():
        raise FileNotFoundError(f"Triton is not in {TRITON}: `make test-v2` fetches it")
    return {
        "PYTHONPATH": os.pathsep.join([str(SHIM), str(TRITON)]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


if __name__ == "__main__":
    arguments = [sys.executable, *sys.argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **environment()})
