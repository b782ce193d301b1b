# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The block-wise argmax of verification is torch's argmax."""

from __future__ import annotations

import pytest
import torch

from echo_vllm.ops.argmax import argmax_of_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [1, 24, 1023, 1024, 1025, 2048, 50_001])
def test_argmax_of_rows_is_the_first_maximum(num_columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    # Few distinct values, so that most rows have several maxima.
    logits = torch.randint(0, 5, (40, num_columns), generator=generator).to(dtype)
    logits[0] = float("-inf")
    assert torch.equal(argmax_of_rows(logits), logits.argmax(1))
    noise = torch.randn(40, num_columns, generator=generator).to(dtype)
    assert torch.equal(argmax_of_rows(noise), noise.argmax(1))


def test_argmax_of_rows_takes_no_rows() -> None:
    assert argmax_of_rows(torch.zeros(0, 100)).shape == (0,)
