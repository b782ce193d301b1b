# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A measured cost is kept only if the machine was steady, and measured again when it is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.startup import measure
from tests.engine.conftest import TinyModel
from tests.engine.engines import echo, engine, runner

SIZES = [1, 4, 16, 64]
CURVE = CostCurve((1.0, 4.0, 16.0, 64.0), (0.010, 0.010, 0.020, 0.080))


class Machine:
    """Forwards that take what `seconds` says, on a clock of their own."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        self.now = 0.0
        self.timed: list[int] = []
        self._seconds = seconds

    def forward(self, rows: int) -> None:
        self.now += self._seconds(rows, self.timed.count(rows))
        self.timed.append(rows)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], float]], Machine]:
    def make(seconds: Callable[[int, int], float]) -> Machine:
        machine = Machine(seconds)
        monkeypatch.setattr(measure, "perf_counter", lambda: machine.now)
        monkeypatch.setattr(measure, "_of_first_rank", lambda decide: decide())
        return machine

    return make


def agrees(ratios: list[float]) -> bool:
    return max(ratios) <= measure.DISAGREES * min(ratios)


def test_a_curve_holds_at_any_pace_and_through_single_disturbances(
    on: Callable[..., Machine],
) -> None:
    def seconds(rows: int, times: int) -> float:
        return 1.5 * CURVE(rows) * (3 if times == 0 else 1)  # slower throughout, and a slow first

    machine = on(seconds)
    assert agrees(measure._ratios(machine.forward, CURVE, SIZES))
    assert machine.timed == [rows for rows in SIZES for _ in range(measure.CHECKS)]


@pytest.mark.parametrize("wrong", SIZES)
def test_a_curve_with_one_wrong_size_does_not_hold(on: Callable[..., Machine], wrong: int) -> None:
    machine = on(lambda rows, times: CURVE(rows) * (2 if rows == wrong else 1))
    assert not agrees(measure._ratios(machine.forward, CURVE, SIZES))


@pytest.mark.parametrize(
    ("target", "draft", "holds"), [(3, 3, True), (0.5, 1, False), (1, 2, False)]
)
def test_target_and_drafter_are_held_against_each_other(
    on: Callable[..., Machine], target: float, draft: float, holds: bool
) -> None:
    """A machine may be slower as a whole, but a target in another format is another target."""
    # Each size CHECKS times for the target, and then for the drafter.
    machine = on(lambda rows, times: CURVE(rows) * (target if times < measure.CHECKS else draft))
    forwards = measure.Forwards(machine.forward, machine.forward, machine.forward)
    cost = StepCost(CURVE, CURVE, CURVE)
    assert measure._holds(cost, forwards, 512) == holds


def test_the_check_is_short_on_a_slow_machine_but_looks_at_two_sizes(
    on: Callable[..., Machine],
) -> None:
    machine = on(lambda rows, times: 200 * CURVE(rows))
    assert agrees(measure._ratios(machine.forward, CURVE, SIZES))
    assert machine.timed == [1, 4]


def test_a_wrong_cost_in_the_cache_is_measured_again(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_VLLM_CACHE", str(tmp_path))
    # However unsteady the machine of the test is: everything that is measured is kept.
    monkeypatch.setattr(measure, "DISAGREES", 1e6)
    options = {"skip_tokenizer_init": True, "max_model_len": 256}
    with engine(tiny.target, echo(tiny.head, 8, policy="auto"), **options) as llm:
        assert len(list((tmp_path / "costs").iterdir())) == 1
        key = measure.cost_key(runner(llm), 64)
        assert measure.cost_key(runner(llm), 64) == key
        for what, change in (
            ("model_config.revision", "another"),
            ("model_config.quantization", "fp8"),
            ("model_config.dtype", torch.bfloat16),
            ("speculative_config.draft_model_config.quantization", "fp8"),
            ("compilation_config.cudagraph_mode", CUDAGraphMode.PIECEWISE),
            ("compilation_config.mode", CompilationMode.VLLM_COMPILE),
            ("parallel_config.tensor_parallel_size", 2),
        ):
            place, _, name = what.rpartition(".")
            config = attrgetter(place)(runner(llm).vllm_config)
            with monkeypatch.context() as changed:
                changed.setattr(config, name, change)
                assert measure.cost_key(runner(llm), 64) != key, what
        os.utime(tiny.target / "model.safetensors")
        assert measure.cost_key(runner(llm), 64) != key
        assert measure.measured_cost(runner(llm))
        file = max((tmp_path / "costs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        kept = file.read_text()
        assert measure.measured_cost(runner(llm)).to_dict() == json.loads(kept)["cost"]
        assert file.read_text() == kept
        wrong = json.loads(kept)
        # One row for nothing, all others for an hour.
        count = len(wrong["cost"]["verify"]["counts"])
        wrong["cost"]["verify"]["seconds"] = [1e-9, *[3600.0] * (count - 1)]
        file.write_text(json.dumps(wrong))
        found = measure.measured_cost(runner(llm))
        assert max(found.verify.seconds) < 60
        assert json.loads(file.read_text())["cost"] == found.to_dict()


def test_curves_pad_to_what_cuda_graphs_were_captured_for(on: Callable[..., Machine]) -> None:
    machine = on(lambda rows, times: CURVE(rows))
    forwards = measure.Forwards(
        machine.forward, machine.forward, machine.forward, target_sizes=[8, 16, 32]
    )
    cost = measure._measure(forwards, 64)
    assert cost.verify(9) == cost.verify(16) < cost.verify(17) == cost.verify(32)
    assert cost.draft_level(9) < cost.draft_level(16)


def test_the_sizes_are_those_of_vllms_dispatcher() -> None:
    config = SimpleNamespace(cudagraph_capture_sizes=[16, 1, 8])
    dispatcher = SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE, compilation_config=config)
    assert measure.captured_sizes(dispatcher) == [1, 8, 16]
    dispatcher.cudagraph_mode = CUDAGraphMode.NONE
    assert measure.captured_sizes(dispatcher) == []
