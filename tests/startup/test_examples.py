# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Every file in `examples/` works, on any machine; `tests/server` serves one by its path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echo_vllm.policies import parse_section
from tests.conftest import ROOT
from tests.engine.engines import counters, engine, generate
from tests.engine.prompts import chat
from tests.engine.test_exactness import greedy

EXAMPLES = sorted((ROOT / "examples").iterdir())
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)


@every_example
def test_an_example_is_valid_and_names_the_head_of_the_demo(example: Path, demo_head: Path) -> None:
    """Another head, or one that needs a GPU, is no example that can be tested here."""
    config = json.loads(example.read_text())
    assert config.keys() == {"method", "model", "num_speculative_tokens", "echo"}
    assert config["method"] == "echo"
    assert ROOT / config["model"] == demo_head
    parse_section(config["echo"], num_speculative_tokens=config["num_speculative_tokens"])


@pytest.mark.full
@every_example
def test_the_trees_of_an_example_are_accepted(
    example: Path, demo_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = json.loads(example.read_text())
    # In bfloat16 the target itself answers otherwise on some processors.
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 2}
    with engine(demo_target, config, **options) as llm:
        (tokens,) = generate(llm, chat(demo_target, ["What is the capital of France?"]), greedy(24))
        assert "Paris" in llm.get_tokenizer().decode(tokens)
        found = counters(llm)
    assert found["echo_trees"] > 0
    assert found["echo_accepted_tokens"] > 0
