# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which implementation of tree attention was measured to be fastest for which shape, on a GPU.

`benchmarks/gpu.py` writes the table; `ECHO_VLLM_ATTENTION_TABLE` names the file, else one of
`attention_tables/` is used if it was measured on this kind of GPU; `ops` asks `preferred` on every
call with 16-bit numbers, which is what was measured. Without a table, or for a shape that nothing
in it resembles, the order of `dispatch.py` holds.

A shape is what the host knows without a look at the device: q heads a kv head, head size, requests
and rows. The context's length is none of that, so an entry weighs all contexts that were measured.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from echo_vllm import atomic

VARIABLE = "ECHO_VLLM_ATTENTION_TABLE"

FOLDER = Path(__file__).parent / "attention_tables"

# A measured shape speaks for others whose requests and rows are at most this many times more or
# fewer, both together.
REACH = 4.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """How long each implementation took.

    Attributes:
        group: q heads of a kv head.
        head_size: D.
        requests, rows: requests, and tree rows of each.
        context: tokens of each.
        microseconds: implementation (`dispatch.NAMES`) -> time of one call.
    """

    group: int
    head_size: int
    requests: int
    rows: int
    context: int
    microseconds: dict[str, float]


def write_table(path: Path, device: str, measurements: Sequence[Measurement]) -> None:
    """Writes the JSON file that `read_table` reads; `device` is torch's name of the GPU."""
    content = {"device": device, "measurements": [asdict(m) for m in measurements]}
    atomic.write_json(path, content)


@dataclass(frozen=True)
class Table:
    """The measurements of one GPU."""

    device: str
    measurements: tuple[Measurement, ...]

    def best(self, group: int, head_size: int, requests: int, rows: int) -> str:
        """The implementation that was fastest at the nearest measured shape, '' if none is near.

        Over the contexts of a shape the logarithms of the times add up, so that a long context
        does not outweigh the others; an implementation that lacks one of them does not count.
        """

        def distance(m: Measurement) -> float:
            return abs(math.log(m.requests / requests)) + abs(math.log(m.rows / rows))

        alike = [m for m in self.measurements if (m.group, m.head_size) == (group, head_size)]
        if not alike or requests < 1 or rows < 1:
            return ""
        nearest = min(alike, key=lambda m: (distance(m), m.requests, m.rows))
        if distance(nearest) > math.log(REACH):
            return ""
        times = [
            m.microseconds
            for m in alike
            if (m.requests, m.rows) == (nearest.requests, nearest.rows)
        ]
        names = set.intersection(*(set(time) for time in times))
        if not names:
            return ""
        return min(
            sorted(names), key=lambda name: math.fsum(math.log(time[name]) for time in times)
        )


def read_table(path: Path) -> Table:
    """The table in a file of `write_table`.

    Raises ValueError if the file is not one, or a time is not positive.
    """
    try:
        content = json.loads(path.read_text())
        table = Table(content["device"], tuple(Measurement(**m) for m in content["measurements"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no table of attention times ({error}): write one with "
            "`python -m benchmarks.gpu --table FILE`, or unset " + VARIABLE
        ) from error
    for m in table.measurements:
        numbers = (m.requests, m.rows, *m.microseconds.values())
        if not all(number > 0 for number in numbers):
            raise ValueError(
                f"{path}: requests, rows and times must be positive, got {m}: write the table "
                "anew with `python -m benchmarks.gpu --table FILE`"
            )
    return table


def built_in(device: str) -> Table | None:
    """The table of the package that was measured on this kind of GPU, if there is one."""
    tables = (read_table(path) for path in sorted(FOLDER.glob("*.json")))
    return next((table for table in tables if table.device == device), None)


@functools.cache
def table_of_this_gpu() -> Table | None:
    """The table that the environment names, if it was measured on this kind of GPU; else one of
    the package."""
    path = os.environ.get(VARIABLE)
    name = torch.cuda.get_device_name()
    if not path:
        return built_in(name)
    table = read_table(Path(path))
    if table.device != name:
        logger.warning(
            "%s=%s was measured on %s and is not used on %s: measure with "
            "`python -m benchmarks.gpu --table FILE`",
            VARIABLE, path, table.device, name,
        )  # fmt: skip
        return None
    return table


def describe() -> str:
    """Where the choice by shape comes from, for `echo-vllm doctor`."""
    path = os.environ.get(VARIABLE)
    if not path:
        table = table_of_this_gpu() if torch.cuda.is_available() else None
        if table is None:
            return f"tree_attention in this order for every shape ({VARIABLE} is unset)"
        return f"tree_attention by {len(table.measurements)} measurements of {table.device}"
    try:
        table = read_table(Path(path))
    except ValueError as error:
        return str(error)
    return f"tree_attention by {len(table.measurements)} measurements of {table.device} in {path}"


@functools.lru_cache(maxsize=4096)
def preferred(group: int, head_size: int, requests: int, rows: int) -> str:
    """What to run on this GPU for `rows` rows of `requests` requests in all; '' without a table."""
    table = table_of_this_gpu()
    if table is None or requests == 0:
        return ""
    return table.best(group, head_size, requests, max(1, round(rows / requests)))
