# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which run comes next: interleaved rounds over configurations, temperatures and concurrencies.

In a round and at each concurrency every configuration runs the same prompts, one right after the
other, in an order that shifts by one each time, so that a machine that gets slower or faster does
so for each of them. The rounds take different prompts.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from echo_vllm import atomic
from echo_vllm.offline.bench.closed_loop import Job
from echo_vllm.offline.bench.configurations import PLAIN, Configuration
from echo_vllm.offline.bench.engine_process import EngineOptions
from echo_vllm.offline.bench.fleet import Fleet, Kind, launcher
from echo_vllm.offline.bench.prompts import Tokenizer, window
from echo_vllm.offline.bench.tables import Sample

WARM_UP_TOKENS = 16

Cell = tuple[str, int, float, int]
"""Configuration, concurrency, temperature, round."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        configurations: plain decoding, the base of all ratios, is one of them.
        rounds: how often, each time with other prompts.
        max_tokens: generated for each request, on average.
        spread: how far, as a share, requests may have fewer or more.
        requests_per_client: how many each of the concurrent clients sends in a run.
        ignore_eos: whether every request generates all of its tokens.
    """

    configurations: tuple[Configuration, ...]
    concurrencies: tuple[int, ...]
    temperatures: tuple[float, ...] = (0.0,)
    rounds: int = 3
    max_tokens: int = 64
    requests_per_client: int = 2
    ignore_eos: bool = True
    spread: float = 0.0

    def requests(self, concurrency: int) -> int:
        """Requests of a run: enough that they start and end at different times."""
        return max(4, self.requests_per_client * concurrency)

    def weight(self, concurrency: int) -> float:
        """A run's share of the work: the more requests share a step, the cheaper a token."""
        return self.requests(concurrency) / math.sqrt(concurrency)

    def missing(self, done: Collection[Cell]) -> dict[tuple[int, float, int], list[str]]:
        """(concurrency, temperature, round) -> configurations that have yet to run there.

        Where some have run in an earlier session and some have not, plain decoding runs again, so
        that every ratio has both its halves from one session.
        """
        names = [c.name for c in self.configurations]
        found = {}
        for number in range(self.rounds):
            for temperature in self.temperatures:
                for concurrency in self.concurrencies:
                    row = (concurrency, temperature, number)
                    left = {name for name in names if (name, *row) not in done}
                    if left:
                        found[row] = [n for n in names if n in left or n == PLAIN.name]
        return found

    def runs(
        self, missing: dict[tuple[int, float, int], list[str]], at_once: int
    ) -> Iterator[tuple[list[str], list[Cell]]]:
        """Groups of at most `at_once` configurations, and the order of what each is to run.

        Every other round takes the groups in reverse, so that it begins with workers that are
        still alive.
        """
        names = [c.name for c in self.configurations]
        groups = [names[i : i + at_once] for i in range(0, len(names), at_once)]
        orders = [deque(group) for group in groups]
        for number in range(self.rounds):
            for index in range(len(groups))[:: 1 if number % 2 == 0 else -1]:
                cells: list[Cell] = []
                for temperature in self.temperatures:
                    for concurrency in self.concurrencies:
                        row = (concurrency, temperature, number)
                        wanted = missing.get(row, [])
                        cells += [(name, *row) for name in orders[index] if name in wanted]
                        orders[index].rotate(-1)
                if cells:
                    needed = {cell[0] for cell in cells}
                    yield [name for name in groups[index] if name in needed], cells


