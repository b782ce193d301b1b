# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What can be seen of the CUDA route on a machine without a GPU, after `make setup VARIANT=cuda`.

    .venv/bin/python scripts/cuda_route.py

Checks that the extension's CUDA kernels are registered beside the CUDA build of torch, and that the
real vLLM for CUDA, told that its platform is one A100, takes the config of tree speculation: our
worker, our scheduler, our attention backend over FlashAttention, the V1 runner. Computes nothing.

vLLM's libraries ask for NVIDIA's driver library as soon as they are loaded. Where there is none, an
empty one with the names that they ask for is compiled; it answers every call with an error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRIVER = "libcuda.so.1"
STUBBED = "ECHO_VLLM_STUB_DRIVER"


def has_driver() -> bool:
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def make_driver(folder: Path) -> None:
    """Compile an empty driver library with all names that vLLM's libraries ask for."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    names: set[str] = set()
    for place in spec.submodule_search_locations:
        for library in Path(place).rglob("*.so"):
            listed = subprocess.run(
                ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True
            )
            names.update(re.findall(r" U (cu[A-Z]\w+)", listed.stdout))
    not_the_drivers = re.compile(r"cu(blas|sparse|rand|solver|fft|da[A-Z])")
    wanted = sorted(name for name in names if not not_the_drivers.match(name))
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in wanted))
    subprocess.run(
        [
            *("gcc", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}"),
            *("-o", str(folder / DRIVER), str(source)),
        ],
        check=True,
    )


def check_operators() -> None:
    import torch

    from echo_vllm import ops
    from echo_vllm.ops.dispatch import ORDER

    assert torch.version.cuda, f"torch {torch.__version__} is no CUDA build"
    ops.load_library()
    names = sorted(ORDER)
    for name in names:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"echo_vllm::{name}", "CUDA")
        assert registered, f"echo_vllm::{name} has no CUDA kernel"
    cuda = torch.version.cuda
    print(f"torch {torch.__version__}, CUDA {cuda}: CUDA kernels of {', '.join(names)}")


def check_engine_config() -> None:
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class OneA100(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(8, 0)

        @classmethod
        def has_device_capability(cls, capability: object, device_id: int = 0) -> bool:
            return True

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA A100"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

    vllm.platforms._current_platform = OneA100()
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # With a GPU there is Triton, and with Triton vLLM would prefer Model Runner V2.
    sys.modules["vllm.config.vllm"].HAS_TRITON = True  # type: ignore[attr-defined]
    speculation = {
        "method": "echo",
        "model": str(ROOT / "models" / "smollm2-135m-eagle3"),
        "num_speculative_tokens": 16,
    }
    config = EngineArgs(
        model=str(ROOT / "models" / "smollm2-135m-instruct"), speculative_config=speculation
    ).create_engine_config()
    assert config.parallel_config.worker_cls == "echo_vllm.step.v1.cuda.EchoWorker"
    assert not config.use_v2_model_runner
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from echo_vllm.step.attention.cuda import backend_for
    from echo_vllm.step.v1.cuda import EchoGPUModelRunner, EchoWorker

    backend = backend_for(config.model_config.dtype)
    assert issubclass(backend, FlashAttentionBackend)
    for abstract in (EchoGPUModelRunner, EchoWorker, backend.get_impl_cls()):
        missing = getattr(abstract, "__abstractmethods__", frozenset())
        assert not missing, f"{abstract.__name__} lacks {sorted(missing)}"
    scheduler = config.scheduler_config.scheduler_cls
    print(
        f"vLLM for CUDA takes the config: {config.parallel_config.worker_cls}, "
        f"{scheduler.__name__ if isinstance(scheduler, type) else scheduler}, "
        f"{backend.__name__}, graphs {config.compilation_config.cudagraph_mode.name}, "
        "V1 model runner"
    )


def main() -> int:
    if not has_driver() and STUBBED not in os.environ:
        with tempfile.TemporaryDirectory(prefix="echo-driver-") as folder:
            make_driver(Path(folder))
            path = ":".join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
            env = {**os.environ, "LD_LIBRARY_PATH": path, STUBBED: "1"}
            env.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            return subprocess.run([sys.executable, __file__], env=env).returncode
    check_operators()
    check_engine_config()
    return 0


if __name__ == "__main__":
    sys.exit(main())
