# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the workers of all devices have in common; `cpu.py` and `cuda.py` have one each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from echo_vllm.startup.measure import measured_cost
from echo_vllm.startup.validation import check_layers
from echo_vllm.step.attention.backend import TreeMetadataBuilder

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object


@contextmanager
def attention_backend(name: AttentionBackendEnum, backend: type) -> Iterator[None]:
    """Layers built inside get the class `backend` for `name`.

    Scoped, and past vLLM's cache, so that an engine without trees in the same process (tests,
    notebooks) keeps the stock backend, and a plug-in that has the name gets it back.
    """
    before = name.get_path() if name.is_overridden() else None
    register_backend(name, f"{backend.__module__}.{backend.__qualname__}")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        name.clear_override()
        if before is not None:
            register_backend(name, before)
        selector._cached_get_attn_backend.cache_clear()


class EchoWorkerMixin(_Worker):
    """A vLLM worker whose layers have a backend with trees, and that measures what steps cost."""

    def tree_backend(self) -> tuple[AttentionBackendEnum, type]:
        """vLLM's name for the backend of target and drafter, and the class that it stands for."""
        raise NotImplementedError

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with attention_backend(*self.tree_backend()):
            super().load_model(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        check_layers(layers, TreeMetadataBuilder)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if runner.drafter.policy.needs_cost:
            runner.cost = measured_cost(runner)
        return times

    def shutdown(self) -> None:
        recorder = getattr(getattr(self, "model_runner", None), "recorder", None)
        if recorder is not None:
            recorder.close()
        super().shutdown()
