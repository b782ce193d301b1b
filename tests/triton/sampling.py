# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""sample_path in Triton against the reference; run by test_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from echo_vllm.ops import triton_kernels
from echo_vllm.ops.triton_kernels.attention import INTERPRETED
from tests.ops.drawn_cases import KINDS, assert_same_path, cases, make_case

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_decides_as_the_reference(kind: str) -> None:
    for case in cases(kind, 2 if INTERPRETED else 40):
        assert_same_path(triton_kernels.sample_path, case, DEVICE)


def test_what_does_not_fit_is_refused() -> None:
    arguments: list[Any] = list(make_case(0, trees=[[-1]]).arguments())
    for place, wrong, message in (
        (0, torch.zeros(2, 40).double(), "target_logits must be a float32 matrix"),
        (6, torch.zeros(2), r"uniforms must be a contiguous torch.float64 \[2\]"),
        (2, torch.zeros(2, 39), "without draft_ids the vocabularies must be one"),
        (10, -1, "max_depth must be >= 0"),
    ):
        changed = [*arguments[:place], wrong, *arguments[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            triton_kernels.sample_path(*changed)
