# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Compiles csrc/cuda with the host's compiler against cuda_emulator.h, into one library."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent


def build_emulated_kernels() -> Path:
    """The library that registers `torch.ops.echo_vllm_emulated`; built anew if a source changed."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.c[up]*"))
    inputs = [*sources, *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "common").glob("*.h")]
    inputs += [ROOT / "csrc" / "cuda" / "kernels.h", HERE / "cuda_emulator.h"]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    folder = ROOT / ".build" / "emulated" / digest.hexdigest()[:16]
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    torch_root = Path(torch.__file__).parent
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wno-unknown-pragmas",
        "-DECHO_EMULATE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020B000000000000ULL",
        f"-I{HERE}",
        f"-isystem{torch_root / 'include'}",
        f"-isystem{torch_root / 'include/torch/csrc/api/include'}",
    ]
    objects = {path: folder / (path.name + ".o") for path in sources if path.suffix != ".cuh"}

    def compile_one(source: Path) -> None:
        command = [*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(objects[source])]
        subprocess.run(command, check=True)

    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        list(pool.map(compile_one, objects))
    fresh = folder / f"kernels.{os.getpid()}.so"
    linking = [*compiler, "-shared", *map(str, objects.values()), "-o", str(fresh)]
    linking += [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    subprocess.run(linking, check=True)
    fresh.replace(library)
    return library
