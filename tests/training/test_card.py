# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The card and training.json of a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echo_vllm.training.card import FILE_NAME, add_facts


def evaluation(length: float) -> dict[str, Any]:
    run = {
        "drafts": "chain of 2",
        "prompts": "mt-bench",
        "temperature": 0.0,
        "acceptance_length": length,
        "accepted_per_position": [0.5, 0.25],
        "in_draft_vocabulary": 0.9062,
    }
    return {
        "engine": "an engine",
        "dtype": "float32",
        "max_tokens": 8,
        "command": "echo-vllm train-drafter eval T -o H",
        "runs": [run],
    }


def test_training_and_evaluation_end_up_in_one_card(tmp_path: Path) -> None:
    add_facts(tmp_path, target="T", updates=7, settings={"loss": "kl_div"})
    add_facts(tmp_path, evaluation=evaluation(1.75))
    assert json.loads((tmp_path / FILE_NAME).read_text())["updates"] == 7
    card = (tmp_path / "README.md").read_text()
    assert "| chain of 2 | mt-bench | 0 | 1.75 | 50 %, 25 % | 90.6 % |" in card
    assert "| loss | kl_div |" in card
    assert "echo-vllm train-drafter eval T -o H" in card
    add_facts(tmp_path, evaluation=evaluation(1.5))
    assert "| 1.75 |" not in (tmp_path / "README.md").read_text()


def test_runs_from_before_the_vocabulary_was_counted_stay_in_the_card(tmp_path: Path) -> None:
    facts = evaluation(1.75)
    del facts["runs"][0]["in_draft_vocabulary"]
    add_facts(tmp_path, evaluation=facts)
    assert "| 1.75 | 50 %, 25 % | - |" in (tmp_path / "README.md").read_text()


def test_a_card_by_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my own card")
    add_facts(tmp_path, evaluation=evaluation(1.75))
    assert (tmp_path / "README.md").read_text() == "my own card"
    assert "evaluation" in json.loads((tmp_path / FILE_NAME).read_text())
