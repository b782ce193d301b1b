# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The trace file: JSON lines, one a decoding step, after a header line.

The engine writes it (`TraceWriter`), calibration and replay read it (`read_trace`). A name that
ends in .gz is compressed. Line 1 names the format and its version and says what was run; every
further line is one step in which at least one tree was verified, with the candidates as drafted,
before any selection, and the path that the target accepted.

Log-probabilities are float32 values and survive the file exactly: they are written in the fewest
digits that identify the float32, and read back to it.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import operator
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, cast

import numpy as np

FORMAT = "echo-vllm-trace"
VERSION = 1
FLUSH_EVERY = 64
"""Steps after which what was written is handed to the operating system."""


class TraceError(ValueError):
    """What is wrong with a trace, as one sentence for the user."""


@dataclass(frozen=True)
class TraceHeader:
    """What was run when the trace was recorded.

    Attributes:
        model, drafter: names or paths of target and draft head.
        dtype: of the target, as vLLM calls it.
        num_speculative_tokens: the most nodes of one request's tree (N).
        echo: the echo section of the config, defaults filled in.
        created: ISO 8601 date and time.
        versions: package name -> version.
    """

    model: str
    drafter: str
    dtype: str
    num_speculative_tokens: int
    echo: Mapping[str, Any]
    created: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **vars(self)}


@dataclass(frozen=True)
class TraceRequest:
    """One request of a step: its candidates, what was verified, and what was accepted.

    The P' candidates are the finite columns of the request's pool in the pool's order; every index
    below counts them. Sequences are kept as tuples, log-probabilities as float32 values.

    Attributes:
        id: the request's name in the engine.
        context: committed tokens when the tree was drafted, the root included.
        parents: [P'], an earlier candidate, or -1 for the root.
        logprobs: [P'], log-probability of the path from the root (nats), float32.
        level_starts: [D], the first candidate of each depth, depth 1 first.
        selected: [n], the nodes that were verified, in the order of the tree.
        accepted: [a], the accepted path, the root's child first.
        drawn: whether the candidates were drawn. `logprobs` are then the logarithms of the accepted
            tokens that were expected of their slots, before they were drawn (docs/drawn.md).
    """

    id: str
    context: int
    parents: Sequence[int]
    logprobs: Sequence[float]
    level_starts: Sequence[int]
    selected: Sequence[int]
    accepted: Sequence[int]
    drawn: bool = False

    def __post_init__(self) -> None:
        for name in ("parents", "level_starts", "selected", "accepted"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "logprobs", tuple(array("f", self.logprobs)))

    @property
    def num_candidates(self) -> int:
        return len(self.parents)

    @property
    def is_fully_verified(self) -> bool:
        """Whether every candidate was verified, so that the fate of each is known."""
        return len(self.selected) == len(self.parents)

    def depths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[P'] int64, the depth of every candidate, 1 for a child of the root."""
        bounds = [*self.level_starts, self.num_candidates]
        return np.repeat(np.arange(1, len(bounds)), np.diff(bounds))

    def validate(self) -> None:
        """Check what every reader relies on.

        Raises:
            ValueError: says what does not hold.
        """
        size = len(self.parents)
        if len(self.logprobs) != size:
            raise ValueError(f"{size} parents but {len(self.logprobs)} logprobs")
        if size and not (
            min(self.parents) >= -1 and all(map(operator.lt, self.parents, itertools.count()))
        ):
            raise ValueError("a parent is neither -1 nor an earlier candidate")
        starts = self.level_starts
        if any(map(operator.gt, starts, starts[1:])) or (
            (starts[0] != 0 or starts[-1] > size) if starts else size
        ):
            raise ValueError(f"level_starts {list(starts)} do not split {size} candidates")
        if self.selected and not 0 <= min(self.selected) <= max(self.selected) < size:
            raise ValueError("selected names a candidate that is not there")
        if len(set(self.selected)) != len(self.selected):
            raise ValueError("selected names a candidate twice")
        above = -1
        for node in self.accepted:
            if not 0 <= node < size or self.parents[node] != above:
                raise ValueError(f"accepted {list(self.accepted)} is not a path from the root")
            above = node
        if not set(self.accepted) <= set(self.selected):
            raise ValueError("accepted holds a candidate that was not selected")

    def to_dict(self) -> dict[str, Any]:
        # The shortest decimal of the float32, not of the same value as a double.
        digits = np.asarray(self.logprobs, dtype=np.float32).astype(str)
        fields = vars(self) | {"logprobs": [float(text) for text in digits]}
        if not self.drawn:
            del fields["drawn"]
        return fields


@dataclass(frozen=True)
class TraceStep:
    """One step of the engine in which at least one tree was verified.

    Attributes:
        step: number of the engine step in which the trees were verified.
        rows: rows of that target forward: roots, nodes and prefill tokens.
        decoding: requests that decoded in it, with or without a tree.
        prefill_tokens: rows that were prefill.
        verify_s: seconds of the target forward, the sampling and the commit.
        draft_s: seconds in which THESE trees were drafted (catch-up forward and levels).
        draft_levels: rows of each drafter level forward, the catch-up forward not counted.
        plan: what the policy was told about the step (DraftPlan.to_dict()), or None.
        requests: the requests that had a tree.
    """

    step: int
    rows: int
    decoding: int
    prefill_tokens: int
    verify_s: float
    draft_s: float
    draft_levels: Sequence[int]
    plan: Mapping[str, Any] | None
    requests: Sequence[TraceRequest]

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_levels", tuple(self.draft_levels))
        object.__setattr__(self, "requests", tuple(self.requests))

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "requests": [request.to_dict() for request in self.requests]}


