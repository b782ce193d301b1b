# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Cost curves, the hinge, and the cost of a step."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression  # noqa: F401  so that no example waits for it

from echo_vllm.forecast import CostCurve, CostError, Hinge, StepCost, budget_rows, fit_hinge
from echo_vllm.forecast.online_cost import CurveCorrection

COUNTS = st.lists(st.integers(0, 2048), min_size=1, max_size=20, unique=True)
SECONDS = st.floats(1e-6, 10.0)


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    counts = draw(COUNTS)
    seconds = draw(st.lists(SECONDS, min_size=len(counts), max_size=len(counts)))
    return CostCurve.from_points(counts, seconds)


@settings(deadline=None)
@given(curve=curves(), data=st.data())
def test_more_rows_never_take_less_time(curve: CostCurve, data: st.DataObject) -> None:
    asked = np.sort(data.draw(st.lists(st.floats(0, 10_000), min_size=2, max_size=30)))
    seconds = curve(asked)
    assert (np.diff(seconds) >= -1e-9 * seconds[1:]).all()


@settings(deadline=None)
@given(counts=COUNTS, data=st.data())
def test_monotone_points_are_kept_exactly(counts: list[int], data: st.DataObject) -> None:
    seconds = sorted(data.draw(st.lists(SECONDS, min_size=len(counts), max_size=len(counts))))
    weights = data.draw(st.lists(SECONDS, min_size=len(counts), max_size=len(counts)))
    curve = CostCurve.from_points(sorted(counts), seconds, weights)
    assert curve.to_points() == (sorted(counts), seconds)
    assert curve(np.array(sorted(counts))).tolist() == seconds
    assert [curve(count) for count in sorted(counts)] == seconds


@settings(deadline=None)
@given(curve=curves(), data=st.data())
def test_a_number_and_an_array_get_the_same_answer(curve: CostCurve, data: st.DataObject) -> None:
    asked = data.draw(st.lists(st.floats(0, 5000), max_size=30))
    np.testing.assert_allclose(
        curve(np.array(asked)), [curve(count) for count in asked], rtol=1e-12, atol=1e-15
    )


@settings(deadline=None)
@given(curve=curves())
def test_a_curve_survives_json_and_pickle(curve: CostCurve) -> None:
    assert CostCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    assert pickle.loads(pickle.dumps(curve)) == curve
    assert pickle.loads(pickle.dumps(curve))(77.5) == curve(77.5)


def test_noise_is_taken_out_and_repeats_are_averaged() -> None:
    curve = CostCurve.from_points([4, 1, 2, 2, 3], [4.0, 1.0, 2.5, 3.5, 2.0], [1, 1, 1, 1, 2])
    # Count 2 was measured twice (mean 3), above count 3 (2.0 twice as sure): both become 2.5.
    assert curve.to_points() == ([1, 2, 3, 4], [1.0, 2.5, 2.5, 4.0])


def test_outside_of_the_points() -> None:
    curve = CostCurve((10, 20, 30), (1.0, 1.0, 2.0))
    assert curve(1) == curve(0.0) == 1.0, "constant below"
    assert curve(130) == pytest.approx(12.0), "the last slope above"
    assert curve(np.array([25, 130])).tolist() == pytest.approx([1.5, 12.0])
    assert CostCurve((8,), (0.5,))(1000) == 0.5, "one point is a constant"


@pytest.mark.parametrize(
    ("counts", "seconds", "message"),
    [
        ((), (), "at least one point"),
        ((1, 2), (1.0,), "one number of seconds for each count"),
        ((1, 1), (1.0, 2.0), "must rise"),
        ((1, 2), (2.0, 1.0), r"must not fall, .* CostCurve.from_points"),
        ((1, 2), (1.0, float("nan")), "finite and >= 0"),
        ((-1, 2), (1.0, 2.0), "finite and >= 0"),
        ((1, 2), (-1.0, 2.0), "finite and >= 0"),
    ],
)
def test_what_is_not_a_curve_is_refused(
    counts: tuple[float, ...], seconds: tuple[float, ...], message: str
) -> None:
    with pytest.raises(CostError, match=message):
        CostCurve(counts, seconds)


