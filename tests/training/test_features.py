# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Hidden states of the target: alone or together, computed or from their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from echo_vllm.training.features import KeptStates, Target
from tests.training.targets import make_llama

ROWS = [torch.arange(5, 5 + length) for length in (7, 3, 12)]


class Counting:
    """A target that says the tokens themselves, and remembers which it was asked together."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.asked: list[list[int]] = []

    def hidden_states_of(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.asked.append([len(ids) for ids in sequences])
        return [ids.float()[:, None, None].expand(-1, 2, 4) for ids in sequences]


def kept(folder: Path, target: Any, max_bytes: int = 1 << 20) -> KeptStates:
    return KeptStates(folder, target, ROWS, max_bytes)


def test_sequences_that_run_together_have_the_states_that_they_have_alone(tmp_path: Path) -> None:
    target = Target(str(make_llama(tmp_path / "target")), [1, 3], torch.float32, "cpu")
    together = target.hidden_states_of(ROWS)
    for ids, states in zip(ROWS, together, strict=True):
        assert states.shape == (len(ids), 3, target.hidden_size)
        torch.testing.assert_close(states, target.hidden_states(ids), atol=1e-5, rtol=1e-5)


def test_a_gpu_runs_what_is_missing_in_one_go_and_a_cpu_one_by_one(tmp_path: Path) -> None:
    for device, asked in (("cpu", [[12], [7]]), ("meta", [[12, 7]])):
        target = Counting(device)
        states = kept(tmp_path / device, target, max_bytes=0)
        found = states.of([2, 0])
        assert target.asked == asked
        assert [len(one) for one in found] == [12, 7]
        assert states.computed_tokens == 19


def test_states_are_computed_once_while_there_is_room(tmp_path: Path) -> None:
    target = Counting("cpu")
    kept(tmp_path, target).of([0, 1])
    found = kept(tmp_path, target).of([0, 1, 2])
    assert target.asked == [[7], [3], [12]]
    for ids, states in zip(ROWS, found, strict=True):
        assert torch.equal(states[:, 0, 0], ids.float())
    (tmp_path / "hs_1.safetensors").write_bytes(b"cut off")
    kept(tmp_path, target).of([0, 1, 2])
    assert target.asked[3:] == [[3]]
    full = kept(tmp_path / "other", target, max_bytes=10)
    full.of([0])
    full.of([0])
    assert target.asked[4:] == [[7], [7]]
    assert list((tmp_path / "other").iterdir()) == []
