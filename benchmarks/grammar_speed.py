# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What trees bring where a grammar constrains the answers: JSON schemas and tool calls.

    python -m benchmarks.grammar_speed [--requests 1,8] [--rounds 3] [--json FILE]

Each engine has a process of its own; all answer the same prompts, one engine after the other, round
by round, greedily. `rest` is this project's runtime without a draft: what a request with a grammar
had before it could have trees. Every answer that came to its end is held against its schema.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.command_line import (
    add_engine_options,
    engine_options,
    integers,
    names,
    report,
    run_program,
    started,
)
from benchmarks.grammar_cases import Answers, Constrained, cases
from echo_vllm import atomic
from echo_vllm.conversations import Chat
from echo_vllm.offline.bench.configurations import PLAIN, choose
from echo_vllm.offline.bench.intervals import ratio
from echo_vllm.offline.bench.tables import markdown

CONFIGS = ["plain", "rest", "eagle3-k3", "topn-8", "auto"]


def check(answers: Answers, schemas: list[dict[str, Any]]) -> None:
    """Every answer that ended fits its schema.

    Raises:
        jsonschema.ValidationError, ValueError: one does not.
    """
    for answer, ended, schema in zip(answers.texts, answers.ended, schemas, strict=True):
        if ended:
            jsonschema.validate(json.loads(answer), schema)


def compare(
    runs: dict[str, list[Answers]], schemas: list[dict[str, Any]]
) -> dict[str, dict[str, str]]:
    """By configuration, the cells of its row."""
    rows = {}
    for name, answers in runs.items():
        plain = runs[PLAIN.name]
        check(answers[0], schemas)
        same = sum(
            ours == theirs
            for ours, theirs in zip(answers[0].token_ids, plain[0].token_ids, strict=True)
        )
        speeds = [
            (ours.tokens / ours.seconds) / (theirs.tokens / theirs.seconds)
            for ours, theirs in zip(answers, plain, strict=True)
        ]
        rows[name] = {
            "tokens a step": f"{answers[0].tokens_per_step:.2f}",
            "speed over plain": str(ratio(speeds)),
            "as plain decoding": f"{same} of {len(schemas)}",
            "ended, and valid": f"{sum(answers[0].ended)} of {len(schemas)}",
        }
    return rows


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=integers, default=[1, 8], help="at once (1,8)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--prompts", type=int, default=64, help="of each kind (64)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most (128)")
    parser.add_argument("--configs", type=names, default=CONFIGS, help=f"({','.join(CONFIGS)})")
    add_engine_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    options = parser.parse_args()
    chat = Chat(str(options.model.resolve()))
    rows: list[list[str]] = []
    for requests in options.requests:
        chosen = choose(options.configs, options.head.resolve())
        with started(chosen, engine_options(options, requests)) as engines:
            for kind, pairs in cases().items():
                step = -(-len(pairs) // options.prompts)
                prompts = [chat.encode([said]) for said, _ in pairs[::step]]
                schemas = [schema for _, schema in pairs[::step]]
                task = Constrained(prompts, schemas, options.tokens)
                few = Constrained(prompts[:4], schemas[:4], options.tokens)
                runs: dict[str, list[Answers]] = {engine.name: [] for engine in engines}
                for engine in engines:
                    engine.do(few)  # Compiles the grammars, and warms up.
                for number in range(options.rounds):
                    for i in range(len(engines)):
                        engine = engines[(number + i) % len(engines)]
                        runs[engine.name].append(engine.do(task))
                for name, cells in compare(runs, schemas).items():
                    rows.append([f"{kind}, {requests} at once", name, *cells.values()])
                    header = ["", "engine", *cells]
                print(markdown(header, rows), flush=True)
    if options.json:
        table = markdown(header, rows).splitlines()
        atomic.write_json(options.json, report("grammar_speed", dtype=options.dtype, table=table))
    return 0


if __name__ == "__main__":
    run_program(main)
