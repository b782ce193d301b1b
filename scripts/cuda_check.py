# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Compiles every CUDA kernel for every architecture, warnings as errors; needs nvcc but no GPU.

    python scripts/cuda_check.py [--jobs 2] [--archs 80,90a,100] [--out .build/cuda-check] [--link]

Prints a table of what each kernel takes of a multiprocessor, and fails if one spills registers; the
attention kernels of rare head sizes may, with a warning. Where there is no nvcc it says so and
succeeds. What compiled is kept, object and log, under a name made from all that went into it; only
what changed is compiled again. `--link` also makes the library that a CUDA build of torch would
get, with the CPU kernels of `setup.py`, and says how large it is. Called by
`make cuda-check`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
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
    setuptools: Any = importlib.import_module("setuptools")
    setuptools.setup = lambda **_: None
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


@dataclass(frozen=True)
class Unit:
    """One source to compile; `stem` of the files that are kept depends on all that goes in."""

    source: Path
    inputs: list[Path]  # the source and what it includes
    command: list[str]  # without the output
    folder: Path
    compiler: str  # the version

    @property
    def stem(self) -> str:
        digest = hashlib.sha256("\0".join([self.compiler, *self.command]).encode())
        for path in self.inputs:
            digest.update(f"\0{path.relative_to(ROOT)}\0".encode())
            digest.update(path.read_bytes())
        return f"{self.source.stem}.{digest.hexdigest()[:16]}"

    @property
    def object(self) -> Path:
        return self.folder / f"{self.stem}.o"

    def compile(self) -> tuple[int, str, bool]:
        """Status and log, and whether they are those of an earlier run."""
        kept = self.folder / f"{self.stem}.log"
        if kept.exists() and self.object.exists():
            return 0, kept.read_text(), True
        for stale in self.folder.glob(f"{self.source.stem}.*"):
            stale.unlink(missing_ok=True)
        # Under another name until it is whole: two checks may run at a time.
        fresh = self.folder / f"{self.source.stem}-{os.getpid()}.o"
        command = [*self.command, "-o", str(fresh)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        log = result.stdout + result.stderr
        if result.returncode == 0:
            fresh.replace(self.object)
            kept.write_text(log)
        return result.returncode, log, False


def link(settings: dict[str, Any], nvcc: str, units: list[Unit], folder: Path) -> Path:
    """The extension with all kernels, from what was compiled here and by setup.py."""
    import torch

    names = [f"{name}.{torch.__version__}.o" for name in settings["compile_units"]()]
    of_cpu = [sorted(ROOT.glob(f"build/temp*/{name}")) for name in names]
    if not all(of_cpu):  # An editable installation keeps no objects.
        build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib")]
        subprocess.run(build, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        of_cpu = [sorted(ROOT.glob(f"build/temp*/{name}")) for name in names]
    operators = folder / "ops.o"
    source = ROOT / "csrc" / "cuda" / "ops.cpp"
    command = [*settings["cuda_operators_command"](nvcc), "-c", str(source), "-o", str(operators)]
    subprocess.run(command, check=True)
    library = folder / "_C_cuda.abi3.so"
    objects = [*(found[-1] for found in of_cpu), operators, *(unit.object for unit in units)]
    subprocess.run(settings["link_command"](objects, library, nvcc), check=True)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or 2))
    parser.add_argument("--archs", help="default: those of setup.py, or ECHO_CUDA_ARCHS")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "cuda-check")
    parser.add_argument("--link", action="store_true", help="make the whole library as well")
    options = parser.parse_args()
    settings = build_settings()
    nvcc = settings["find_nvcc"]()
    if nvcc is None:
        print("cuda-check: skipped, nvcc was not found (set CUDA_HOME or NVCC)")
        return 0
    archs = options.archs or os.environ.get("ECHO_CUDA_ARCHS") or settings["CUDA_ARCHS"]
    options.out.mkdir(parents=True, exist_ok=True)
    flags = [*settings["CUDA_FLAGS"], *WARNINGS, *settings["cuda_arch_flags"](archs)]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    units = [
        Unit(
            ROOT / source,
            settings["sources_of"](ROOT / source),
            [nvcc, *flags, "-c", str(ROOT / source)],
            options.out,
            version,
        )
        for source in settings["CUDA_SOURCES"]
    ]
    begin = time.perf_counter()
    usages: list[Usage] = []
    failed = False
    num_kept = 0
    # The longest first, so that none is left alone at the end.
    units.sort(key=lambda unit: not unit.source.stem.startswith("tree_attention"))
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(Unit.compile, units)
        for unit, (code, log, was_kept) in zip(units, results, strict=True):
            usages += parse(log)
            num_kept += was_kept
            if code != 0:
                failed = True
                print(f"cuda-check: failed: {shlex.join(unit.command)}\n{log}", file=sys.stderr)
    names = readable(sorted({usage.kernel for usage in usages}))
    print(f"{'kernel':58} {'arch':>8} {'registers':>9} {'shared':>7} {'spilled':>7}")
    for usage in sorted(usages, key=lambda usage: (names[usage.kernel], usage.arch)):
        print(
            f"{names[usage.kernel]:58} {usage.arch:>8} {usage.registers:9} "
            f"{usage.shared_bytes:7} {usage.spilled_bytes:7}"
        )
    size = sum(unit.object.stat().st_size for unit in units if unit.object.exists())
    print(
        f"cuda-check: {len(units)} files for {archs} ({num_kept} as compiled before), "
        f"{size / 2**20:.1f} MiB of objects, {time.perf_counter() - begin:.0f} s"
    )
    if options.link and not failed:
        library = link(settings, nvcc, units, options.out)
        print(f"cuda-check: {library}: {library.stat().st_size / 2**20:.1f} MiB")
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
