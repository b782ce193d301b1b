# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which requests get drawn candidates."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from echo_vllm.config import Candidates
from echo_vllm.step.drawn import DRAWN_FROM, is_drawn


@pytest.mark.parametrize(
    ("options", "who"),
    [
        ({"temperature": 0.0}, set()),
        ({"temperature": 0.4}, {"drawn"}),
        ({"temperature": DRAWN_FROM}, {"drawn", "auto"}),
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.05}, {"drawn", "auto"}),
        # With "auto" a seed gives the tokens of plain decoding.
        ({"temperature": 1.0, "seed": 7}, {"drawn"}),
        ({"temperature": 1.0, "repetition_penalty": 1.2, "logprobs": 1}, {"drawn", "auto"}),
        (
            {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(choice=["a", "b"])},
            set(),
        ),
    ],
)
def test_who_draws(options: dict[str, Any], who: set[Candidates]) -> None:
    params = SamplingParams(**options)
    kinds: tuple[Candidates, ...] = ("best", "drawn", "auto")
    assert {kind for kind in kinds if is_drawn(params, kind)} == who
