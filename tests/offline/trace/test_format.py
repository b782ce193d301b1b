# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The trace file: what goes in comes out, and what is not a trace is refused in one sentence."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo_vllm.trace_format import (
    TraceError,
    TraceHeader,
    TraceRequest,
    TraceStep,
    TraceWriter,
    read_trace,
)

HEADER = TraceHeader(
    model="target",
    drafter="head",
    dtype="float32",
    num_speculative_tokens=16,
    echo={"policy": "topn", "max_depth": 6, "top_k": 4},
    created="2026-01-02T03:04:05+00:00",
    versions={"vllm": "0.32.0"},
)
REQUEST = TraceRequest(
    id="r0",
    context=17,
    parents=[-1, -1, 0, 0, 1],
    logprobs=[-0.1, -1.5, -0.3, -2.0, -1.7],
    level_starts=[0, 2],
    selected=[0, 2, 1],
    accepted=[0, 2],
)
STEP = TraceStep(
    step=3,
    rows=9,
    decoding=2,
    prefill_tokens=4,
    verify_s=0.02,
    draft_s=0.01,
    draft_levels=[1, 4],
    plan={"requests": 2},
    requests=[REQUEST],
)


@st.composite
def requests(draw: st.DrawFn) -> TraceRequest:
    parents: list[int] = []
    starts: list[int] = []
    above = [-1]
    for _ in range(draw(st.integers(0, 3))):
        starts.append(len(parents))
        level = sorted(draw(st.lists(st.sampled_from(above), max_size=4))) if above else []
        above = list(range(len(parents), len(parents) + len(level)))
        parents += level
    if not parents:
        starts = starts[:1]
    scores = st.floats(max_value=0.0, allow_infinity=False, allow_nan=False, width=32)
    path = [draw(st.integers(0, len(parents) - 1))] if parents else []
    while path and parents[path[0]] != -1:
        path.insert(0, parents[path[0]])
    selected = draw(st.permutations(range(len(parents))))
    return TraceRequest(
        id=draw(st.text(max_size=5)),
        context=draw(st.integers(1, 10**6)),
        parents=parents,
        logprobs=[draw(scores) for _ in parents],
        level_starts=starts,
        selected=selected,
        accepted=path,
    )


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.lists(requests(), max_size=3), max_size=4), packed=st.booleans())
def test_what_is_written_is_read(
    tmp_path: Path, steps: list[list[TraceRequest]], packed: bool
) -> None:
    path = tmp_path / ("trace.jsonl.gz" if packed else "trace.jsonl")
    written = [replace(STEP, step=i, requests=r) for i, r in enumerate(steps)]
    with TraceWriter(path, HEADER) as writer:
        for step in written:
            writer.append(step)
    header, read = read_trace(path)
    assert header == HEADER
    assert list(read) == written


