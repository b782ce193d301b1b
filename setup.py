# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Builds the C++ extension `echo_vllm/_C.abi3.so`; everything else is in pyproject.toml.

The library uses torch's stable ABI only: it needs torch's headers and libtorch to build, g++, and
neither Python's headers nor ninja. One copy serves every Python and every torch from 2.11 on.
The attention kernel is compiled once per instruction set from one source; the right one is chosen
when it runs, so a library built on one machine runs on another.

Environment: `CXX` (default g++), `CXXFLAGS`, `MAX_JOBS` (default: the number of CPUs).
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# torch 2.11: the oldest stable ABI that has what we use.
TORCH_TARGET_VERSION = "0x020B000000000000ULL"

COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors wider than the baseline never cross a call
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cpu/accept_path.cpp",
    "csrc/cpu/commit_kv.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/select_budget.cpp",
    "csrc/cpu/super_tree.cpp",
    "csrc/cpu/tree_attention.cpp",
    "csrc/cpu/tree_attention_portable.cpp",
]

AVX512_FLAGS = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mfma",
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",  # GCC's own AVX-512 header sets it off
]

# Only these files may use more than the baseline instruction set.
X86_SOURCES = {
    "csrc/cpu/tree_attention_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/tree_attention_avx512.cpp": AVX512_FLAGS,
    "csrc/cpu/tree_attention_amx.cpp": [
        *AVX512_FLAGS,
        "-mavx512bf16",
        "-mamx-tile",
        "-mamx-bf16",
    ],
}


def compile_units() -> dict[str, list[str]]:
    """Source file -> flags of its own."""
    units: dict[str, list[str]] = {source: [] for source in SOURCES}
    if platform.machine() in ("x86_64", "AMD64"):
        units |= X86_SOURCES
    return units


class BuildExtension(build_ext):
    """Compiles with g++ directly: setuptools cannot give each source its own flags."""

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split("."))) + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        torch_root = Path(torch.__file__).parent
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        flags = [
            *COMMON_FLAGS,
            f"-isystem{torch_root / 'include'}",
            f"-isystem{torch_root / 'include/torch/csrc/api/include'}",
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        headers = [*ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"]
        newest_header = max(path.stat().st_mtime for path in headers)
        objects: list[Path] = []
        commands: list[list[str]] = []
        for source, own_flags in compile_units().items():
            target = Path(self.build_temp) / (source + f".torch{torch.__version__}.o")
            objects.append(target)
            newest = max(newest_header, (ROOT / source).stat().st_mtime)
            if not self.force and target.exists() and target.stat().st_mtime > newest:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            commands.append(
                [*compiler, *flags, *own_flags, "-c", str(ROOT / source), "-o", str(target)]
            )
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self._run, commands))

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside and renamed: a process that has the old library mapped keeps it intact.
        fresh = library.with_suffix(".new")
        self._run(
            [
                *compiler,
                "-shared",
                *map(str, objects),
                "-o",
                str(fresh),
                f"-L{torch_root / 'lib'}",
                "-Wl,--no-as-needed",
                "-ltorch",
                "-ltorch_cpu",
            ]
        )
        fresh.replace(library)

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("echo_vllm._C", sources=list(compile_units()))],
    cmdclass={"build_ext": BuildExtension},
)
