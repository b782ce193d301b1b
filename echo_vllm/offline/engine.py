# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A real engine inside this process, for as long as a `with` block."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def prepare_environment(model: str | Path) -> None:
    """Have vLLM, when it is imported, keep the engine core in this process, warn only, and for a
    model in a folder not look at the network; the last two where the environment does not say
    otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def local_llm(model: str | Path, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` whose engine core lives in this process; torn down at the end.

    The environment is that of `prepare_environment`, with 1 GiB of KV cache where it does not say
    otherwise.

    Args:
        model: a folder or a name.
        options: of `vllm.LLM`; eager mode unless they say otherwise.

    Raises:
        ValueError, OSError, RuntimeError: vLLM's own, if the model does not load.
    """
    prepare_environment(model)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(model), **{"enforce_eager": True, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
