# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Survival curves and their correction while the engine runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.forecast.survival import LOWEST, RESOLUTION, OnlineSurvival, SurvivalModel

CURVES = [
    ((-9.0, -3.0, -1.0, -0.125), (0.001, 0.1, 0.5, 0.8)),
    ((-8.0, -0.5), (0.0, 0.4)),
    ((-2.0,), (0.25,)),
]


def test_curves_are_linear_between_knots_and_constant_outside() -> None:
    model = SurvivalModel(CURVES)
    logprobs = torch.tensor([-20.0, -9.0, -6.0, -2.0, -1.0, -0.125, 0.0])
    found = model.probability(logprobs, torch.ones(7, dtype=torch.int64))
    wanted = [0.001, 0.001, 0.0505, 0.3, 0.5, 0.8, 0.8]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert found.dtype == torch.float32


def test_no_node_has_no_chance() -> None:
    depths = torch.tensor([1, 2, 3])
    logprobs = torch.full((2, 3), -torch.inf)
    factors = torch.tensor([4.0])
    for model in (SurvivalModel(CURVES), SurvivalModel.default(2)):
        assert not model.probability(logprobs, depths).any()
        assert not model.with_factors(factors).probability(logprobs, depths).any()


def test_a_depth_without_a_curve_takes_the_last_one() -> None:
    model = SurvivalModel(CURVES[:2])
    found = model.probability(torch.tensor([-0.5, -0.5, -0.5]), torch.tensor([2, 3, 32]))
    assert found.tolist() == pytest.approx([0.4] * 3)


@st.composite
def curves(draw: st.DrawFn) -> tuple[tuple[float, ...], tuple[float, ...]]:
    size = draw(st.integers(1, 24))
    places = st.lists(st.integers(-3000, 0), min_size=size, max_size=size, unique=True)
    chances = st.lists(st.floats(0, 1), min_size=size, max_size=size)
    return (
        tuple(sorted(place / 100 for place in draw(places))),
        tuple(sorted(draw(chances))),
    )


@given(
    st.lists(curves(), min_size=1, max_size=5),
    st.lists(st.tuples(st.floats(LOWEST, 0.0, width=32), st.integers(1, 8)), min_size=1),
)
def test_every_node_gets_its_own_depths_curve(
    knots: list[tuple[tuple[float, ...], tuple[float, ...]]], nodes: list[tuple[float, int]]
) -> None:
    """Against numpy, one node at a time, at the grid point nearest to it."""
    logprobs = torch.tensor([[x for x, _ in nodes]] * 2)
    depths = torch.tensor([d for _, d in nodes])
    found = SurvivalModel(knots).probability(logprobs, depths)
    assert torch.equal(found[0], found[1])
    for (x, depth), p in zip(nodes, found[0].tolist(), strict=True):
        # A knot on the way from a grid point to the next is cut off, at most by the whole slope.
        xs, ps = knots[min(depth, len(knots)) - 1]
        around = np.interp([x - 1 / RESOLUTION, x + 1 / RESOLUTION], xs, ps)
        assert around[0] - 1e-6 <= p <= around[1] + 1e-6


@given(curves(), st.lists(st.floats(-40, 0, width=32), min_size=2))
def test_a_better_path_is_never_less_probable(
    knots: tuple[tuple[float, ...], tuple[float, ...]], logprobs: list[float]
) -> None:
    model = SurvivalModel([knots])
    found = model.probability(
        torch.tensor(sorted(logprobs)), torch.ones(len(logprobs), dtype=torch.int64)
    )
    assert (found.diff() >= 0).all()