@dataclass(frozen=True)
class Sweep:
    """A plan, and what it runs on.

    Attributes:
        conversations: the user's turns, one or two each, from `read_shuffled`.
        keep_alive: the most workers alive at a time.
        logs: the folder of their logs.
        frozen: where answers to first turns are kept for a later session.
    """

    plan: Plan
    options: EngineOptions
    kind: Kind
    conversations: Sequence[Sequence[str]]
    keep_alive: int
    logs: Path
    frozen: Path | None = None

    def run(
        self,
        on_sample: Callable[[Sample], None],
        done: Collection[Cell] = (),
        session: int = 0,
        console: Console | None = None,
    ) -> dict[str, str]:
        """Run all that is not `done`; each sample is reported as soon as it exists.

        Returns:
            configuration -> why it failed.

        Raises:
            ValueError: no prompt is short enough.
        """
        plan = self.plan
        tokenizer = Tokenizer(self.options.model)
        # No more than the rounds can use: answering all first turns may take longer than they do.
        most = plan.rounds * max(map(plan.requests, plan.concurrencies))
        conversations = self.conversations[:most]
        first_turns = self._short_enough([tokenizer.encode(c[:1]) for c in conversations])
        missing = plan.missing(done)
        progress = _progress(console or Console(stderr=True))
        total = sum(plan.weight(row[0]) * len(names) for row, names in missing.items())
        with progress:
            task = progress.add_task("starting", total=total)
            fleet = Fleet(
                plan.configurations,
                launcher(self.kind, self.options),
                self.logs,
                keep_alive=self.keep_alive,
                # Loading an engine is Python on one core, mostly.
                start_at_once=1 if self.kind == "server" else 2,
                warm_up=self._warm_up(first_turns),
                say=lambda text: progress.update(task, description=text),
            )
            with fleet:
                prompts = self._all_turns(fleet, tokenizer, conversations) if missing else []
                for group, cells in plan.runs(missing, self.keep_alive):
                    fleet.prepare(group)
                    for name, concurrency, temperature, number in cells:
                        text = f"round {number + 1}/{plan.rounds}, {concurrency} at once, {name}"
                        if len(plan.temperatures) > 1:
                            text += f", T={temperature:g}"
                        progress.update(task, description=text)
                        count = plan.requests(concurrency)
                        chosen = window(prompts, number * count, count)
                        known = set(fleet.failures)
                        job = Job(
                            chosen,
                            concurrency,
                            plan.max_tokens,
                            temperature,
                            plan.ignore_eos,
                            spread=plan.spread,
                        )
                        if run := fleet.run(name, job):
                            on_sample(Sample(name, concurrency, number, run, temperature, session))
                        for failed in fleet.failures.keys() - known:
                            progress.print(f"{failed} failed: {fleet.failures[failed]}")
                        progress.advance(task, plan.weight(concurrency))
        return fleet.failures

    def _short_enough(self, prompts: list[list[int]]) -> list[list[int]]:
        kept = [ids for ids in prompts if len(ids) <= self._longest]
        if not kept:
            raise ValueError(f"no prompt has at most {self._longest} tokens, which is what fits")
        return kept

    @property
    def _longest(self) -> int:
        most = math.ceil(self.plan.max_tokens * (1 + self.plan.spread))
        return self.options.max_model_len - most

    def _warm_up(self, prompts: list[list[int]]) -> list[Job]:
        plan = self.plan
        first, *others = plan.temperatures
        each = [(c, first) for c in plan.concurrencies]
        each += [(max(plan.concurrencies), temperature) for temperature in others]
        return [Job(window(prompts, 0, c), c, WARM_UP_TOKENS, t) for c, t in each]

    def _all_turns(
        self, fleet: Fleet, tokenizer: Tokenizer, conversations: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        """First turns, and second turns after plain decoding's own greedy answer to the first.

        The answers are generated once, so that every configuration continues the same text.
        """
        firsts = [tokenizer.encode(c[:1]) for c in conversations]
        answers: dict[str, str] = {}
        if self.frozen and self.frozen.is_file():
            answers = json.loads(self.frozen.read_text())
        left = {
            turns[0]: ids
            for ids, turns in zip(firsts, conversations, strict=True)
            if len(turns) > 1 and turns[0] not in answers and len(ids) <= self._longest
        }
        if left:
            fleet.prepare([PLAIN.name])
            job = Job(
                list(left.values()),
                max(self.plan.concurrencies),
                self.plan.max_tokens,
                ignore_eos=False,
                keep_outputs=True,
            )
            run = fleet.run(PLAIN.name, job)
            if run is None:
                raise ValueError(f"plain decoding failed: {fleet.failures[PLAIN.name]}")
            answers |= dict(zip(left, map(tokenizer.decode, run.outputs), strict=True))
            if self.frozen:
                atomic.write_json(self.frozen, answers)
        prompts = []
        for first_turn, turns in zip(firsts, conversations, strict=True):
            prompts.append(first_turn)
            if len(turns) > 1 and turns[0] in answers:
                prompts.append(tokenizer.encode([turns[0], answers[turns[0]], turns[1]]))
        return self._short_enough(prompts)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=3600,  # A run may take minutes.
    )
