# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tokens a step when the drafter sees a window of its context, by the length of the window.

    python -m benchmarks.window_acceptance --json benchmarks/results/window-cpu.json

Chats are answered until their context has `--context` tokens; then each asks once more. In every
step of this answer each request drafts from its last W tokens, cut down to a block's boundary, with
the context's first block before them or without. The drafter has read everything: a hole is made by
leaving blocks out of its block table. For a head of one layer, whose keys and values depend on no
other position, that is what catching up with W tokens after a rest leaves. Only tokens are counted,
so a busy machine does no harm.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_vllm import atomic
from echo_vllm.conversations import CHATS, Question, next_turn, read_conversations, shuffled
from echo_vllm.offline.bench.configurations import DEMO_HEAD, DEMO_TARGET
from echo_vllm.offline.bench.intervals import ratio
from echo_vllm.offline.bench.tables import markdown
from echo_vllm.offline.engine import LocalEngine
from echo_vllm.step.v1.window import DrafterWindow

BLOCK = 32
FULL = 1 << 20
LEADS = (0, 1)
ANSWER = 128
"""Tokens of an answer while the context grows."""

Ints = NDArray[np.int64]


class Holed(DrafterWindow):
    """A window of every request, whatever the drafter has seen.

    Attributes:
        window: tokens.
        lead: blocks before it.
    """

    lead = 0

    def seen(self, slots: Ints, firsts: Ints, stops: Ints, block_table: NDArray[np.int32]) -> None:
        super().seen(slots, firsts, stops, block_table)
        begin = (stops - self.window) // self.block_size
        self._lead[slots] = self.lead
        self._start[slots] = np.maximum(begin, self.lead) * self.block_size

    def firsts(self, slots: Ints, begins: Ints, stops: Ints) -> Ints:
        return self._end[slots].copy()


def contexts(engine: LocalEngine, count: int, length: int) -> list[list[int]]:
    """`count` prompts of at least `length` tokens, the last turns of chats with the model."""
    turns = chain.from_iterable(shuffled(read_conversations(CHATS)))
    asked, answers = [next(turns)], list[str]()
    found: list[list[int]] = []
    while len(found) < count:
        ids = engine.chat.encode(next_turn(asked, answers))
        if len(ids) >= length:
            found.append(ids)
            asked, answers = [next(turns)], []
            continue

        def keep(_: Question, token_ids: list[int], __: bool) -> None:
            answers.append(engine.chat.decode(token_ids) or "...")  # noqa: B023 - at once

        engine.answer([Question("context", ids, ANSWER)], keep)
        try:
            asked.append(next(turns))
        except StopIteration:
            break
    return found


def tokens_a_step(
    engine: LocalEngine, prompts: list[list[int]], temperature: float, max_tokens: int
) -> NDArray[np.float64]:
    """[prompts], of each prompt's answer, of the steps with a tree."""
    steps = np.zeros(len(prompts))
    scheduler = engine.scheduler
    update = scheduler.update_from_output

    def counted(scheduled: Any, output: Any) -> Any:
        for req_id in scheduled.scheduled_spec_decode_tokens:
            steps[int(req_id.split("-")[0])] += 1  # vLLM makes a request's name longer.
        return update(scheduled, output)

    scheduler.update_from_output = counted
    try:
        answers = engine.answer_each(prompts, max_tokens, temperature)
    finally:
        scheduler.update_from_output = update
    return (np.array([len(ids) for ids in answers]) - 1) / steps.clip(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=24, help="(24)")
    parser.add_argument("--context", type=int, default=512, help="tokens at least (512)")
    parser.add_argument("--tokens", type=int, default=48, help="of the answers counted (48)")
    parser.add_argument("--windows", default="16,32,64,128,256", help="beside the whole context")
    parser.add_argument("--temperatures", default="0,1", help="(0,1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    windows = [*map(int, args.windows.split(",")), FULL]
    temperatures = list(map(float, args.temperatures.split(",")))
    speculation = {
        "method": "echo",
        "model": str(DEMO_HEAD),
        "num_speculative_tokens": 16,
        # It may rest, so it has a window, and never does.
        "echo": {"policy": "echo", "max_depth": 5, "top_k": 4, "gates": {}, "k_max": 1 << 16},
    }
    options = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 8, "block_size": BLOCK}
    with LocalEngine(
        str(DEMO_TARGET),
        speculative_config=speculation,
        enable_prefix_caching=False,  # A block that comes with a prefix is one to be read, too.
        disable_log_stats=False,
        **options,
    ) as engine:
        runner = engine.runner
        made = runner.window
        window = Holed(len(made._end), len(made._whole), made.block_size, FULL)
        runner.window = window
        prompts = contexts(engine, args.num_prompts, args.context)
        found: dict[tuple[int, int, float], NDArray[np.float64]] = {}
        for tokens in windows:
            for lead in LEADS[: 1 if tokens == FULL else None]:
                window.window, window.lead = tokens, lead
                for temperature in temperatures:
                    each = tokens_a_step(engine, prompts, temperature, args.tokens)
                    found[tokens, lead, temperature] = each
                    print(tokens, lead, temperature, each.mean().round(3), flush=True)
    rows, report = [], []
    for (tokens, lead), label in {(w, x): _label(w, x) for w, x, _ in found}.items():
        row = [label]
        for temperature in temperatures:
            each, whole = found[tokens, lead, temperature], found[FULL, 0, temperature]
            of_whole = ratio((each / whole).tolist())
            row.append(f"{each.mean():.2f}, {of_whole}")
            report.append(
                {
                    "window": tokens if tokens < FULL else None,
                    "lead_blocks": lead,
                    "temperature": temperature,
                    "tokens_per_step": each.round(3).tolist(),
                    "of_whole": asdict(of_whole),
                }
            )
        rows.append(row)
    print(markdown(["", *(f"T = {t:g}" for t in temperatures)], rows))
    if args.json:
        lengths = [len(ids) for ids in prompts]
        atomic.write_json(args.json, {"prompt_tokens": lengths, "rows": report})


def _label(tokens: int, lead: int) -> str:
    if tokens == FULL:
        return "the whole context"
    return f"last {tokens}" + (f", first {lead * BLOCK}" if lead else "")


if __name__ == "__main__":
    main()
