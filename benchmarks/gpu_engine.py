# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The price of a tree step: engine steps a second at the shape of LLaMA-3.1-8B, dummy weights.

    python -m benchmarks.gpu_engine [--out FILE.json] [--nodes 15] [--batches 1,4,16] [--layers 32]

Three engines in processes of their own take turns on one GPU: plain decoding, our chain and our
topn tree of as many nodes. With dummy weights the text means nothing, so what is compared is time
at equal verified tokens: a tree step of B requests verifies B * (1 + nodes) rows, and so does a
step of the chain, and a step of plain decoding over B * (1 + nodes) requests (whose contexts are as
long, so it reads more K/V). Engine steps are clocked by the host over many of them; verification
and drafting by the runner's own clock. Prints a table; the file has every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from echo_vllm import atomic
from echo_vllm.offline.engine import LocalEngine

CONTEXT = 512
WARM_STEPS, STEPS = 8, 40
KV_CACHE_BYTES = 6 << 30
VOCAB = 128256

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def write_models(folder: Path, layers: int) -> tuple[Path, Path]:
    """Folders with the configs of a target and of its EAGLE-3 head, without weights."""
    target = {**LLAMA_8B, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    head = {
        **LLAMA_8B,
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": 32000,
        "eagle_aux_hidden_state_layer_ids": [2, layers // 2, layers - 3],
    }
    paths = folder / "target", folder / "head"
    for path, config in zip(paths, (target, head), strict=True):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
    return paths


def speculation(name: str, head: Path, nodes: int) -> dict[str, Any] | None:
    """vLLM's speculative_config of an engine."""
    sections: dict[str, dict[str, Any]] = {
        "chain": {"policy": "chain"},
        "tree": {"policy": "topn", "max_depth": 5, "top_k": 4},
    }
    if name == "plain":
        return None
    return {
        "method": "echo",
        "model": str(head),
        "num_speculative_tokens": nodes,
        "echo": sections[name],
    }


# --- the engine's process ------------------------------------------------------------------------


def serve(name: str, folder: Path, nodes: int, most: int, eager: bool) -> None:
    """Make the engine, say so, and answer each line of input, a number of requests, by a sample."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    local = LocalEngine(
        folder / "target",
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=CONTEXT + 1024,
        max_num_seqs=most,
        max_num_batched_tokens=max(8192, 2 * most),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        gpu_memory_utilization=0.25,
        enforce_eager=eager,
        speculative_config=speculation(name, folder / "head", nodes),
    )
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        print(json.dumps(time_steps(local, int(line))), flush=True)


def time_steps(local: LocalEngine, requests: int) -> dict[str, Any]:
    """Steps of `requests` requests that all decode."""
    from vllm import SamplingParams

    engine, runner = local.engine, local.runner
    engine.reset_prefix_cache()  # Every prompt is read, as if it had not been there before.
    names = [str(i) for i in range(requests)]
    for i, name in enumerate(names):
        prompt = [(7919 * i + 31 * j) % 128000 for j in range(CONTEXT)]
        engine.add_request(
            name,
            {"prompt_token_ids": prompt},
            SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False),
        )
    started: set[str] = set()
    while len(started) < requests:
        started.update(output.request_id for output in engine.step())
    for _ in range(WARM_STEPS):
        engine.step()
    clock = getattr(runner, "clock", None)
    rows: list[int] = []
    parts: list[tuple[float, float]] = []
    runner._sync_device()
    begin = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
        rows.append(int(runner.query_start_loc.np[requests]))
        if clock is not None:
            parts.append((clock.verify_s, clock.draft_s or 0.0))
    runner._sync_device()
    seconds = (time.perf_counter() - begin) / STEPS
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    sample = {"requests": requests, "rows": median(rows), "step_ms": 1000 * seconds}
    if parts:
        sample["verify_ms"] = 1000 * median(verify for verify, _ in parts)
        sample["draft_ms"] = 1000 * median(draft for _, draft in parts)
    return sample


# --- the benchmark's process ---------------------------------------------------------------------


class Engine:
    """The other end of a process that runs `serve`."""

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_engine", "--serve", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def read(self) -> dict[str, Any]:
        """The next line of JSON; vLLM may print other things."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        tail = self._log.read_text(errors="replace").strip().splitlines()[-15:]
        raise RuntimeError(f"the engine {self.name} ended:\n" + "\n".join(tail))

    def time(self, requests: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{requests}\n")
        self._process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All samples, kept in `--out` after each round."""
    per_request = 1 + arguments.nodes
    most = max(arguments.batches) * per_request
    report: dict[str, Any] = {
        "shape": f"LLaMA-3.1-8B, {arguments.layers} layers, dummy weights, bfloat16",
        "context": CONTEXT,
        "nodes": arguments.nodes,
        "eager": arguments.eager,
        "samples": [],
    }
    with tempfile.TemporaryDirectory(prefix="echo-gpu-engine-") as name:
        folder = Path(name)
        write_models(folder, arguments.layers)
        options = ["--folder", name, "--nodes", str(arguments.nodes), "--most", str(most)]
        options += ["--eager"] if arguments.eager else []
        engines: list[Engine] = []
        try:
            for kind in ("plain", "chain", "tree"):  # one after another: each measures memory
                engines.append(Engine(kind, options, folder / f"{kind}.log"))
                engines[-1].read()
            for round_number in range(arguments.rounds):
                for batch in arguments.batches:
                    for engine in engines:
                        equal = [batch, batch * per_request] if engine.name == "plain" else [batch]
                        for requests in equal:
                            sample = engine.time(requests)
                            sample |= {"engine": engine.name, "batch": batch, "round": round_number}
                            report["samples"].append(sample)
                keep(report, arguments.out)
        finally:
            for engine in engines:
                engine.stop()
    return report


def keep(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        atomic.write_json(out, report)


def table(report: dict[str, Any]) -> str:
    """Medians, and each step time over that of plain decoding with as many rows."""
    keys = sorted({(s["batch"], s["engine"], s["requests"]) for s in report["samples"]})
    lines = [
        "batch  engine  requests   rows  steps/s  ms/step  verify ms  draft ms  over equal rows"
    ]
    found: dict[tuple[int, str, int], dict[str, Any]] = {}
    for key in keys:
        own = [s for s in report["samples"] if (s["batch"], s["engine"], s["requests"]) == key]
        found[key] = {
            field: median(s[field] for s in own if field in s) if field in own[0] else None
            for field in ("rows", "step_ms", "verify_ms", "draft_ms")
        }
    for (batch, engine, requests), row in found.items():
        equal = found.get((batch, "plain", batch * (1 + report["nodes"])))
        ratio = row["step_ms"] / equal["step_ms"] if equal and engine != "plain" else None
        cells = [row["verify_ms"], row["draft_ms"], ratio]
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        lines.append(
            f"{batch:5}  {engine:6}  {requests:8}  {row['rows']:5.0f}  {1000 / row['step_ms']:7.1f}"
            f"  {row['step_ms']:7.2f}  {shown[0]:>9}  {shown[1]:>8}  {shown[2]:>15}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="every sample, as JSON")
    parser.add_argument("--nodes", type=int, default=15, help="of a request's tree (15)")
    parser.add_argument(
        "--batches", type=lambda text: [int(x) for x in text.split(",")], default=[1, 4]
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (3)")
    parser.add_argument("--layers", type=int, default=32, help="of the target (32)")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, no compilation")
    parser.add_argument("--serve", choices=["plain", "chain", "tree"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(
            arguments.serve,
            arguments.folder,
            arguments.nodes,
            arguments.most,
            arguments.eager,
        )
        return
    report = run(arguments)
    keep(report, arguments.out)
    print(table(report))


if __name__ == "__main__":
    main()
