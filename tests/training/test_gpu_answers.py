# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The waves of chats: their greedy answers are the target's, and only answers count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echo_vllm.training.rows import read_rows
from tests.conftest import ROOT
from tests.training.targets import SHAPE, make_llama, write_prompts

USER, ASSISTANT = 2, 3


@pytest.mark.full
def test_answers_are_the_targets_own_and_only_they_count(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    target = make_llama(tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    prompts = write_prompts(tmp_path / "prompts.jsonl", 40, seed=1)
    out = tmp_path / "rows.jsonl"
    words = (target, "--prompts", prompts, "--seconds", "4", "-o", out, "--slots", "24")
    subprocess.run(
        [
            *(sys.executable, "scripts/gpu_answers.py", *map(str, words)),
            *("--length", "96", "--answer-tokens", "20"),
        ],
        cwd=ROOT,
        check=True,
        timeout=300,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    rows = read_rows(out)
    assert len(rows) > 24
    assert {row.temperature for row in rows} == {0.0, 0.8}
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert config["vocab_size"] == SHAPE.vocab
    turns = 0
    for row in rows:
        ids, mask = row.input_ids, row.loss_mask
        assert mask[-1] == 1
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        speaker, spoken = USER, 0
        for i in range(1, len(ids)):
            begins = ids[i - 1] in (USER, ASSISTANT) and mask[i - 1] == 0
            if begins:
                speaker, spoken = ids[i - 1], 0
            if mask[i]:
                assert speaker == ASSISTANT
                spoken += 1
                turns += spoken == 1
                assert spoken <= 20
                if row.temperature == 0.0:
                    assert logits[i - 1].max() - logits[i - 1, ids[i]] < 1e-3
    assert turns > len(rows), "no chat had a second answer"
