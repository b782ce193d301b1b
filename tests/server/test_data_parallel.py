# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Two data-parallel ranks behind one server: exact, each with a budget of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServerFactory
from tests.engine.conftest import TinyModel
from tests.engine.tiny import Shape, make_head, make_moe_target, make_target
from tests.server.metrics import Metrics
from tests.server.ranks import complete, plain_answers, prompts, serve_ranks

pytestmark = pytest.mark.full

# The nodes of a step, of each rank.
SECTION: dict[str, Any] = {"policy": "echo", "k_max": 6, "max_depth": 4, "top_k": 3}


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        pytest.param(make_target, (), id="dense"),
        pytest.param(make_moe_target, ("--enable-expert-parallel",), id="experts"),
    ],
)
def test_two_ranks_answer_as_one_without_speculation(
    make: Callable[..., Path], arguments: tuple[str, ...], tmp_path: Path, server: ServerFactory
) -> None:
    shape = Shape()
    tiny = TinyModel(make(tmp_path / "target", shape), make_head(tmp_path / "head", shape), shape)
    wanted = plain_answers(tiny, 64)
    served = serve_ranks(
        server,
        tiny,
        *("--data-parallel-size", "2"),
        *("--api-server-count", "1"),
        *arguments,
        **SECTION,
    )
    assert complete(served, prompts(64), at_once=16) == wanted
    # One at a time: a rank is idle.
    assert complete(served, prompts(6), at_once=1) == wanted[:6]
    metrics = Metrics.read(served)
    for engine in "01":
        assert metrics.total("echo_steps_total", engine=engine) > 0
        assert metrics.total("echo_accepted_tokens_total", engine=engine) > 0, f"rank {engine}"
