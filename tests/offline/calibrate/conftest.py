# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A trace with known survival, and what calibration makes of it; both are made once."""

from __future__ import annotations

import pytest

from echo_vllm.offline.calibrate.fit import Calibration, fit
from echo_vllm.offline.calibrate.samples import collect
from echo_vllm.trace_format import TraceStep
from tests.offline.calibrate.synthetic import trace


@pytest.fixture(scope="session")
def steps() -> list[TraceStep]:
    """3,000 trees of 20 requests, 30 nodes each."""
    return trace(num_requests=20, num_steps=150)


@pytest.fixture(scope="session")
def calibration(steps: list[TraceStep]) -> Calibration:
    samples = collect(steps, num_nodes=30)
    return fit(samples, target="target", drafter="head", dtype="float32", prompts="synthetic")
