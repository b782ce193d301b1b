# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How the sizes of drafted trees come to the scheduler without anybody waiting for them.

A drafting ends after its step's tokens are on their way to the host, so its sizes go with the
tokens of the step behind it. They are copied on the stream that copies tokens: where the tokens
have arrived, the sizes have.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np, stream


class TreeSizes:
    """Nodes of the trees of one drafting, on their way to the host.

    Args:
        req_ids: of its R requests.
        sizes: [R] int32, on the device.
        main_stream, copy_stream: the step's, and the one that copies its tokens.
    """

    def __init__(
        self, req_ids: list[str], sizes: torch.Tensor, main_stream: Any, copy_stream: Any
    ) -> None:
        self._req_ids = req_ids
        self._there = sizes  # Kept, because the copy reads it on another stream.
        with stream(copy_stream, main_stream):
            copy_stream.wait_stream(main_stream)
            self._sizes = async_copy_to_np(sizes)

    def arrived(self) -> dict[str, int]:
        """Request -> nodes, for those that have any."""
        sizes = zip(self._req_ids, self._sizes.tolist(), strict=True)
        return {req_id: size for req_id, size in sizes if size}


class OutputWithSizes(AsyncModelRunnerOutput):
    """A step's output that brings along, as `echo_sizes`, what was drafted before the step."""

    def __init__(self, output: AsyncModelRunnerOutput, sizes: TreeSizes) -> None:
        self._output = output
        self._sizes = sizes

    def get_output(self) -> Any:
        result: Any = self._output.get_output()
        result.echo_sizes = self._sizes.arrived()
        return result

    def get_kv_connector_output(self) -> Any:
        """Asked for by vLLM 0.33.0."""
        return self._output.get_kv_connector_output()


def sizes_of(model_runner_output: Any) -> dict[str, int] | None:
    """Request -> nodes that were drafted for it, as far as this output knows; None for nothing."""
    return getattr(model_runner_output, "echo_sizes", None)
