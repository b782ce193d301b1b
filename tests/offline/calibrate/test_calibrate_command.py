# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm calibrate`: from a recorded trace, from a real run, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from echo_vllm.cli.calibrate import calibrate
from echo_vllm.conversations import PROMPTS
from echo_vllm.forecast import CostCache, CostCurve, CostKey, StepCost
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.trace_format import TraceHeader, TraceStep, TraceWriter, read_trace
from tests.conftest import ROOT

COST = StepCost(
    verify=CostCurve((1, 16, 64, 256), (0.02, 0.02, 0.03, 0.09)),
    draft_level=CostCurve((1, 64), (0.002, 0.004)),
    catch_up=CostCurve((1, 64), (0.002, 0.004)),
    other=0.001,
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wide terminal, and an empty cost cache."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("ECHO_VLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def trace_file(steps: list[TraceStep], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl.gz"
    header = TraceHeader(
        "org/target", "head", "float32", 30, {"policy": "topn", "top_k": 3}, "2025-01-01"
    )
    with TraceWriter(path, header) as writer:
        for step in steps[:50]:
            writer.append(step)
    return path


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(calibrate)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: str | Path) -> str:
    """The one line on stderr of a command that ends with status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_trace_becomes_a_profile(trace_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "p.json"
    result = run(
        *("models/target", "--drafter", "some/head", "-o", profile, "--trace", trace_file),
    )
    assert result.exit_code == 0, result.output
    made = DrafterProfile.load(profile)
    assert (made.target, made.drafter, made.num_steps) == ("org/target", "head", 1000)
    assert made.prompts == "trace.jsonl.gz, recorded on 2025-01-01"
    assert "Youden" in made.objective
    assert "no step cost was measured" in result.stderr
    for depth in made.depths:
        assert f"{depth.auc:.3f}" in result.stdout
    assert f"Wrote {profile}." in result.stdout


def test_a_second_trace_has_drawn_candidates(
    trace_file: Path, steps: list[TraceStep], tmp_path: Path
) -> None:
    drawn, profile = tmp_path / "drawn.jsonl", tmp_path / "p.json"
    header = TraceHeader("org/target", "head", "float32", 30, {"policy": "topn"}, "2025-01-01")
    with TraceWriter(drawn, header) as writer:
        for step in steps[:50]:
            writer.append(replace(step, requests=[replace(r, drawn=True) for r in step.requests]))
    base = ("target", "--drafter", "head", "-o", profile, "--trace", trace_file, "--trace")
    result = run(*base, drawn)
    assert result.exit_code == 0, result.output
    made = DrafterProfile.load(profile)
    assert made.drawn is not None
    assert made.drawn.temperature is None
    assert [depth.depth for depth in made.drawn.depths] == [1, 2, 3, 4]
    assert "Drawn candidates" in result.stdout
    assert "has no tree of which all 30 nodes were verified" in refused(*base, trace_file)


def test_measured_costs_set_the_thresholds(trace_file: Path, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"schema_version": 1, "cost": COST.to_dict()}))
    profiles = []
    profile, report = tmp_path / "p.json", tmp_path / "r.html"
    for concurrency, more in ((1, ()), (64, ("--report", report))):
        result = run(
            *("target", "--drafter", "head", "-o", profile, "--trace", trace_file),
            *("--costs", costs, "--concurrency", str(concurrency), *more),
        )
        assert result.exit_code == 0, result.output
        profiles.append(DrafterProfile.load(profile))
    low, high = profiles
    assert f"Wrote {profile} and {report}." in result.stdout
    assert "Cost of verification" in report.read_text()
    assert "at 1 requests" in low.objective
    assert "at 64 requests" in high.objective
    # Rows are nearly free for one request and dear for many.
    assert high.gates()[1] > low.gates().get(1, 0.0)


def test_costs_that_were_measured_here_are_found(trace_file: Path, tmp_path: Path) -> None:
    """The newest of the same models and dtype; others and damaged files do not count."""
    profile = tmp_path / "p.json"
    arguments = ("target", "--drafter", "head", "-o", profile, "--trace", trace_file)
    cache = CostCache()
    key = CostKey(
        "/models/target", "/models/head", "", "torch.float32", "", "", "cpu", 2, "1", "1", 9
    )
    half = StepCost(COST.draft_level, COST.draft_level, COST.catch_up)
    for number, (kept, cost) in enumerate(
        [
            (replace(key, threads=1), half),
            (key, COST),
            (replace(key, target="other"), half),
            (replace(key, dtype="torch.bfloat16, NONE"), half),
        ]
    ):
        path = cache.save(kept, cost)
        assert path is not None
        os.utime(path, (number, number))
    (cache.folder / "damaged.json").write_text("{")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"note: step cost from {cache.path(key)}" in result.stderr
    plain = f"plain decoding makes {8 / COST.plain_step(8):.4g}"
    assert plain in DrafterProfile.load(profile).objective


def test_arguments_without_sense_are_refused(trace_file: Path, tmp_path: Path) -> None:
    base = ("target", "--drafter", "head", "-o", tmp_path / "p.json")
    assert "--prompts is missing" in refused(*base)
    assert "leave out --prompts" in refused(*base, "--trace", trace_file, "--prompts", "x")
    assert "is not a trace of echo-vllm" in refused(*base, "--trace", __file__)
    missing = tmp_path / "none.jsonl"
    assert "cannot be read (No such file" in refused(*base, "--trace", missing)
    assert f"{missing} cannot be read (No such file" in refused(*base, "--prompts", missing)
    missing.write_text('{"text": "hi"}\n')
    assert 'must be like {"prompt": "..."}' in refused(*base, "--prompts", missing)
    assert "make the folder" in refused(*base[:-1], tmp_path / "no" / "p.json")
    other = ("other", *base[1:], "--trace", trace_file)
    assert "MODEL is other, but the trace was recorded with target" in refused(*other)
    wrong_costs = ("--trace", trace_file, "--costs", missing)
    missing.write_text("[]")
    assert "is not a step cost" in refused(*base, *wrong_costs)
    missing.write_text("{}")
    assert "is not a step cost" in refused(*base, *wrong_costs)
    missing.write_text("{")
    assert "cannot be read" in refused(*base, *wrong_costs)
    assert not (tmp_path / "p.json").exists()


def test_a_trace_without_whole_trees_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, TraceHeader("target", "head", "float32", 30, {}, "2025-01-01")):
        pass
    base = ("target", "--drafter", "head", "-o", tmp_path / "p.json")
    assert "has no tree of which all 30 nodes were verified" in refused(*base, "--trace", path)


@pytest.mark.full
def test_the_demo_is_calibrated_by_a_real_run(
    demo_target: Path, demo_head: Path, tmp_path: Path
) -> None:
    profile, report, trace = (tmp_path / name for name in ("p.json", "r.html", "t.jsonl"))
    # A process of its own, as for a user: the engine stays in the process that has started it.
    code = (
        "import typer; from echo_vllm.cli.calibrate import calibrate; "
        "app = typer.Typer(); app.command()(calibrate); app()"
    )
    arguments = [
        *(demo_target, "--drafter", demo_head, "--prompts", PROMPTS, "-o", profile),
        *("--report", report, "--save-trace", trace, "--num-prompts", "12", "--tokens", "24"),
        *("--max-depth", "3", "--top-k", "3", "--concurrency", "4", "--dtype", "float32"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = DrafterProfile.load(profile)
    assert (made.target, made.drafter) == (demo_target.name, demo_head.name)
    assert [d.depth for d in made.depths] == [1, 2, 3]
    accepted = [d.acceptance for d in made.depths]
    assert accepted == sorted(accepted, reverse=True)
    assert accepted[0] > 0.3
    assert report.stat().st_size > 50_000
    # The whole pool was verified, so the fate of every candidate is known.
    header, steps = read_trace(trace)
    assert header.num_speculative_tokens == 21
    trees = [tree for step in steps for tree in step.requests]
    assert sum(tree.is_fully_verified for tree in trees) > 0.9 * len(trees)
    assert made.num_steps > 12 * 24 / 4 / 2
    assert made.drawn is not None
    assert made.drawn.temperature == 1.0
    assert made.drawn.depths[0].acceptance > 0.3
    # And again from the kept traces.
    kept = ("--trace", trace, "--trace", tmp_path / "t.drawn.jsonl")
    again = run(demo_target, "--drafter", demo_head, "-o", tmp_path / "q.json", *kept)
    assert again.exit_code == 0, again.output
    repeated = DrafterProfile.load(tmp_path / "q.json")
    assert repeated.depths[0].auc == made.depths[0].auc
    assert repeated.drawn is not None
    assert repeated.drawn.depths == made.drawn.depths