def test_float32_values_are_exact_and_short(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(-5, 3, 500).clip(max=0).astype(np.float32)
    request = TraceRequest("r", 1, [-1] * 500, scores.tolist(), [0], [], [])
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.append(replace(STEP, requests=[request]))
    (step,) = read_trace(path)[1]
    assert step.requests[0].logprobs == tuple(scores.tolist())
    assert max(len(repr(x)) for x in json.loads(path.read_text().split("\n")[1])["requests"][0][
        "logprobs"
    ]) <= 16  # fmt: skip


def test_depths_and_full_verification_follow_from_the_candidates() -> None:
    assert REQUEST.depths().tolist() == [1, 1, 2, 2, 2]
    assert not REQUEST.is_fully_verified
    assert replace(REQUEST, selected=[0, 2, 1, 4, 3]).is_fully_verified


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with (
        TraceWriter(tmp_path / "trace.jsonl", HEADER) as writer,
        pytest.raises(TraceError, match="finite numbers only"),
    ):
        writer.append(
            replace(STEP, requests=[replace(REQUEST, logprobs=[float("-inf")] + [-9.0] * 4)])
        )


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_was_flushed_survives_a_killed_writer(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writer = TraceWriter(path, HEADER)
    for i in range(70):
        writer.append(replace(STEP, step=i))
    left = path.read_bytes()  # as a killed process leaves it
    writer.close()
    # In the compressed file the end itself is missing; in the other one a line breaks.
    path.write_bytes(left if name.endswith(".gz") else left + b'{"step":')
    assert [step.step for step in read_trace(path, whole=False)[1]][:64] == list(range(64))
    with pytest.raises(TraceError, match=r"was cut off after 6\d steps; record it again"):
        list(read_trace(path)[1])


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_is_not_a_trace_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(TraceError, match=r"cannot be read \(No such file"):
        read_trace(path)
    for content in (b"", b"hello\n", b"[1, 2]\n", b'{"format": "other"}\n', b"\xff\xfe\n"):
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(TraceError, match="is not a trace of echo-vllm"):
            read_trace(path)
    path.write_bytes(b"not compressed\n")
    with pytest.raises(TraceError, match="is not a trace of echo-vllm"):
        read_trace(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({**HEADER.to_dict(), "version": 9}) + "\n")
    with pytest.raises(TraceError, match=r"has version 9 .* reads version 1; record it again"):
        read_trace(path)


def test_a_header_with_other_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({**HEADER.to_dict(), "colour": "red"}) + "\n")
    with pytest.raises(TraceError, match="unexpected keyword argument 'colour'"):
        read_trace(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parents": [-1, -1, 0, 0, 4]}, "neither -1 nor an earlier candidate"),
        ({"parents": [-1, -2, 0, 0, 1]}, "neither -1 nor an earlier candidate"),
        ({"logprobs": [-1.0]}, "5 parents but 1 logprobs"),
        ({"level_starts": [1, 2]}, "do not split 5 candidates"),
        ({"level_starts": [0, 6]}, "do not split 5 candidates"),
        ({"level_starts": []}, "do not split 5 candidates"),
        ({"selected": [0, 2, 5]}, "selected names a candidate that is not there"),
        ({"selected": [0, 2, 2]}, "selected names a candidate twice"),
        ({"accepted": [2]}, "is not a path from the root"),
        ({"accepted": [0, 3]}, "was not selected"),
    ],
)
def test_a_damaged_request_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.append(STEP)
        writer.append(replace(STEP, requests=[replace(REQUEST, **changes)]))  # type: ignore[arg-type]
    steps = read_trace(path)[1]
    assert next(steps) == STEP
    with pytest.raises(TraceError, match=r"line 3 of .* is not a step of a trace") as caught:
        next(steps)
    assert message in str(caught.value)


def test_a_step_without_a_field_names_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = STEP.to_dict()
    del line["requests"]
    path.write_text(json.dumps(HEADER.to_dict()) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(TraceError, match="field 'requests' is missing"):
        list(read_trace(path)[1])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be written \(No such file or directory\)"):
        TraceWriter(tmp_path / "none" / "trace.jsonl", HEADER)


@pytest.mark.parametrize("name", ["trace.jsonl", "my.trace.jsonl.gz"])
def test_a_restart_loses_no_trace(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for run in range(3):
        TraceWriter(path, HEADER).close()  # A start that ends before its first step.
        with TraceWriter(path, replace(HEADER, created=str(run))) as writer:
            writer.append(STEP)
    stem, _, ending = name.partition(".jsonl")
    names = [f"{stem}.{number}.jsonl{ending}" for number in (1, 2)] + [name]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    assert [read_trace(tmp_path / file)[0].created for file in names] == ["0", "1", "2"]


def test_a_file_of_another_kind_is_kept_as_well(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("mine\n")
    with TraceWriter(path, HEADER) as writer:
        assert writer.kept == tmp_path / "notes.1.jsonl"
    assert writer.kept.read_text() == "mine\n"
