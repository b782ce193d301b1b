# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The published step costs give back the numbers that they were made from."""

from __future__ import annotations

import numpy as np
import pytest

from echo_vllm.offline.trace.published import (
    DRAFTER_SHARE,
    EAGLE3_BATCHES,
    EAGLE3_RATIOS,
    PUBLISHED,
    eagle3_h100,
    echo_8xh100,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_names_its_sources_and_assumptions(name: str) -> None:
    found = PUBLISHED[name]()
    assert found.name == name
    assert found.sources
    assert found.assumptions
    seconds = found.cost.verify(np.arange(1, 5000))
    assert (np.diff(seconds) >= 0).all()


def test_a_chain_of_three_has_the_published_ratios() -> None:
    cost = eagle3_h100().cost
    tokens = EAGLE3_RATIOS[0] * (1 + 3 * DRAFTER_SHARE)  # at batch size 2 rows are free
    for batch, ratio in zip(EAGLE3_BATCHES, EAGLE3_RATIOS, strict=True):
        step = cost.step(4 * batch, [batch, batch], batch)
        assert tokens * cost.plain_step(batch) / step == pytest.approx(ratio, rel=0.01)


def test_plain_decoding_has_the_published_speed() -> None:
    assert 1 / eagle3_h100().cost.plain_step(1) == pytest.approx(158.34, rel=0.005)


def test_rows_beyond_what_was_measured_are_not_free() -> None:
    verify = eagle3_h100().cost.verify
    assert verify(512) > 1.3 * verify(256)
    assert verify(1024) > 1.3 * verify(512)


def test_eagle3_under_the_hinge_has_the_published_throughput() -> None:
    cost = echo_8xh100().cost

    def eagle3(requests: int) -> float:
        return requests * 2.5 / cost.step(requests * 6, [requests, requests], requests)

    assert eagle3(256) == pytest.approx(10_703)
    assert eagle3(128) == pytest.approx(128 / cost.plain_step(128)), "the assumed break-even"
    assert eagle3(256) < 256 / cost.plain_step(256)
