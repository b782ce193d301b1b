# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which implementation of tree attention was measured to be fastest for which shape, on a GPU.

`benchmarks/gpu.py` writes the table; `ECHO_VLLM_ATTENTION_TABLE` names the file, else one of
`attention_tables/` is used that was measured on this kind of GPU, or on another of the same compute
capability; `ops` asks `preferred` on every call with 16-bit numbers, which is what was measured.
Without a table, or for a head size that it does not have, the order of `dispatch.py` holds.

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


def write_table(
    path: Path, device: str, capability: str, measurements: Sequence[Measurement]
) -> None:
    """Writes the JSON file that `read_table` reads; see `Table`."""
    content = {
        "device": device,
        "capability": capability,
        "measurements": [asdict(m) for m in measurements],
    }
    atomic.write_json(path, content)


@dataclass(frozen=True)
class Table:
    """The measurements of one GPU.

    Attributes:
        device: torch's name of it.
        capability: its compute capability, as "9.0".
        measurements: in any order.
    """

    device: str
    capability: str
    measurements: tuple[Measurement, ...]

    def best(self, group: int, head_size: int, requests: int, rows: int) -> str:
        """The implementation that was fastest at the nearest measured shape of this head size.

        '' if there is none. Near is what differs by the smallest factors in q heads a kv head,
        requests and rows: an attention that is far from all of them is still more like the nearest
        than like nothing.

        Over the contexts of a shape the logarithms of the times add up, so that a long context
        does not outweigh the others; an implementation that lacks one of them does not count.
        """

        def distance(m: Measurement) -> float:
            return sum(
                abs(math.log(theirs / ours))
                for theirs, ours in ((m.group, group), (m.requests, requests), (m.rows, rows))
            )

        alike = [m for m in self.measurements if m.head_size == head_size]
        if not alike or requests < 1 or rows < 1:
            return ""
        nearest = min(alike, key=lambda m: (distance(m), m.group, m.requests, m.rows))
        shape = (nearest.group, nearest.requests, nearest.rows)
        times = [m.microseconds for m in alike if (m.group, m.requests, m.rows) == shape]
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
        table = Table(
            str(content["device"]),
            str(content.get("capability", "")),
            tuple(Measurement(**m) for m in content["measurements"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of attention times ({error}): write one with "
            "`python -m benchmarks.gpu --table FILE`, or unset " + VARIABLE
        ) from error
    for m in table.measurements:
        numbers = (m.group, m.requests, m.rows, *m.microseconds.values())
        if not all(number > 0 for number in numbers):
            raise ValueError(
                f"{path}: group, requests, rows and times must be positive, got {m}: write the "
                "table anew with `python -m benchmarks.gpu --table FILE`"
            )
    return table


def _built_in(device: str, capability: str) -> Table | None:
    """The table of the package that was measured on this kind of GPU, or else one of another with
    the same compute capability."""
    tables = [read_table(path) for path in sorted(FOLDER.glob("*.json"))]
    tables = [t for t in tables if t.device == device or t.capability == capability]
    return min(tables, key=lambda t: t.device != device, default=None)


def check_file() -> None:
    """Read the table that the environment names, if it does.

    Raises:
        ValueError: in one sentence, it is none.
    """
    if path := os.environ.get(VARIABLE):
        read_table(Path(path))


def capability_of_this_gpu() -> str:
    """As in `Table`; '' without a GPU."""
    if not torch.cuda.is_available():
        return ""
    return "{}.{}".format(*torch.cuda.get_device_capability())


@functools.cache
def table_of_this_gpu() -> Table | None:
    """The table that the environment names, if it was measured on a GPU of this compute capability;
    else one of the package."""
    name, capability = torch.cuda.get_device_name(), capability_of_this_gpu()
    path = os.environ.get(VARIABLE)
    if not path:
        return _built_in(name, capability)
    table = read_table(Path(path))
    if table.device == name or table.capability == capability:
        return table
    logger.warning(
        "%s=%s was measured on %s and is not used on %s, which has another compute capability: "
        "measure with `python -m benchmarks.gpu --table FILE`",
        VARIABLE, path, table.device, name,
    )  # fmt: skip
    return None


def describe() -> str:
    """Which table the choice by shape comes from and why, for `echo-vllm doctor`."""
    path = os.environ.get(VARIABLE)
    try:
        check_file()
    except ValueError as error:
        return str(error)
    table = table_of_this_gpu() if torch.cuda.is_available() else None
    if table is not None:
        name = torch.cuda.get_device_name()
        why = "measured on this kind of GPU"
        if table.device != name:
            why = f"the nearest for {name}: compute capability {table.capability} as well"
        where = f" in {path}" if path else ""
        return (
            f"tree_attention by {len(table.measurements)} measurements of {table.device}{where}, "
            f"{why}"
        )
    if not torch.cuda.is_available():
        why = "no GPU to choose a table for"
    elif path:
        why = f"{path} was measured on another compute capability"
    else:
        why = "no table was measured on this compute capability"
    return f"tree_attention in this order for every shape: {why}"


@functools.lru_cache(maxsize=4096)
def preferred(group: int, head_size: int, requests: int, rows: int) -> str:
    """What to run on this GPU for `rows` rows of `requests` requests in all; '' without a table."""
    table = table_of_this_gpu()
    if table is None or requests == 0:
        return ""
    return table.best(group, head_size, requests, max(1, round(rows / requests)))
