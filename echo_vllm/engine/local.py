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


@contextmanager
def local_llm(model: str | Path, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` whose engine core lives in this process; torn down at the end.

    The environment is set for it where it does not say otherwise: 1 GiB of KV cache, warnings only,
    and for a model in a folder no look at the network.

    Args:
        model: a folder or a name.
        options: of `vllm.LLM`; eager mode unless they say otherwise.

    Raises:
        ValueError, OSError, RuntimeError: vLLM's own, if the model does not load.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
