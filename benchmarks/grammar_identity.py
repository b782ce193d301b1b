# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether answers under a grammar are, token by token, those of plain decoding: float32, greedy.

    python -m benchmarks.grammar_identity [--requests 1,16] [--configs topn-8,auto] [--json FILE]

The prompts of `benchmarks.grammar_speed`, one engine after the other. Nothing here is timed, so
what else the machine does changes nothing. Status 1 if an answer differs or does not fit its
schema.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
from benchmarks.grammar_speed import check
from echo_vllm import atomic
from echo_vllm.conversations import Chat
from echo_vllm.offline.bench.configurations import PLAIN, choose
from echo_vllm.offline.bench.tables import markdown

CONFIGS = ["topn-8", "echo", "auto", "graft"]
HEADER = ["", "engine", "as plain decoding", "ended, and valid", "tokens", "tokens a step"]


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=integers, default=[1, 16], help="at once (1,16)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most (128)")
    parser.add_argument("--configs", type=names, default=CONFIGS, help=f"({','.join(CONFIGS)})")
    add_engine_options(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    options = parser.parse_args()
    chat = Chat(str(options.model.resolve()))
    rows: list[list[str]] = []
    identical = True
    for requests in options.requests:
        plain: dict[str, Answers] = {}
        for configuration in choose(options.configs, options.head.resolve()):
            with started([configuration], engine_options(options, requests)) as [engine]:
                for kind, pairs in cases().items():
                    prompts = [chat.encode([said]) for said, _ in pairs]
                    schemas = [schema for _, schema in pairs]
                    answers: Answers = engine.do(Constrained(prompts, schemas, options.tokens))
                    check(answers, schemas)
                    if configuration is PLAIN:
                        plain[kind] = answers
                    pairs_of_answers = zip(answers.token_ids, plain[kind].token_ids, strict=True)
                    same = sum(ours == theirs for ours, theirs in pairs_of_answers)
                    identical &= same == len(pairs)
                    rows.append(
                        [
                            f"{kind}, {requests} at once",
                            configuration.name,
                            f"{same} of {len(pairs)}",
                            f"{sum(answers.ended)} of {len(pairs)}",
                            f"{answers.tokens}",
                            f"{answers.tokens_per_step:.2f}",
                        ]
                    )
            print(markdown(HEADER, rows[-len(cases()) :]), flush=True)
    if options.json:
        table = markdown(HEADER, sorted(rows, key=lambda row: row[0])).splitlines()
        atomic.write_json(
            options.json,
            report("grammar_identity", dtype=options.dtype, identical=identical, table=table),
        )
    return 0 if identical else 1


if __name__ == "__main__":
    run_program(main)
