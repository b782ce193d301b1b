# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which run comes next: interleaved rounds over configurations, temperatures and loads.

In a round and at each load every configuration runs the same chats, one right after the other, in
an order that shifts by one each time, so that a machine that gets slower or faster does so for each
of them. The rounds take different chats, as far as there are enough.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from echo_vllm.conversations import Chat
from echo_vllm.offline.bench.closed_loop import Job
from echo_vllm.offline.bench.configurations import PLAIN, Configuration
from echo_vllm.offline.bench.engine_process import EngineOptions
from echo_vllm.offline.bench.fleet import Fleet, Kind, Launch, launcher
from echo_vllm.offline.bench.tables import A_SECOND, AT_ONCE, Sample

WARM_UP_TOKENS = 32

Cell = tuple[str, float, float, int]
"""Configuration, load, temperature, round."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        configurations: plain decoding, the base of all ratios, is one of them.
        loads: requests at once, or those that arrive a second.
        rounds: how often, each time with other chats.
        max_tokens: of an answer at most, on average.
        spread: how far, as a share, requests may have fewer or more.
        chats_per_client: how many each of the concurrent clients holds in a run.
        ignore_eos: whether every answer has all of its tokens.
        arrival_seconds: of an open loop, for how long requests arrive; None for a closed loop.
        tpot_ms: milliseconds a token up to which a request counts as good in an open loop.
    """

    configurations: tuple[Configuration, ...]
    loads: tuple[float, ...]
    temperatures: tuple[float, ...] = (0.0,)
    rounds: int = 3
    max_tokens: int = 128
    chats_per_client: int = 1
    ignore_eos: bool = False
    spread: float = 0.0
    arrival_seconds: float | None = None
    tpot_ms: float = 100.0

    @property
    def unit(self) -> str:
        """Of a load."""
        return AT_ONCE if self.arrival_seconds is None else A_SECOND

    def chats(self, load: float) -> int:
        """Chats of a run: enough that they start and end at different times."""
        each = self.chats_per_client if self.arrival_seconds is None else self.arrival_seconds
        return max(4, round(each * load))

    def weight(self, load: float) -> float:
        """A run's share of the work: the more requests share a step, the cheaper a token."""
        if self.arrival_seconds is None:
            return self.chats(load) / math.sqrt(load)
        return self.arrival_seconds

    def missing(self, done: Collection[Cell]) -> dict[tuple[float, float, int], list[str]]:
        """(load, temperature, round) -> configurations that have yet to run there.

        Where some have run in an earlier session and some have not, plain decoding runs again, so
        that every ratio has both its halves from one session.
        """
        names = [c.name for c in self.configurations]
        found = {}
        for number in range(self.rounds):
            for temperature in self.temperatures:
                for load in self.loads:
                    row = (load, temperature, number)
                    left = {name for name in names if (name, *row) not in done}
                    if left:
                        found[row] = [n for n in names if n in left or n == PLAIN.name]
        return found

    def runs(
        self, missing: dict[tuple[float, float, int], list[str]], at_once: int
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
                    for load in self.loads:
                        row = (load, temperature, number)
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
        conversations: the user's turns of each chat.
        keep_alive: the most workers alive at a time.
        logs: the folder of their logs.
        launch: what starts a worker, if not that of its kind.
    """

    plan: Plan
    options: EngineOptions
    kind: Kind
    conversations: Sequence[list[str]]
    keep_alive: int
    logs: Path
    launch: Launch | None = None

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
            ValueError: no prompt is short enough, or the model has no tokenizer for chats.
        """
        plan = self.plan
        chats = self._fitting_chats()
        missing = plan.missing(done)
        progress = _progress(console or Console(stderr=True))
        total = sum(plan.weight(row[0]) * len(names) for row, names in missing.items())
        with progress:
            task = progress.add_task("starting", total=total)
            fleet = Fleet(
                plan.configurations,
                self.launch or launcher(self.kind, self.options),
                self.logs,
                keep_alive=self.keep_alive,
                # Loading an engine is Python on one core, mostly.
                start_at_once=1 if self.kind == "server" else 2,
                warm_up=self._warm_up(chats),
                say=lambda text: progress.update(task, description=text),
            )
            with fleet:
                for group, cells in plan.runs(missing, self.keep_alive):
                    fleet.prepare(group)
                    for name, load, temperature, number in cells:
                        text = f"round {number + 1}/{plan.rounds}, {load:g} {plan.unit}, {name}"
                        if len(plan.temperatures) > 1:
                            text += f", T={temperature:g}"
                        progress.update(task, description=text)
                        known = set(fleet.failures)
                        job = self._job(chats, load, temperature, number)
                        if run := fleet.run(name, job):
                            on_sample(Sample(name, load, number, run, temperature, session))
                        for failed in fleet.failures.keys() - known:
                            progress.print(f"{failed} failed: {fleet.failures[failed]}")
                        progress.advance(task, plan.weight(load))
        return fleet.failures

    def _fitting_chats(self) -> list[tuple[list[int], list[str]]]:
        """The first prompt and the turns of each chat whose first turn fits."""
        longest = self.options.max_model_len
        longest -= math.ceil(self.plan.max_tokens * (1 + self.plan.spread))
        chat = Chat(self.options.model)
        encoded = [(chat.encode(turns[:1]), turns) for turns in self.conversations]
        fitting = [(ids, turns) for ids, turns in encoded if len(ids) <= longest]
        if not fitting:
            raise ValueError(f"no prompt has at most {longest} tokens, which is what fits")
        return fitting

    def _job(
        self,
        chats: Sequence[tuple[list[int], list[str]]],
        load: float,
        temperature: float,
        number: int,
    ) -> Job:
        plan, count = self.plan, self.plan.chats(load)
        # Beginning again at the end of the list.
        chosen = [chats[(number * count + i) % len(chats)] for i in range(count)]
        return Job(
            prompts=[ids for ids, _ in chosen],
            load=load,
            max_tokens=plan.max_tokens,
            turns=[turns for _, turns in chosen],
            room=self.options.max_model_len,
            temperature=temperature,
            ignore_eos=plan.ignore_eos,
            spread=plan.spread,
            open_loop=plan.arrival_seconds is not None,
            seed=number,
            tpot_ms=plan.tpot_ms,
        )

    def _warm_up(self, chats: Sequence[tuple[list[int], list[str]]]) -> list[Job]:
        """Every load at every temperature, with the prompts that are measured last, if at all."""
        plan = self.plan
        loads = plan.loads if plan.arrival_seconds is None else (self.options.max_num_seqs,)
        return [
            Job(
                [chats[-1 - i % len(chats)][0] for i in range(count)],
                count,
                WARM_UP_TOKENS,
                temperature=temperature,
            )
            for temperature in plan.temperatures
            for count in map(round, loads)
        ]


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