def test_without_a_profile_the_drafter_is_believed() -> None:
    logprobs = -torch.rand(3, 7, 11) * 20
    found = SurvivalModel.default(4).probability(logprobs, torch.arange(11) // 3 + 1)
    assert torch.equal(found, logprobs.exp())


def test_any_layout_of_the_scores_will_do() -> None:
    model, depths = SurvivalModel(CURVES), torch.tensor([1, 1, 2, 3])
    logprobs = -torch.rand(4, 5) * 9
    plain = model.probability(logprobs.t().contiguous(), depths)
    assert torch.equal(model.probability(logprobs.t(), depths), plain)
    assert logprobs.max() <= 0  # The caller's scores are as they were.
    assert torch.equal(model.probability(logprobs.t()[3], depths), plain[3])


@pytest.mark.parametrize("model", [SurvivalModel(CURVES), SurvivalModel.default(3)])
def test_factors_scale_each_depth_and_stop_at_one(model: SurvivalModel) -> None:
    depths = torch.tensor([1, 1, 2, 3, 4])
    logprobs = torch.tensor([[-0.1, -5.0, -2.0, -1.5, -1.5]])
    plain = model.probability(logprobs, depths)
    scaled = model.with_factors(torch.tensor([4.0, 0.5])).probability(logprobs, depths)
    wanted = (plain * torch.tensor([4.0, 4.0, 0.5, 0.5, 0.5])).clamp(max=1)
    assert scaled.tolist() == [pytest.approx(row) for row in wanted.tolist()]
    assert scaled[0, 0] == 1
    assert torch.equal(model.probability(logprobs, depths), plain)
    # More factors than curves: the last curve, each depth its own factor.
    deep = model.with_factors(torch.tensor([1.0, 1.0, 1.0, 0.25])).probability(logprobs, depths)
    assert deep[0, 4] == pytest.approx(plain[0, 4].item() / 4)


def test_a_model_can_be_moved() -> None:
    model = SurvivalModel(CURVES).with_factors(torch.tensor([2.0])).to("meta")
    found = model.probability(
        torch.zeros(2, 3, device="meta"), torch.ones(3, dtype=torch.int64, device="meta")
    )
    assert (found.device.type, found.shape) == ("meta", (2, 3))


@pytest.mark.parametrize("bad", [[], [((), ())], [((-1.0,), (0.1, 0.2))]])
def test_curves_without_sense_are_refused(
    bad: list[tuple[tuple[float, ...], tuple[float, ...]]],
) -> None:
    with pytest.raises(ValueError, match="at least one"):
        SurvivalModel(bad)


def test_the_correction_finds_the_true_ratio_and_follows_it() -> None:
    online = OnlineSurvival(3)
    assert online.factors() == [1.0, 1.0, 1.0]
    generator = np.random.default_rng(0)
    for true in (0.5, 1.8):
        for _ in range(2000):
            nodes = generator.uniform(0, 0.5, size=12)
            accepted = generator.random(12) < nodes * true
            online.update([float(nodes.sum()), 0.0], [int(accepted.sum()), 0])
        assert online.factors()[0] == pytest.approx(true, rel=0.2)
        assert online.factors()[1:] == [1.0, 1.0]  # Nothing was verified there.


def after(shift: float, num_nodes: int) -> float:
    """The factor of the first depth, `num_nodes` predicted nodes after acceptance was multiplied by
    `shift`; it was as predicted for a long time."""
    online = OnlineSurvival(1, half_life=256)
    for _ in range(4000):
        online.update([2.0], [2])
    accepted = 0
    for step in range(1, num_nodes // 2 + 1):
        online.update([2.0], [round(2 * shift * step) - accepted])
        accepted = round(2 * shift * step)
    return online.factors()[0]


def test_half_of_what_was_seen_is_forgotten_after_a_half_life() -> None:
    assert after(0.9, 256) == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize("shift", [0.7, 1.4])
def test_a_shift_is_noticed_long_before_that(shift: float) -> None:
    """As when a temperature of 1 follows upon greedy requests."""
    assert after(shift, 160) == pytest.approx(shift, rel=0.08)


def test_chance_is_no_shift() -> None:
    random, online = np.random.default_rng(0), OnlineSurvival(1)
    factors = []
    for _ in range(5000):
        online.update([2.0], [int(random.binomial(4, 0.5))])
        factors.append(online.factors()[0])
    assert np.std(factors[500:]) < 0.05


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**6)), max_size=20),
    st.integers(1, 4),
)
def test_the_correction_stays_in_its_limits(steps: list[tuple[float, int]], depth: int) -> None:
    online = OnlineSurvival(depth)
    for predicted, accepted in steps:
        online.update([predicted] * 3, [accepted] * 3)
    assert all(0.25 <= factor <= 4 for factor in online.factors())
    assert len(online.factors()) == depth
    assert all(map(math.isfinite, online.factors()))


def test_the_correction_refuses_what_is_not_positive() -> None:
    with pytest.raises(ValueError, match="half_life"):
        OnlineSurvival(3, half_life=0)