def test_bad_points_are_refused() -> None:
    with pytest.raises(CostError, match="must have one length"):
        CostCurve.from_points([1, 2], [1.0])
    with pytest.raises(CostError, match="weights must be finite and > 0"):
        CostCurve.from_points([1, 2], [1.0, 2.0], [1.0, 0.0])
    with pytest.raises(CostError, match="finite and >= 0"):
        CostCurve.from_points([1, 2, 3], [3.0, float("nan"), 1.0])
    with pytest.raises(CostError, match="object of two lists"):
        CostCurve.from_dict({"counts": [1]})


@settings(deadline=None)
@given(
    k_max=st.floats(2, 300),
    gamma=st.floats(1e-3, 1.0),
    base=st.floats(1e-4, 10.0),
    counts=st.lists(st.integers(1, 2000), min_size=4, max_size=25, unique=True),
)
def test_an_exact_hinge_is_found(
    k_max: float, gamma: float, base: float, counts: list[int]
) -> None:
    # Two points on each branch define it; without them other hinges fit as well.
    x = np.array(sorted({*counts, 1, k_max * 0.9, k_max * 1.5 + 1, k_max * 2 + 2}))
    found = fit_hinge(CostCurve.from_points(x, Hinge(k_max, gamma, base)(x)))
    assert found.k_max == pytest.approx(k_max, rel=1e-5)
    assert found.gamma == pytest.approx(gamma, rel=1e-5)
    assert found.base == pytest.approx(base, rel=1e-5)
    assert found.error < 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_a_hinge_is_recovered_from_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = Hinge(k_max=float(rng.uniform(30, 120)), gamma=0.01, base=0.02)
    counts = np.unique(np.geomspace(1, 512, 24).round())
    noisy = truth(counts) * np.exp(rng.normal(0, 0.02, len(counts)))
    found = fit_hinge(CostCurve.from_points(counts, noisy))
    assert found.k_max == pytest.approx(truth.k_max, rel=0.15)
    assert found.gamma == pytest.approx(truth.gamma, rel=0.15)
    assert found.base == pytest.approx(truth.base, rel=0.03)
    assert 0 < found.error < 0.03


@settings(deadline=None, max_examples=60)
@given(curve=curves(), data=st.data())
def test_no_other_hinge_fits_better(curve: CostCurve, data: st.DataObject) -> None:
    found = fit_hinge(curve)
    x, y = np.array(curve.counts), np.array(curve.seconds)
    assert found.base > 0
    assert found.gamma >= 0
    assert found.error == pytest.approx(np.sqrt(np.mean((found(x) / y - 1) ** 2)), abs=1e-9)
    for _ in range(20):
        other = Hinge(
            k_max=data.draw(st.floats(x[0], x[-1])),
            gamma=found.gamma * data.draw(st.floats(0.3, 3)),
            base=found.base * data.draw(st.floats(0.3, 3)),
        )
        assert np.sqrt(np.mean((other(x) / y - 1) ** 2)) >= found.error - 1e-9


def test_a_flat_curve_has_no_bend() -> None:
    assert fit_hinge(CostCurve((1, 64), (0.5, 0.5))) == Hinge(k_max=64, gamma=0.0, base=0.5)
    assert fit_hinge(CostCurve((8,), (0.5,))) == Hinge(k_max=8, gamma=0.0, base=0.5)


def test_the_budget_is_the_hinge_where_there_is_a_flat_part() -> None:
    hinge = Hinge(k_max=48, gamma=0.004, base=0.1)
    assert budget_rows(CostCurve.from_points(range(1, 257), hinge(np.arange(1, 257)))) == (
        pytest.approx(48)
    )
    assert budget_rows(CostCurve((1, 64), (0.5, 0.5))) == 64


