# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests that arrive at random at a given rate, by `vllm bench serve`.

A closed loop hides queueing: its clients wait for a slow server. Here they do not, so that a server
that cannot keep up shows it in the time to the first token and in goodput. Only first turns are
asked, since arrivals do not depend on each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from echo_vllm import atomic
from echo_vllm.offline.bench.closed_loop import Job, Latency, Run
from echo_vllm.offline.bench.engine_process import TASK_TIMEOUT_S, EngineError


def bench_command(
    url: str, served_as: str, model: str, job: Job, data: Path, result: Path
) -> list[str]:
    """The command line of `vllm bench serve`; arrivals are a Poisson process with the job's seed.

    Args:
        url: of the server.
        served_as: name of the model there.
        model: a folder or a name, for the tokenizer.
        job: its load is a rate.
        data: the prompts, as `write_prompts` has them.
        result: where to.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--base-url", url, "--model", model, "--served-model-name", served_as]
    command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--dataset-name", "custom", "--dataset-path", str(data), "--disable-shuffle"]
    command += ["--skip-chat-template", "--custom-output-len", "-1"]  # The server applies it.
    command += ["--num-prompts", str(len(job.turns)), "--request-rate", f"{job.load:g}"]
    command += ["--seed", str(job.seed), "--temperature", f"{job.temperature:g}"]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"]
    command += ["--goodput", f"tpot:{job.tpot_ms:g}", "--ready-check-timeout-sec", "0"]
    command += ["--disable-tqdm", "--save-result", "--result-filename", str(result)]
    return [*command, "--ignore-eos"] if job.ignore_eos else command


def write_prompts(job: Job, path: Path) -> None:
    """The first turns as `vllm bench serve` reads them, with the length of each answer."""
    lines = (
        {"prompt": turns[0], "output_tokens": job.length((number, 0))}
        for number, turns in enumerate(job.turns)
    )
    atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def run_open_loop(url: str, served_as: str, model: str, job: Job, log: Path) -> Run:
    """Run a job against a server; what only the server knows is left at 0.

    Raises:
        EngineError: it failed, or a request did.
    """
    with tempfile.TemporaryDirectory(prefix="echo-bench-") as folder, log.open("ab") as output:
        data, result = Path(folder) / "prompts.jsonl", Path(folder) / "result.json"
        write_prompts(job, data)
        command = bench_command(url, served_as, model, job, data, result)
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=TASK_TIMEOUT_S
            ).returncode
        except subprocess.TimeoutExpired:
            raise EngineError(f"no end in {TASK_TIMEOUT_S:.0f} s; see {log}") from None
        if code or not result.is_file():
            raise EngineError(f"vllm bench serve ended with {code}; see {log}")
        found = json.loads(result.read_text(encoding="utf-8"))
    if found["failed"]:
        raise EngineError(f"{found['failed']} of {len(job.turns)} requests failed; see {log}")
    return run_of(found)


def run_of(found: dict[str, Any]) -> Run:
    """The result file of `vllm bench serve` as a `Run`."""
    latency = Latency(
        *(
            found[f"p{percent}_{figure}_ms"] / 1e3
            for figure in ("ttft", "itl", "tpot")
            for percent in (50, 99)
        )
    )
    return Run(
        seconds=found["duration"],
        cpu_seconds=0.0,
        tokens=found["total_output_tokens"],
        decode_tokens=found["total_output_tokens"] - found["completed"],
        request_steps=0,
        verified=0,
        accepted=0,
        latency=latency,
        goodput=found["request_goodput"],
    )
