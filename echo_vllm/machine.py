# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What this machine's processor is good at, and where it keeps what is made once. Imports nothing
else, so that shell scripts may ask."""

from __future__ import annotations

import os
from pathlib import Path

BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16"})
"""Names in /proc/cpuinfo, on x86 and Arm, of instructions that multiply or convert bfloat16."""


def cache_folder() -> Path:
    """`ECHO_VLLM_CACHE`, or else `echo-vllm` in the user's XDG cache folder."""
    override = os.environ.get("ECHO_VLLM_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echo-vllm"


def fast_dtype(cpuinfo: str | None = None) -> str:
    """`bfloat16` where the processor has instructions for it, else `float32`.

    Without them every product of matrices converts number by number, and takes several times as
    long as in float32, whatever the number of rows: nothing is gained by verifying more at once.

    Args:
        cpuinfo: the text of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:  # not Linux
            return "bfloat16"
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return "float32" if BFLOAT16_FLAGS.isdisjoint(value.split()) else "bfloat16"
    return "bfloat16"


if __name__ == "__main__":
    print(fast_dtype())
