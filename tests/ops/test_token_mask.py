# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`forbid_` against xgrammar's own kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xgrammar

from echo_vllm.ops.token_mask import forbid_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [64, 60, 70])
def test_masks_do_what_xgrammar_does_with_them(dtype: torch.dtype, vocab_size: int) -> None:
    """Also where the last word has bits beyond the vocabulary, and the vocabulary tokens beyond."""
    random = np.random.default_rng(vocab_size)
    allowed = random.integers(-(2**31), 2**31, (5, 2)).astype(np.int32)
    allowed[1], allowed[2] = 0, -1
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[3, 7] = -torch.inf
    wanted = logits.float()
    xgrammar.apply_token_bitmask_inplace(
        wanted[:, :64], torch.from_numpy(allowed), vocab_size=min(64, vocab_size)
    )
    whole = torch.cat([logits, logits])  # A part of a larger tensor, as a request's rows are.
    forbid_(whole[:5], allowed)
    assert torch.equal(whole[:5], wanted.to(dtype))
    assert torch.equal(whole[5:], logits)
