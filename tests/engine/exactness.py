# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The whole exactness matrix on the demo model, too long for `make test`.

    python -m tests.engine.exactness --json benchmarks/results/exactness-cpu.json --resume
    python -m tests.engine.exactness --tiny --only fp32 --cases 'concurrency 1$'

FP32: every policy at concurrency 16 and 1, a chunked-prefill budget of 64 tokens, forced
preemption, and compiled as a server is by default (the others are eager), on all prompts of the
project x 128 tokens, token for token against the same engine without speculation; with `--tiny` the
tests' random model and their random prompts. BF16: the share of equal answers, and how near to a
tie the first difference of the others is: the gap between the two tokens' log-probabilities in
plain decoding.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  (the environment of in-process engines)
from tests.conftest import DEMO_HEAD, DEMO_TARGET

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from tests.engine.engines import counters, echo, engine, generate
from tests.engine.prompts import chat, project_prompts
from tests.engine.test_exactness import POLICIES, greedy, tiny_prompts
from tests.engine.tiny import make_head, make_target

OPTIONS = {"max_model_len": 1536, "max_num_seqs": 16}
CHUNKED = {"max_num_batched_tokens": 64}
PREEMPTED = {"num_gpu_blocks_override": 40, "block_size": 32, "max_model_len": 1184}
COMPILED = {"enforce_eager": False}


def cases() -> Iterator[tuple[str, tuple[int, dict[str, Any]], dict[str, Any], bool]]:
    """Name, policy, engine options, one by one."""
    for name, policy in POLICIES.items():
        yield f"{name}, concurrency 16", policy, {}, False
    yield "topn-16, prefill chunks of 64", POLICIES["topn-16"], CHUNKED, False
    yield "topn-16, preempted", POLICIES["topn-16"], PREEMPTED, False
    for name in ("topn-16", "echo-16", "auto-16"):
        yield f"{name}, compiled", POLICIES[name], COMPILED, False
    for name, policy in POLICIES.items():
        yield f"{name}, concurrency 1", policy, {}, True


def first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def fp32(
    target: Path,
    head: Path,
    prompts: list[Any],
    num_tokens: int,
    pattern: str,
    done: Sequence[dict[str, Any]],
    **more: Any,
) -> Iterator[dict[str, Any]]:
    """The row of each case as soon as it has run; cases in `done` are left out."""
    usual = OPTIONS | more

    @functools.cache
    def wanted(eager: bool) -> list[list[int]]:
        with engine(target, None, **usual, enforce_eager=eager) as llm:
            return generate(llm, prompts, greedy(num_tokens))

    for name, (num_nodes, section), options, one_by_one in cases():
        if not re.search(pattern, name) or any(row["case"] == name for row in done):
            continue
        spec = echo(head, num_nodes, **section)
        with engine(target, spec, **{**usual, **options}) as llm:
            found = generate(llm, prompts, greedy(num_tokens), one_by_one=one_by_one)
            count = counters(llm)
            preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
        plain = wanted(options.get("enforce_eager", True))
        differ = [i for i, (a, b) in enumerate(zip(found, plain, strict=True)) if a != b]
        row = {
            "case": name,
            "prompts": len(prompts),
            "tokens": num_tokens,
            "identical": len(prompts) - len(differ),
            "differing_prompts": differ,
            "acceptance_length": 1
            + count["spec_decode_num_accepted_tokens"] / count["spec_decode_num_drafts"],
            "preemptions": preemptions[0] if preemptions else None,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
        print(row, flush=True)
        yield row


@contextlib.contextmanager
def models(tiny: bool) -> Iterator[tuple[Path, Path, list[Any], dict[str, Any]]]:
    """Target, head, prompts and what its engines need beyond the usual."""
    if not tiny:
        yield DEMO_TARGET, DEMO_HEAD, chat(DEMO_TARGET, project_prompts()), {}
        return
    with tempfile.TemporaryDirectory(prefix="echo-exactness-") as folder:
        target, head = make_target(Path(folder) / "target"), make_head(Path(folder) / "head")
        yield target, head, tiny_prompts(100), {"skip_tokenizer_init": True, "max_model_len": 256}


def bf16(prompts: list[str], num_tokens: int) -> dict[str, Any]:
    options = {**OPTIONS, "dtype": "bfloat16"}
    with engine(DEMO_TARGET, None, **options) as llm:
        outputs = llm.generate(prompts, greedy(num_tokens, logprobs=20), use_tqdm=False)
    with engine(DEMO_TARGET, echo(DEMO_HEAD, 16), **options) as llm:
        found = generate(llm, prompts, greedy(num_tokens))
    gaps = []
    for output, tokens in zip(outputs, found, strict=True):
        plain = output.outputs[0]
        at = first_difference(list(plain.token_ids), tokens)
        if at is None:
            continue
        seen = {token: entry.logprob for token, entry in plain.logprobs[at].items()}
        # A token outside plain decoding's best twenty is no near-tie, whatever its gap.
        other = seen.get(tokens[at])
        gaps.append(None if other is None else seen[plain.token_ids[at]] - other)
    return {
        "prompts": len(prompts),
        "tokens": num_tokens,
        "identical": len(prompts) - len(gaps),
        "gaps_at_first_difference": sorted(gaps, key=lambda gap: (gap is None, gap)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prompts", type=int, default=10_000, help="how many at most")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--cases", default="", help="FP32: a regular expression of case names")
    parser.add_argument("--only", choices=["fp32", "bf16"])
    parser.add_argument("--tiny", action="store_true", help="FP32 on the tiny random model")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds already")
    args = parser.parse_args()
    if args.tiny and args.only != "fp32":
        parser.error("--tiny has no bfloat16 part; add --only fp32")
    report: dict[str, Any] = {
        "command": "python -m tests.engine.exactness " + " ".join(sys.argv[1:])
    }
    if args.resume and args.json and args.json.exists():
        report = json.loads(args.json.read_text()) | report

    def keep() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    exact = True
    with models(args.tiny) as (target, head, prompts, options):
        prompts = prompts[: args.prompts]
        if args.only != "fp32" and "bfloat16" not in report:
            report["bfloat16"] = bf16(prompts, args.tokens)
            print(report["bfloat16"], flush=True)
            keep()
        if args.only != "bf16":
            rows = report.setdefault("float32", [])
            size = {"prompts": len(prompts), "tokens": args.tokens}
            done = [row for row in rows if row.items() >= size.items()]
            for row in fp32(target, head, prompts, args.tokens, args.cases, done, **options):
                rows.append(row)
                keep()
            exact = all(row["identical"] == row["prompts"] for row in rows)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
