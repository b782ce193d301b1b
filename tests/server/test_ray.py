# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Ray as executor: two ranks on one machine are exact, and a dead rank ends the server."""

from __future__ import annotations

import os
from pathlib import Path

import openai
import psutil
import pytest

from tests.conftest import ROOT, ServerFactory
from tests.engine.conftest import TinyModel
from tests.engine.tiny import Shape, make_head, make_target
from tests.server.metrics import Metrics
from tests.server.ranks import complete, plain_answers, prompts, serve_ranks

pytestmark = pytest.mark.full

# Beside .venv, as `make setup FOR_TESTS=1` puts it: with Ray installed vLLM starts more slowly.
RAY = ROOT / ".build" / "ray"


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    shape = Shape()
    target = make_target(tmp_path / "target", shape)
    return TinyModel(target, make_head(tmp_path / "head", shape), shape)


def test_two_ranks_answer_as_one_and_a_dead_one_ends_the_server(
    tiny: TinyModel, server: ServerFactory
) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("two ranks need two cores, and this process may use one only")
    if not RAY.is_dir():
        pytest.skip("needs Ray, which `make setup FOR_TESTS=1` could not fetch")
    wanted = plain_answers(tiny, 64)
    served = serve_ranks(
        server,
        tiny,
        *("--distributed-executor-backend", "ray"),
        *("--tensor-parallel-size", "2"),
        env={"PYTHONPATH": str(RAY), "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))},
        policy="echo",
        k_max=12,
        max_depth=4,
        top_k=3,
    )
    assert complete(served, prompts(64), at_once=16) == wanted
    assert complete(served, prompts(6), at_once=1) == wanted[:6]
    assert Metrics.read(served).total("echo_accepted_tokens_total") > 0

    everyone = psutil.Process(served.process.pid).children(recursive=True)
    ranks = [process for process in everyone if "RayWorkerProc" in " ".join(process.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    with pytest.raises(openai.APIError):
        complete(served, prompts(64), at_once=16)
    served.process.wait(60)
    assert "RayWorkerProc rank=[1] died unexpectedly" in served.log.read_text(errors="replace")
    # Agents of Ray, whose own server was killed, find that out after some seconds.
    _, alive = psutil.wait_procs(everyone, timeout=120)
    assert not alive, f"left over after the server: {alive}"
