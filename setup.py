# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Builds the C++ extension `echo_vllm/_C.abi3.so`; everything else is in pyproject.toml.

The library uses torch's stable ABI only: it needs torch's headers and libtorch to build, g++, and
neither Python's headers nor ninja. One copy serves every Python and every torch from 2.11 on.
Kernels of much arithmetic are compiled once per instruction set from one source; the right one is
chosen when it runs, so a library built on one machine runs on another.

Where torch is a CUDA build and nvcc is there, the CUDA kernels go into the same library: nvcc
compiles `csrc/cuda/*.cu`, which do not include torch, and links its runtime statically, so that the
library still loads beside a CPU build of torch.

Environment: `CXX` (default g++), `CXXFLAGS`, `MAX_JOBS` (default: the number of CPUs), `NVCC`
(default: that of `CUDA_HOME`, or of the path), `ECHO_CUDA` (1 or 0: with or without the CUDA
kernels, whatever torch is), `ECHO_CUDA_ARCHS` (default: see below).
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import re
import shlex
import shutil
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
    "csrc/cpu/draw_children.cpp",
    "csrc/cpu/draw_children_portable.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/large_blocks.cpp",
    "csrc/cpu/merge_attention.cpp",
    "csrc/cpu/packed_linear.cpp",
    "csrc/cpu/packed_linear_portable.cpp",
    "csrc/cpu/rms_norm.cpp",
    "csrc/cpu/sample_path.cpp",
    "csrc/cpu/sample_path_portable.cpp",
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
AMX_FLAGS = [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]

# A product is rounded before it is added, as in torch.
UNCONTRACTED = {
    "csrc/cpu/rms_norm_portable.cpp": ["-ffp-contract=off"],
}

CUDA_SOURCES = [
    "csrc/cuda/accept_path.cu",
    "csrc/cuda/commit_kv.cu",
    "csrc/cuda/merge_attention.cu",
    "csrc/cuda/sample_path.cu",
    "csrc/cuda/select_budget.cu",
    "csrc/cuda/super_tree.cu",
    "csrc/cuda/tree_attention.cu",
    "csrc/cuda/tree_attention_64.cu",
    "csrc/cuda/tree_attention_96.cu",
    "csrc/cuda/tree_attention_128.cu",
    "csrc/cuda/tree_attention_256.cu",
    "csrc/cuda/tree_attention_64_fp8.cu",
    "csrc/cuda/tree_attention_128_fp8.cu",
    "csrc/cuda/tree_attention_256_fp8.cu",
]

CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]

# Ampere, Hopper, Blackwell, and PTX for what comes later.
CUDA_ARCHS = "80,90a,100,100+ptx"

INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)

# Only these files may use more than the baseline instruction set.
X86_SOURCES = {
    "csrc/cpu/draw_children_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/draw_children_avx512.cpp": AVX512_FLAGS,
    "csrc/cpu/packed_linear_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/packed_linear_avx512.cpp": AVX512_FLAGS,
    "csrc/cpu/packed_linear_avx512_bf16.cpp": [*AVX512_FLAGS, "-mavx512bf16"],
    "csrc/cpu/packed_linear_amx.cpp": AMX_FLAGS,
    "csrc/cpu/rms_norm_avx2.cpp": ["-mavx2", "-mfma", "-ffp-contract=off"],
    "csrc/cpu/rms_norm_avx512.cpp": [*AVX512_FLAGS, "-ffp-contract=off"],
    "csrc/cpu/sample_path_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/sample_path_avx512.cpp": AVX512_FLAGS,
    "csrc/cpu/tree_attention_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/tree_attention_avx512.cpp": AVX512_FLAGS,
    "csrc/cpu/tree_attention_amx.cpp": AMX_FLAGS,
}


def compile_units() -> dict[str, list[str]]:
    """Source file -> flags of its own."""
    units: dict[str, list[str]] = {source: [] for source in SOURCES} | UNCONTRACTED
    if platform.machine() in ("x86_64", "AMD64"):
        units |= X86_SOURCES
    return units


