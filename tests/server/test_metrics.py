# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the server counts about its trees, on /metrics and in its log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import openai
import pytest

from tests.conftest import Server
from tests.server.conftest import MODEL
from tests.server.metrics import Metrics
from tests.server.prompts import Prompt

pytestmark = pytest.mark.full


@dataclass(frozen=True)
class Traffic:
    """Some requests, all of `max_tokens` tokens, and what was counted meanwhile."""

    requests: int
    tokens: int
    counted: Metrics


@pytest.fixture(scope="module")
def shared() -> dict[Server, Traffic]:
    """The traffic of this module, by server."""
    return {}


@pytest.fixture
def traffic(
    shared: dict[Server, Traffic],
    served: Server,
    client: openai.OpenAI,
    settled: Callable[[], Metrics],
    prompts: list[Prompt],
) -> Traffic:
    """Eight greedy requests of 48 tokens, four at a time."""
    if served in shared:
        return shared[served]

    def ask(prompt: str) -> int:
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0,
            max_tokens=48,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    texts = [prompt.prompt for prompt in prompts if prompt.category == "story"]
    texts += [prompt.prompt for prompt in prompts if prompt.category == "maths"]
    before = settled()
    with ThreadPoolExecutor(4) as pool:
        tokens = list(pool.map(ask, texts[:8]))
    shared[served] = Traffic(len(tokens), sum(tokens), settled() - before)
    return shared[served]


def test_vllms_counters_are_true_for_trees(traffic: Traffic) -> None:
    """A draft is a tree, its draft tokens are the nodes that were verified."""
    counted = traffic.counted
    assert counted.total("spec_decode_num_drafts_total") > 0
    for theirs, ours in (
        ("spec_decode_num_drafts_total", "echo_trees_total"),
        ("spec_decode_num_draft_tokens_total", "echo_verified_nodes_total"),
        ("spec_decode_num_accepted_tokens_total", "echo_accepted_tokens_total"),
    ):
        assert counted.total(theirs) == counted.total(ours), theirs


def test_a_position_is_a_depth(traffic: Traffic, num_nodes: int, max_depth: int) -> None:
    counted = traffic.counted
    by_position = counted.by_label("spec_decode_num_accepted_tokens_per_pos_total", "position")
    positions = [by_position[str(i)] for i in range(num_nodes)]
    assert len(by_position) == num_nodes
    assert sum(positions) == counted.total("echo_accepted_tokens_total") > 0
    assert counted.total("echo_trees_total") >= positions[0]
    assert all(above >= below for above, below in pairwise(positions))
    assert positions[max_depth:] == [0] * (num_nodes - max_depth)


def test_shapes_agree_with_the_counters(traffic: Traffic, num_nodes: int, max_depth: int) -> None:
    counted = traffic.counted
    trees, nodes = counted.total("echo_trees_total"), counted.total("echo_verified_nodes_total")
    assert counted.total("echo_budget_nodes_total") == trees * num_nodes
    assert 0 < nodes <= trees * num_nodes
    for shape in ("echo_tree_depth", "echo_tree_width", "echo_accepted_depth"):
        assert counted.total(f"{shape}_count") == trees
    depth, width = counted.total("echo_tree_depth_sum"), counted.total("echo_tree_width_sum")
    assert trees <= depth <= nodes
    assert trees <= width <= nodes
    assert counted.total("echo_tree_depth_bucket", le=f"{float(max_depth)}") == trees
    accepted = counted.total("echo_accepted_tokens_total")
    assert counted.total("echo_accepted_depth_sum") == accepted <= depth
    assert nodes > depth, "the served configuration must make trees, not chains"


def test_trees_account_for_the_tokens(traffic: Traffic, max_depth: int) -> None:
    """Tokens = trees (a bonus token each) + accepted tokens + tokens of steps without a tree.

    Without a tree are a request's first step and perhaps its last; of the last tree's path, what
    goes beyond max_tokens is accepted but not generated.
    """
    counted = traffic.counted
    from_trees = counted.total("echo_trees_total") + counted.total("echo_accepted_tokens_total")
    without = traffic.tokens - from_trees
    assert traffic.requests * (1 - max_depth) <= without <= traffic.requests * 2
    assert counted.total("generation_tokens_total") >= traffic.tokens


def test_the_log_has_a_line_of_statistics(traffic: Traffic, served: Server, num_nodes: int) -> None:
    deadline = time.monotonic() + 15
    pattern = re.compile(
        r"ECHO: (\d+) trees verified, ([\d.]+) nodes a tree, ([\d.]+) tokens a step and request, "
        r"([\d.]+|inf) verified nodes per accepted token, (\d+)% of the budget used"
    )
    while not (lines := pattern.findall(served.log.read_text(errors="replace"))):
        assert time.monotonic() < deadline, "no line of statistics in the log"
        time.sleep(0.5)
    assert traffic.requests
    for trees, nodes, tokens, _, used in lines:
        assert int(trees) > 0
        assert 0 < float(nodes) <= num_nodes
        assert float(tokens) >= 1
        assert abs(int(used) - 100 * float(nodes) / num_nodes) <= 1
