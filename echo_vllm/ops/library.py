# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Loads the C++ extension and gives its operators their fake (meta) kernels.

The extension registers schemas and kernels with torch when it is loaded; torch then picks the
kernel by the device of the tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_PATH = Path(__file__).parent.parent / "_C.abi3.so"


@functools.cache
def load_library() -> None:
    """Loads the extension once; later calls do nothing.

    Raises RuntimeError if it has not been built or does not fit the installed torch.
    """
    if not LIBRARY_PATH.exists():
        raise RuntimeError(
            f"the C++ extension {LIBRARY_PATH} is not built: run `make setup` (or "
            "`python setup.py build_ext --inplace`) in the checkout of echo-vllm. "
            "ECHO_VLLM_OPS=reference runs without it, slowly"
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise RuntimeError(
            f"the C++ extension {LIBRARY_PATH} does not load with torch {torch.__version__} "
            f"({error}): build it again with `make setup` (or `python setup.py build_ext "
            "--inplace --force`); it needs torch >= 2.11"
        ) from error
    for op, fake in _FAKE_KERNELS.items():
        torch.library.register_fake(f"echo_vllm::{op}", fake)


def _writes_in_place(*arguments: object, **named: object) -> None:
    """Fake kernel of operators that return nothing."""


def _fake_build_super_tree(
    parents: Tensor, cu_nodes: Tensor, num_words: int
) -> tuple[Tensor, Tensor]:
    num_rows = parents.shape[0] + cu_nodes.shape[0] - 1
    return (
        parents.new_empty((num_rows, num_words), dtype=torch.int64),
        parents.new_empty((num_rows,), dtype=torch.int32),
    )


def _fake_accept_path(
    sampled: Tensor, token_ids: Tensor, parents: Tensor, cu_nodes: Tensor, max_depth: int
) -> tuple[Tensor, Tensor]:
    num_requests = cu_nodes.shape[0] - 1
    return (
        parents.new_empty((num_requests, max_depth + 1), dtype=torch.int32),
        parents.new_empty((num_requests,), dtype=torch.int32),
    )


def _fake_select_budget(
    scores: Tensor,
    tiers: Tensor,
    parents: Tensor,
    budget: int,
    max_per_request: int,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    num_requests, num_columns = scores.shape
    return (
        parents.new_empty((min(budget, num_requests * min(max_per_request, num_columns)),)),
        parents.new_empty((parents.shape[0] + 1,), dtype=torch.int32),
    )


def _fake_sample_path(
    target_logits: Tensor,
    target_rows: Tensor,
    draft_probs: Tensor,
    draft_rows: Tensor,
    draft_ids: Tensor | None,
    rules: Tensor,
    uniforms: Tensor,
    token_ids: Tensor,
    parents: Tensor,
    cu_nodes: Tensor,
    max_depth: int,
    temperatures: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_requests = cu_nodes.shape[0] - 1
    return (
        parents.new_empty((num_requests, max_depth + 1)),
        parents.new_empty((num_requests,)),
        parents.new_empty((num_requests,)),
    )


def _fake_packed_linear(
    x: Tensor, packed: Tensor, num_columns: int, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty((x.shape[0], num_columns))


def _fake_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


def _fake_draw_children(
    logits: Tensor,
    temperature: Tensor | None,
    keys: Tensor,
    k: int,
    scale: float,
    exponent: float,
) -> tuple[Tensor, ...]:
    rows = len(keys)
    worths = (rows, k if scale else 0)
    return (
        keys.new_empty((rows, k)),
        keys.new_empty((rows, k), dtype=torch.float32),
        keys.new_empty((rows, k)),
        keys.new_empty(logits.shape, dtype=torch.float32),
        keys.new_empty(worths, dtype=torch.float32),
        keys.new_empty(worths, dtype=torch.float32),
    )


_FAKE_KERNELS: dict[str, Callable[..., object]] = {
    "tree_attention": _writes_in_place,
    "suffix_attention": _writes_in_place,
    "merge_attention": _writes_in_place,
    "commit_kv": _writes_in_place,
    "build_super_tree": _fake_build_super_tree,
    "accept_path": _fake_accept_path,
    "select_budget": _fake_select_budget,
    "sample_path": _fake_sample_path,
    "packed_linear": _fake_packed_linear,
    "rms_norm": _fake_rms_norm,
    "draw_children": _fake_draw_children,
}
