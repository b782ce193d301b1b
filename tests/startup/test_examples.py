# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Every file in `examples/` is one that `vllm serve` takes, on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from echo_vllm.machine import fast_dtype
from echo_vllm.policies import parse_section
from tests.conftest import ROOT, ServerFactory
from tests.server.metrics import wait_until_idle

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
def test_an_example_is_served_and_its_trees_are_accepted(
    example: Path, server: ServerFactory, demo_target: Path
) -> None:
    served = server(
        demo_target,
        *("--speculative-config", str(example.relative_to(ROOT))),
        *("--served-model-name", "demo"),
        *("--dtype", fast_dtype()),
        *("--max-model-len", "256"),
        *("--max-num-seqs", "2"),
        "--enforce-eager",
    )
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = httpx.post(
        f"{served.url}/v1/chat/completions",
        json={"model": "demo", "messages": [question], "temperature": 0, "max_tokens": 24},
        timeout=120,
    )
    assert answer.is_success, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    metrics = wait_until_idle(served)
    assert metrics.total("echo_trees_total") > 0
    assert metrics.total("echo_accepted_tokens_total") > 0
