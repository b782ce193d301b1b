# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What this machine's processor is and is good at.

Of the standard library only, so that shell scripts may ask. What py-cpuinfo says beyond
/proc/cpuinfo takes it a second or two, for which every command line would wait.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16"})
"""Names, on x86 and Arm, of instructions that multiply or convert bfloat16."""


@functools.cache
def _first_processor() -> dict[str, str]:
    """What the system says of the first one; nothing where it is not Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    return _first_processor().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Names of the processor's instruction sets; empty where they are not known."""
    known = _first_processor()
    return frozenset((known.get("flags") or known.get("Features") or "").split())


def describe_cpu() -> str:
    """Model and number of logical processors."""
    return f"{cpu_model()} x{os.cpu_count()}"


def fast_dtype() -> str:
    """`bfloat16` where the processor has instructions for it or nobody knows, else `float32`.

    Without them every product of matrices converts number by number, and takes several times as
    long as in float32, whatever the number of rows: nothing is gained by verifying more at once.
    """
    flags = cpu_flags()
    return "float32" if flags and BFLOAT16_FLAGS.isdisjoint(flags) else "bfloat16"


if __name__ == "__main__":
    print(fast_dtype())
