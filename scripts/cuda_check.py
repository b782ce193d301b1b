# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Compiles every CUDA kernel for every architecture, warnings as errors; needs nvcc but no GPU.

    python scripts/cuda_check.py [--jobs 2] [--archs 80,90a,100] [--out .build/cuda-check]

Prints a table of what each kernel takes of a multiprocessor, and fails if one spills registers; the
attention kernels of rare head sizes may, with a warning. Where there is no nvcc it says so and
succeeds. Called by `make cuda-check`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

WARNINGS = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v"]

# Lines of ptxas -v, for one kernel in this order.
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")

# Head sizes that few models have: a few spilled registers there are not worth a smaller tile.
RARE = re.compile(r"tree_attention_mma_kernel<<\w+, (96|256),")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    shared_bytes: int  # static; what a launch asks for comes on top
    spilled_bytes: int


def build_settings() -> dict[str, Any]:
    """The globals of setup.py: one list of sources and flags serves both."""
    sys.path.insert(0, str(ROOT))
    import setuptools

    setuptools.setup = lambda **_: None  # type: ignore[assignment]
    return runpy.run_path(str(ROOT / "setup.py"))


def parse(log: str) -> list[Usage]:
    """The kernels of a ptxas log, mangled."""
    usages = []
    kernel = arch = ""
    spilled = 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            kernel, arch = match.groups()
            spilled = 0
        elif match := SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := USED.search(line)) and kernel:
            usages.append(Usage(kernel, arch, int(match[1]), int(match[2] or 0), spilled))
            kernel = ""
    return usages


def readable(names: list[str]) -> dict[str, str]:
    """Mangled -> short names."""
    try:
        result = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {name: name for name in names}
    short = {}
    for name, full in zip(names, result.stdout.splitlines(), strict=True):
        text = full.replace("(anonymous namespace)::", "").replace("echo_vllm::cuda::", "")
        short[name] = text.removeprefix("void ").partition("(")[0].replace("MmaTraits", "")
    return short


def compile_one(command: list[str]) -> tuple[int, str]:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return result.returncode, result.stdout + result.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or 2))
    parser.add_argument("--archs", help="default: those of setup.py, or ECHO_CUDA_ARCHS")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "cuda-check")
    options = parser.parse_args()
    settings = build_settings()
    nvcc = settings["find_nvcc"]()
    if nvcc is None:
        print("cuda-check: skipped, nvcc was not found (set CUDA_HOME or NVCC)")
        return 0
    archs = options.archs or os.environ.get("ECHO_CUDA_ARCHS") or settings["CUDA_ARCHS"]
    options.out.mkdir(parents=True, exist_ok=True)
    objects = {
        source: options.out / (Path(source).stem + ".o") for source in settings["CUDA_SOURCES"]
    }
    flags = [*settings["CUDA_FLAGS"], *WARNINGS, *settings["cuda_arch_flags"](archs)]
    commands = [
        [nvcc, *flags, "-c", str(ROOT / source), "-o", str(target)]
        for source, target in objects.items()
    ]
    begin = time.perf_counter()
    usages: list[Usage] = []
    failed = False
    # The longest first, so that none is left alone at the end.
    commands.sort(key=lambda command: "tree_attention_" not in command[-3])
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for command, (code, log) in zip(commands, pool.map(compile_one, commands), strict=True):
            usages += parse(log)
            if code != 0:
                failed = True
                print(f"cuda-check: failed: {shlex.join(command)}\n{log}", file=sys.stderr)
    names = readable(sorted({usage.kernel for usage in usages}))
    print(f"{'kernel':58} {'arch':>8} {'registers':>9} {'shared':>7} {'spilled':>7}")
    for usage in sorted(usages, key=lambda usage: (names[usage.kernel], usage.arch)):
        print(
            f"{names[usage.kernel]:58} {usage.arch:>8} {usage.registers:9} "
            f"{usage.shared_bytes:7} {usage.spilled_bytes:7}"
        )
    size = sum(target.stat().st_size for target in objects.values() if target.exists())
    print(
        f"cuda-check: {len(objects)} files for {archs}, {size / 2**20:.1f} MiB of objects, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    spilling = [usage for usage in usages if usage.spilled_bytes > 0]
    for usage in spilling:
        print(
            f"cuda-check: {names[usage.kernel]} spills {usage.spilled_bytes} bytes of registers on "
            f"{usage.arch}",
            file=sys.stderr,
        )
    refused = [usage for usage in spilling if not RARE.match(names[usage.kernel])]
    return 1 if failed or refused or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
