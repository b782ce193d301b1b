# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The harness itself: vLLM's own V2 runner on a CPU, plain and with its `eagle3` chain.

What trees are compared with later: the stock engine has to be the same with and without drafts and
with and without asynchronous scheduling, or a difference would prove nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, engine, generate, runner
from tests.engine.test_exactness import greedy, tiny_prompts

PROMPTS = tiny_prompts(6)
TOKENS = 24


def v2_engine(tiny: TinyModel, spec: dict[str, Any] | None, **options: Any) -> Any:
    options = {"max_model_len": 256, "max_num_seqs": 4, "async_scheduling": False, **options}
    return engine(tiny.target, spec, skip_tokenizer_init=True, **options)


def chain(tiny: TinyModel) -> dict[str, Any]:
    return {"method": "eagle3", "model": str(tiny.head), "num_speculative_tokens": 3}


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> list[list[int]]:
    with v2_engine(tiny, None) as llm:
        start = time.perf_counter()
        tokens = generate(llm, PROMPTS, greedy(TOKENS))
        taken = time.perf_counter() - start
        print(f"\nV2 on a CPU: {1000 * taken / len(PROMPTS) / TOKENS:.0f} ms a token")
    return tokens


def test_v1_gives_the_same_tokens(
    tiny: TinyModel, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with v2_engine(tiny, None) as llm:
        assert isinstance(runner(llm), GPUModelRunner)
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("speculation", [None, chain], ids=["plain", "eagle3"])
def test_stock_decoding_is_exact(
    tiny: TinyModel,
    plain: list[list[int]],
    speculation: Callable[[TinyModel], dict[str, Any]] | None,
    is_async: bool,
) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    spec = speculation(tiny) if speculation else None
    with v2_engine(tiny, spec, async_scheduling=is_async) as llm:
        assert isinstance(runner(llm), GPUModelRunner)
        assert isinstance(scheduler(llm), AsyncScheduler) == is_async
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        if spec:
            assert counters(llm)["spec_decode_num_accepted_tokens"] > 0


@pytest.mark.full
def test_every_process_of_a_server_runs_v2(tiny: TinyModel, plain: list[list[int]]) -> None:
    """Engine core and worker in processes of their own, asynchronous, as a server has them."""
    code = f"""
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        {str(tiny.target)!r}, dtype="float32", enforce_eager=True, max_model_len=256,
        max_num_seqs=4, skip_tokenizer_init=True, async_scheduling=True,
        speculative_config={chain(tiny)!r},
    )
    params = SamplingParams(
        temperature=0, max_tokens={TOKENS}, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate({PROMPTS!r}, params, use_tqdm=False)
    print([list(output.outputs[0].token_ids) for output in outputs])
"""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    assert str(plain) in run.stdout
    assert "Using V2 Model Runner" in run.stdout + run.stderr
