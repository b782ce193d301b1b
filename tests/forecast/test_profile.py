# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Profile files: what is written is what is read, and the one sentence for what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_vllm.config import EchoConfigError
from echo_vllm.forecast.drafter_profile import DepthProfile, DrafterProfile

ROOT = Path(__file__).resolve().parents[2]


def profile() -> DrafterProfile:
    def depth(number: int, tau: float | None) -> DepthProfile:
        return DepthProfile(
            depth=number,
            samples=1000,
            auc=0.7 if number < 3 else None,
            acceptance=1 / 3,
            is_gate=tau is not None,
            tau=tau,
            survival_logprobs=(-4.5, -1.0, -0.1),
            survival_probs=(0.01, 0.3 / number, 0.8 / number),
            ece_before=0.08,
            ece_after=0.01,
        )

    return DrafterProfile(
        target="target",
        drafter="head",
        dtype="float32",
        created="2025-01-01",
        prompts="prompts.jsonl: 20 prompts",
        num_steps=1000,
        delta=0.65,
        objective="Youden's J",
        depths=(depth(1, 0.25), depth(2, None), depth(3, 0.5)),
    )


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    loaded = DrafterProfile.load(path)
    assert loaded.depths[0].acceptance == pytest.approx(1 / 3, rel=1e-8)
    assert loaded.gates() == {1: 0.25, 3: 0.5}
    # What was rounded once is not rounded again.
    loaded.save(path)
    assert DrafterProfile.load(path) == loaded
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_what_was_measured_of_drawn_candidates_may_be_missing(tmp_path: Path) -> None:
    """Profiles of before drawn candidates were measured are read as ever."""
    path = tmp_path / "profile.json"
    content = profile().model_dump(mode="json")
    assert content.pop("drawn") is None
    path.write_text(json.dumps(content))
    assert DrafterProfile.load(path) == profile()
    depth = {
        "depth": 1,
        "samples": 100,
        "acceptance": 0.5,
        "survival_logprobs": [-3.0, -1.0],
        "survival_probs": [0.125, 0.25],
        "ece_before": 0.25,
        "ece_after": 0.0,
    }
    path.write_text(json.dumps(content | {"drawn": {"temperature": 1.0, "depths": [depth]}}))
    loaded = DrafterProfile.load(path)
    assert loaded.drawn is not None
    found = loaded.drawn.survival().probability(torch.tensor([-2.0]), torch.tensor([3]))
    assert found.tolist() == pytest.approx([0.1875])
    loaded.save(path)
    assert DrafterProfile.load(path).drawn == loaded.drawn
    depth["survival_probs"] = [0.5, 0.25]
    path.write_text(json.dumps(content | {"drawn": {"temperature": 1.0, "depths": [depth]}}))
    with pytest.raises(EchoConfigError, match="survival_probs must not fall"):
        DrafterProfile.load(path)


def test_the_survival_model_has_the_profiles_curves() -> None:
    found = profile().survival().probability(torch.tensor([-1.0, -1.0]), torch.tensor([1, 2]))
    assert found.tolist() == pytest.approx([0.3, 0.15])


def test_a_file_that_is_not_a_profile_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "p.json"

    def sentence() -> str:
        with pytest.raises(EchoConfigError) as error:
            DrafterProfile.load(path)
        text = str(error.value)
        assert text.startswith(
            "speculative_config.echo.profile must name a profile that `echo-vllm calibrate` "
            f'wrote, got "{path}"'
        )
        assert "\n" not in text
        return text

    assert "cannot be read (No such file or directory)" in sentence()
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read (it is not text)" in sentence()
    for content in ("", "[]", "{", "null", '{"depths": []}'):
        path.write_text(content)
        assert "not a JSON object with a schema_version" in sentence()
    path.write_text('{"schema_version": 2}')
    assert "schema_version 2, but this release reads 1" in sentence()
    path.write_text('{"schema_version": 1}')
    assert "whose target is wrong (Field required)" in sentence()


@pytest.mark.parametrize(
    ("depth", "changes", "complaint"),
    [
        (0, {"depth": 2}, "depths must be 1, 2, 3, ... in order"),
        (0, {"tau": None}, "depths[0] is wrong (a depth has a tau if and only if it is a gate)"),
        (1, {"tau": 0.5}, "depths[1] is wrong (a depth has a tau if and only if it is a gate)"),
        (0, {"tau": 1.5}, "depths[0].tau is wrong"),
        (0, {"auc": "high"}, "depths[0].auc is wrong"),
        (0, {"samples": 0}, "depths[0].samples is wrong"),
        (0, {"width": 3}, "depths[0].width is wrong (Extra inputs are not permitted)"),
        (2, {"survival_logprobs": [-1.0, -2.0, 0.0]}, "survival_logprobs must ascend"),
        (2, {"survival_probs": [0.1, 0.3, 0.2]}, "survival_probs must not fall"),
        (2, {"survival_probs": [-0.1, 0.3, 0.3]}, "between 0 and 1"),
        (2, {"survival_probs": [0.1, 0.3]}, "equally long"),
        (2, {"survival_probs": []}, "depths[2].survival_probs is wrong"),
        (2, {"ece_after": float("nan")}, "depths[2].ece_after is wrong"),
    ],
)
def test_a_profile_with_a_wrong_value_says_which(
    tmp_path: Path, depth: int, changes: dict[str, Any], complaint: str
) -> None:
    content = profile().model_dump(mode="json")
    content["depths"][depth] |= changes
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(EchoConfigError) as error:
        DrafterProfile.load(path)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_a_profile_needs_no_offline_tool() -> None:
    code = (
        "import sys, echo_vllm.offline.calibrate; "
        "assert not {'jinja2', 'matplotlib', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
