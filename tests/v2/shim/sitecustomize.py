# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Lets vLLM's Model Runner V2 run on a CPU, for functional tests.

Python imports this module at the start of every process that has this folder on PYTHONPATH, the
engine core and the workers among them; `tests.v2.on_cpu` puts it there, with Triton and the
environment that goes with it. vLLM itself brings the pretended CUDA streams, events and pinned
memory (`vllm/v1/worker/cpu/shm.py`). What is missing is done here, each when its module is
imported, so that a process without vLLM pays nothing:

- Triton's interpreter counts as a CPU backend, which vLLM asks for before it uses Triton;
- asynchronous scheduling is left as the user wants it, where vLLM switches it off on a CPU;
- top-k and top-p are vLLM's torch version: the interpreter cannot run the Triton one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Change = Callable[[Any], None]


class InterpreterDriver:
    """What vLLM asks of a Triton backend's driver."""

    @staticmethod
    def is_active() -> bool:
        return True


class InterpreterBackend:
    """The backend "cpu" that vLLM looks for; with TRITON_INTERPRET=1 nobody compiles with it."""

    driver = InterpreterDriver


def add_cpu_backend(backends: Any) -> None:
    backends.backends["cpu"] = InterpreterBackend


def keep_async_scheduling(cpu: Any) -> None:
    stock = cpu.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    cpu.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def leave_triton(sampler: Any) -> None:
    sampler.HAS_TRITON = False


class ChangeOnImport(MetaPathFinder):
    """Calls each change with its module, once, right after the module was imported."""

    def __init__(self, changes: dict[str, Change]) -> None:
        self.changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = self.changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


CHANGES: dict[str, Change] = {
    "triton.backends": add_cpu_backend,
    "vllm.platforms.cpu": keep_async_scheduling,
    "vllm.v1.sample.ops.topk_topp_sampler": leave_triton,
}
sys.meta_path.insert(0, ChangeOnImport(CHANGES))