class TraceWriter:
    """Writes a trace; a context manager.

    The header is written at once. What was appended reaches the file every FLUSH_EVERY steps and
    at `close`, so that a killed engine leaves a trace that `read_trace(..., whole=False)` reads.
    """

    def __init__(self, path: str | Path, header: TraceHeader) -> None:
        """Create the file. One that is there keeps its content under a name with a number.

        So a server that is started again with the same configuration loses nothing. One that ended
        before its first step has nothing to keep.

        Attributes:
            kept: where the content of an older file is now, or None.

        Raises:
            TraceError: the file cannot be written.
        """
        self.path = Path(path)
        self.num_steps = 0
        try:
            self.kept = _keep_older(self.path)
            self._file: IO[str] = _open(self.path, "w")
        except OSError as error:
            raise TraceError(
                f"the trace {self.path} cannot be written ({error.strerror or error}); give the "
                "path of a file in a folder that exists and is writable."
            ) from None
        self._write(header.to_dict())
        self._file.flush()

    def append(self, step: TraceStep) -> None:
        """Add one step.

        Raises:
            TraceError: a number of the step is not finite.
        """
        self._write(step.to_dict())
        self.num_steps += 1
        if self.num_steps % FLUSH_EVERY == 0:
            self._file.flush()

    def close(self) -> None:
        """Finish the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            text = json.dumps(line, separators=(",", ":"), allow_nan=False)
        except ValueError as error:
            raise TraceError(
                f"a trace holds finite numbers only ({error}); leave candidates without a finite "
                "log-probability out."
            ) from None
        self._file.write(text + "\n")


def read_trace(path: str | Path, *, whole: bool = True) -> tuple[TraceHeader, Iterator[TraceStep]]:
    """Open a trace.

    Args:
        path: the file; a name that ends in .gz is decompressed.
        whole: whether a trace that was cut off is an error. If not, its whole steps are read.

    Returns:
        The header, and the steps in the order of the file, read as they are asked for.

    Raises:
        TraceError: the file is missing, is not a trace, or has another version; while iterating,
            a line is not a step, or the file was cut off.
    """
    where = Path(path)
    try:
        file = _open(where, "r")
    except OSError as error:
        raise _unreadable(where, error) from None
    try:
        header = _read_header(where, file)
    except BaseException:
        file.close()
        raise
    return header, _read_steps(where, file, whole)


def beside(path: Path, label: object) -> Path:
    """`trace.LABEL.jsonl.gz` for `trace.jsonl.gz`, and `trace.LABEL.jsonl` for `trace.jsonl`."""
    packed = ".gz" if path.name.endswith(".gz") else ""
    plain = Path(path.name.removesuffix(packed))
    return path.with_name(f"{plain.stem}.{label}{plain.suffix}{packed}")


def _keep_older(path: Path) -> Path | None:
    """Rename a file with content to the first free of `trace.1.jsonl`, `trace.2.jsonl`, ..."""
    if not path.is_file() or not _has_content(path):
        return None
    places = (beside(path, number) for number in itertools.count(1))
    return path.rename(next(place for place in places if not place.exists()))


def _has_content(path: Path) -> bool:
    """Whether a file is anything but empty or the header of a trace."""
    if not path.stat().st_size:
        return False
    try:
        with _open(path, "r") as file:
            is_header = json.loads(file.readline())["format"] == FORMAT
            return not is_header or bool(file.readline())
    except EOFError:  # The first step of a compressed trace that was cut off.
        return False
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return True


def _open(path: Path, mode: str) -> IO[str]:
    if path.name.endswith(".gz"):
        # Level 6 takes half the time of the default 9 for a few per cent of size.
        packed = gzip.open(path, mode + "b", compresslevel=6)  # noqa: SIM115
        return cast(IO[str], io.TextIOWrapper(packed, encoding="utf-8"))
    return path.open(mode, encoding="utf-8")


def _unreadable(path: Path, error: OSError) -> TraceError:
    return TraceError(
        f"the trace {path} cannot be read ({error.strerror or error}); give the path of a file "
        "that `echo-vllm trace record` has written."
    )


def _read_header(path: Path, file: IO[str]) -> TraceHeader:
    not_a_trace = TraceError(
        f"{path} is not a trace of echo-vllm; give a file that `echo-vllm trace record` has "
        "written."
    )
    try:
        line: Any = json.loads(file.readline())
    except gzip.BadGzipFile:
        raise not_a_trace from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, EOFError):
        raise not_a_trace from None
    if not isinstance(line, dict) or line.get("format") != FORMAT:
        raise not_a_trace
    version = line.pop("version", None)
    if version != VERSION:
        raise TraceError(
            f"{path} has version {version!r} of the trace format, and this echo-vllm reads "
            f"version {VERSION}; record it again."
        )
    del line["format"]
    try:
        return TraceHeader(**line)
    except TypeError as error:
        raise TraceError(
            f"the header of {path} is damaged ({_of_call(error)}); record the trace again."
        ) from None


def _read_steps(path: Path, file: IO[str], whole: bool) -> Iterator[TraceStep]:
    with file:
        for number in itertools.count(2):
            try:
                text = file.readline()
                ended = not text
                cut_off = bool(text) and not text.endswith("\n")
            except EOFError:  # gzip's word for a missing end
                ended, cut_off = False, True
            if cut_off:
                if whole:
                    raise TraceError(
                        f"the trace {path} was cut off after {number - 2} steps; record it again, "
                        "and let the engine end by itself."
                    )
                return
            if ended:
                return
            try:
                yield _step(json.loads(text))
            except (ValueError, TypeError, KeyError) as error:
                raise TraceError(
                    f"line {number} of {path} is not a step of a trace ({_of_call(error)}); "
                    "record it again."
                ) from None


def _step(line: dict[str, Any]) -> TraceStep:
    requests = tuple(TraceRequest(**request) for request in line.pop("requests"))
    for request in requests:
        request.validate()
    return TraceStep(**line, requests=requests)


def _of_call(error: Exception) -> str:
    """The complaint alone, without the name of the function that was called."""
    if isinstance(error, KeyError):
        return f"field {error} is missing"
    return str(error).rpartition("__init__() ")[2]