def sources_of(source: Path) -> list[Path]:
    """A source and all files of ours that it includes, however deep."""
    found: dict[Path, None] = {}
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path] = None
        for name in INCLUDE.findall(path.read_text()):
            included = (path.parent / name).resolve()
            if included.exists():
                pending.append(included)
    return sorted(found)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    found = (shutil.which(name) for name in candidates if name)
    return next((path for path in found if path), None) or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_home(nvcc: str) -> Path:
    """The toolkit that nvcc works with; nvcc itself may be a link or a script elsewhere."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    for line in plan.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def cuda_arch_flags(archs: str) -> list[str]:
    """nvcc's -gencode for names such as `90a` (machine code) and `100+ptx` (PTX)."""
    flags = []
    for arch in archs.split(","):
        number, _, kind = arch.strip().partition("+")
        code = f"compute_{number}" if kind == "ptx" else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def cuda_compiler() -> str | None:
    """nvcc if the CUDA kernels are to be built."""
    import torch

    wanted = os.environ.get("ECHO_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"ECHO_CUDA must be unset, 0 or 1, got {wanted!r}")
    if wanted == "0" or (not wanted and torch.version.cuda is None):
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        message = "nvcc was not found: set CUDA_HOME or NVCC"
        if wanted == "1":
            raise SystemExit(f"ECHO_CUDA=1, but {message}")
        print(f"warning: torch has CUDA, but {message}; building the CPU kernels only")
    return nvcc


def compiler_command() -> list[str]:
    """The host's compiler with the flags of every source."""
    import torch

    torch_root = Path(torch.__file__).parent
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        *COMMON_FLAGS,
        f"-isystem{torch_root / 'include'}",
        f"-isystem{torch_root / 'include/torch/csrc/api/include'}",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]


def cuda_operators_command(nvcc: str) -> list[str]:
    """What compiles csrc/cuda/ops.cpp, which nvcc does not see."""
    return [*compiler_command(), f"-isystem{cuda_home(nvcc) / 'include'}"]


def link_command(objects: list[Path], library: Path, nvcc: str | None) -> list[str]:
    """What makes the library of these objects; `nvcc` is None without CUDA kernels."""
    import torch

    libraries = ["-ltorch", "-ltorch_cpu"]
    if nvcc:
        libraries += [
            f"-L{cuda_home(nvcc) / 'lib64'}",
            "-lcudart_static",
            "-ldl",
            "-lpthread",
            "-lrt",
        ]
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        "-shared",
        *map(str, objects),
        "-o",
        str(library),
        f"-L{Path(torch.__file__).parent / 'lib'}",
        "-Wl,--no-as-needed",
        *libraries,
    ]


class BuildExtension(build_ext):
    """Compiles with g++ directly: setuptools cannot give each source its own flags."""

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split("."))) + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        nvcc = cuda_compiler()
        archs = os.environ.get("ECHO_CUDA_ARCHS", CUDA_ARCHS)
        host = compiler_command()
        sources = {source: [*host, *own] for source, own in compile_units().items()}
        if nvcc:
            sources["csrc/cuda/ops.cpp"] = cuda_operators_command(nvcc)
            nvcc_command = [nvcc, *CUDA_FLAGS, *cuda_arch_flags(archs)]
            sources |= dict.fromkeys(CUDA_SOURCES, nvcc_command)
        objects: list[Path] = []
        commands: list[list[str]] = []
        for source, command in sources.items():
            made_for = archs.replace(",", "_") if source in CUDA_SOURCES else torch.__version__
            target = Path(self.build_temp) / f"{source}.{made_for}.o"
            objects.append(target)
            inputs = [*sources_of(ROOT / source), ROOT / "setup.py"]
            newest = max(path.stat().st_mtime for path in inputs)
            if not self.force and target.exists() and target.stat().st_mtime > newest:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            commands.append([*command, "-c", str(ROOT / source), "-o", str(target)])
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self._run, commands))

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside and renamed: a process that has the old library mapped keeps it intact.
        fresh = library.with_suffix(".new")
        self._run(link_command(objects, fresh, nvcc))
        fresh.replace(library)

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("echo_vllm._C", sources=list(compile_units()))],
    cmdclass={"build_ext": BuildExtension},
)