def test_the_budget_of_a_curve_without_a_flat_part_is_what_a_quarter_more_time_buys() -> None:
    rising = CostCurve((1.0, 101.0), (1.0, 2.0))  # one per cent a row
    assert fit_hinge(rising).k_max < 8
    assert budget_rows(rising) == 26
    steep = CostCurve((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    assert budget_rows(steep) == 1


def test_a_curve_of_zero_seconds_has_no_hinge() -> None:
    with pytest.raises(CostError, match="seconds above 0"):
        fit_hinge(CostCurve((1, 2), (0.0, 1.0)))


@settings(deadline=None)
@given(k_max=st.floats(0.25, 400), rows=st.floats(1, 4000))
def test_a_hinge_as_a_curve_is_the_same_function(k_max: float, rows: float) -> None:
    hinge = Hinge(k_max=k_max, gamma=0.02, base=0.5)
    assert hinge.to_curve()(rows) == pytest.approx(hinge(rows), rel=1e-6)
    assert hinge.to_curve()(rows) == pytest.approx(hinge(np.array([rows]))[0], rel=1e-6)


COST = StepCost(
    verify=CostCurve((1, 101), (1.0, 2.0)),
    draft_level=CostCurve((1, 11), (0.1, 0.2)),
    catch_up=CostCurve((1, 101), (0.3, 0.4)),
    other=0.05,
)


def test_a_step_is_the_sum_of_its_parts() -> None:
    assert COST.plain_step(requests=1) == pytest.approx(1.05)
    assert COST.plain_step(requests=1, prefill=100) == pytest.approx(2.05)
    assert COST.draft([1, 0, 11], committed=1) == pytest.approx(0.6)
    assert COST.draft([], committed=0) == 0
    assert COST.step(51, [1, 11], committed=101) == pytest.approx(1.5 + 0.3 + 0.4 + 0.05)
    many = COST.step(np.array([1, 51, 101]), [1, 11], committed=101)
    assert many == pytest.approx(np.array([1.75, 2.25, 2.75]))


def test_a_step_cost_survives_json() -> None:
    assert StepCost.from_dict(json.loads(json.dumps(COST.to_dict()))) == COST
    with pytest.raises(CostError, match="a step cost is an object with"):
        StepCost.from_dict({"verify": COST.verify.to_dict()})
    with pytest.raises(CostError, match="finite and >= 0, got nan"):
        StepCost.from_dict({**COST.to_dict(), "other": float("nan")})


@settings(max_examples=40, deadline=None)
@given(count=st.floats(0, 700), sizes=st.sets(st.integers(1, 512), max_size=6).map(sorted))
def test_up_to_the_captured_sizes_a_curve_is_a_step_function(
    count: float, sizes: list[int]
) -> None:
    linear = CostCurve((1.0, 64.0, 512.0), (0.5, 1.0, 7.0))
    curve = CostCurve(linear.counts, linear.seconds, tuple(sizes))
    padded = next((size for size in sizes if size >= count), count)
    assert curve(count) == linear(padded)
    assert curve(np.array([count, count])).tolist() == pytest.approx([linear(padded)] * 2)
    assert CostCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


def test_a_correction_and_a_scale_keep_the_steps() -> None:
    curve = CostCurve((1.0, 64.0), (0.5, 1.0), (8, 16, 32))
    correction = CurveCorrection(curve)
    for _ in range(64):
        correction.observe(12, math.log(2.0))
    for found in (correction.corrected(), curve.scaled(2.0), curve.shrunk(2.0)):
        assert found(9) == found(16) < found(17) == found(32) < found(40) < found(41)
    assert correction.corrected()(9) == pytest.approx(2 * curve(16), rel=0.05)


def test_sizes_that_do_not_rise_are_refused() -> None:
    with pytest.raises(CostError, match=r"must rise from above 0, got \[8\.0, 4\.0\]; sort them"):
        CostCurve((1.0,), (1.0,), (8, 4))
