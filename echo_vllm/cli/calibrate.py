# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm calibrate`: makes a drafter's profile from warm-up prompts."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from echo_vllm import atomic
from echo_vllm.cli.console import (
    Drafter,
    Target,
    errors,
    fail,
    located,
    note,
    read_prompts,
    read_step_cost,
    record_prompts,
)
from echo_vllm.config import MAX_DEPTH, MAX_NODES, MAX_TOP_K, num_candidates
from echo_vllm.forecast import CostCache, CostError, StepCost, fit_hinge
from echo_vllm.trace_format import TraceError, TraceHeader, beside, read_trace

if TYPE_CHECKING:
    from echo_vllm.forecast.drafter_profile import DrawnProfile
    from echo_vllm.forecast.forecaster import Kind
    from echo_vllm.offline.calibrate.fit import Calibration
    from echo_vllm.offline.calibrate.samples import Samples


def calibrate(
    model: Target,
    drafter: Drafter,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile, a JSON file.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="JSON lines with 'prompt' or 'turns'; may be given several times."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="An HTML file with the plots.")] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            help="A recorded trace, instead of running the engine; a second one with drawn "
            "candidates."
        ),
    ] = None,
    save_trace: Annotated[
        Path | None,
        typer.Option(
            help="Keep the recorded trace (.jsonl or .jsonl.gz), and that of drawn candidates "
            "beside it as NAME.drawn.jsonl."
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            help="Measured step cost that the thresholds weigh tokens against, a JSON file of the "
            "cost cache.",
            show_default="what was measured here for the same models and dtype",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to run.", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.0,
    drawn_temperature: Annotated[
        float,
        typer.Option(
            min=0,
            help="Temperature of a second run, with drawn candidates; 0: none.",
        ),
    ] = 1.0,
    max_depth: Annotated[int, typer.Option(min=1, max=MAX_DEPTH, help="Levels of a tree.")] = 6,
    top_k: Annotated[int, typer.Option(min=1, max=MAX_TOP_K, help="Children of a node.")] = 4,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at once, and the load that tau is set for.")
    ] = 8,
    delta: Annotated[
        float, typer.Option(min=0, max=1, help="AUC above which a depth may become a gate.")
    ] = 0.65,
    dtype: Annotated[str, typer.Option(help="As in vLLM.")] = "auto",
    max_model_len: Annotated[int, typer.Option(min=16, help="As in vLLM.")] = 2048,
) -> None:
    """Measure how far a drafter can be trusted: gates, thresholds, survival curves."""
    for path in (output, report, save_trace):
        if path is not None and not path.absolute().parent.is_dir():
            fail(f"{path} cannot be written: make the folder {path.parent} first")
    cost = None if costs is None else read_step_cost("--costs", costs)
    if not trace and not prompts:
        fail("--prompts is missing; give a JSON-lines file, or a recorded trace with --trace")
    if trace and (prompts or save_trace is not None):
        fail("--trace takes the place of a run; leave out --prompts and --save-trace")
    with tempfile.TemporaryDirectory(prefix="echo-calibrate-") as folder:
        what, traces = None, trace or []
        if not traces:
            assert prompts
            lines = read_prompts(prompts)[:num_prompts]
            runs = [("best", temperature, save_trace)]
            if drawn_temperature > 0:
                runs.append(
                    ("drawn", drawn_temperature, save_trace and beside(save_trace, "drawn"))
                )
            for candidates, heat, kept in runs:
                path = Path(folder) / f"{candidates}.jsonl.gz"
                count, _ = record_prompts(
                    model,
                    _speculation(drafter, path, max_depth, top_k, candidates),
                    lines,
                    max_tokens=tokens,
                    concurrency=concurrency,
                    temperature=heat,
                    dtype=dtype,
                    max_model_len=max_model_len,
                )
                if kept is not None:
                    _keep(path, kept)
                traces.append(path)
            what = (
                f"{', '.join(path.name for path in prompts)}: {count} prompts, up to {tokens} "
                f"tokens each, temperature {temperature:g}"
            )
        drawn = _fit_drawn(traces, model, drafter, drawn_temperature if what else None)
        calibration, cost = _fit(traces[0], model, drafter, what, cost, concurrency, delta, drawn)
    _write(calibration, output, report, cost)


def _known_costs(header: TraceHeader) -> StepCost | None:
    """The newest measurement in the cost cache for the trace's models and dtype."""
    folder = CostCache().folder
    newest: tuple[float, Path, StepCost] | None = None
    for path in folder.glob("*.json"):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            key = data["key"]
            fits = (
                Path(key["target"]).name == Path(header.model).name
                and Path(key["drafter"]).name == Path(header.drafter).name
                and header.dtype in key["dtype"]
            )
            found = (path.stat().st_mtime, path, StepCost.from_dict(data["cost"]))
        except (OSError, ValueError, KeyError, TypeError, CostError):
            continue
        if fits and (newest is None or found[:2] > newest[:2]):
            newest = found
    if newest is None:
        note(
            "note: no step cost was measured for these models and this dtype; thresholds weigh "
            "no time (an engine with policy auto measures it when it starts)"
        )
        return None
    note(f"note: step cost from {newest[1]}")
    return newest[2]


def _speculation(
    drafter: str, trace: Path, max_depth: int, top_k: int, candidates: str
) -> dict[str, Any]:
    """Trees that verify the whole pool, or the best MAX_NODES of it."""
    pool = num_candidates(max_depth, top_k, top_k)
    if pool > MAX_NODES and candidates == "best":
        note(
            f"note: the drafter makes {pool} candidates a tree; the best {MAX_NODES} of them "
            "are verified"
        )
    return {
        "method": "echo",
        "model": located(drafter),
        "num_speculative_tokens": min(MAX_NODES, pool),
        "echo": {
            "policy": "topn",
            "max_depth": max_depth,
            "top_k": top_k,
            "candidates": candidates,
            "trace": str(trace),
        },
    }


def _keep(recorded: Path, wanted: Path) -> None:
    """Copy the trace, compressed or not as its new name says."""
    try:
        with (
            (open if wanted.name.endswith(".gz") else gzip.open)(recorded, "rb") as source,
            atomic.replacing(wanted) as [fresh],
            fresh.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except OSError as error:
        fail(f"--save-trace {wanted} cannot be written ({error.strerror or error})")


def _fit_drawn(
    traces: Sequence[Path], model: str, drafter: str, temperature: float | None
) -> DrawnProfile | None:
    """What the traces say of drawn candidates; None without any."""
    from echo_vllm.offline.calibrate.fit import fit_drawn

    if len(traces) < 2:
        return None
    _, samples = _samples(traces[1], model, drafter, "drawn")
    return fit_drawn(samples, temperature)


def _samples(trace: Path, model: str, drafter: str, kind: Kind) -> tuple[TraceHeader, Samples]:
    """The header of a trace, and its trees."""
    from echo_vllm.offline.calibrate.samples import collect

    try:
        header, steps = read_trace(trace)
        _check_names(header, model, drafter)
        with errors.status("reading the trace"):
            samples = collect(steps, header.num_speculative_tokens, kind=kind)
    except TraceError as error:
        fail(str(error))
    except ValueError as error:
        fail(f"{trace}: {error}")
    if samples.skipped > samples.num_trees:
        note(
            f"warning: {samples.skipped} of {samples.skipped + samples.num_trees} trees were "
            "cut before they were verified and do not count"
        )
    return header, samples


def _fit(
    trace: Path,
    model: str,
    drafter: str,
    prompts: str | None,
    cost: StepCost | None,
    concurrency: int,
    delta: float,
    drawn: DrawnProfile | None,
) -> tuple[Calibration, StepCost | None]:
    """Returns the calibration, and the step cost that its thresholds weigh."""
    from echo_vllm.offline.calibrate.fit import fit
    from echo_vllm.offline.calibrate.gates import GateCosts

    header, samples = _samples(trace, model, drafter, "best")
    if samples.partial and header.num_speculative_tokens < MAX_NODES:
        note(
            f"warning: {samples.partial} trees had more candidates than the "
            f"{header.num_speculative_tokens} that were verified; the profile holds for trees "
            "of that size"
        )
    cost = cost or _known_costs(header)
    top_k = int(header.echo.get("top_k", 1))
    loads = []
    if cost is not None:
        loads = [
            GateCosts.at_load(
                cost,
                requests=concurrency,
                frontier=top_k,
                nodes_per_level=nodes,
                max_depth=samples.max_depth,
            )
            for nodes in range(1, top_k + 1)
        ]
    with errors.status("fitting"):
        calibration = fit(
            samples,
            target=header.model,
            drafter=header.drafter,
            dtype=header.dtype,
            prompts=prompts or f"{trace.name}, recorded on {header.created}",
            delta=delta,
            costs=loads,
            drawn=drawn,
        )
    return calibration, cost


def _check_names(header: TraceHeader, model: str, drafter: str) -> None:
    for option, given, recorded in (
        ("MODEL", model, header.model),
        ("--drafter", drafter, header.drafter),
    ):
        if Path(given).name != Path(recorded).name:
            fail(
                f"{option} is {Path(given).name}, but the trace was recorded with "
                f"{Path(recorded).name}; give the one that fits the other"
            )


def _write(
    calibration: Calibration, output: Path, report: Path | None, cost: StepCost | None
) -> None:
    from echo_vllm.offline.calibrate.page import rows_of, rows_of_drawn, write_report

    written = [output]
    try:
        calibration.profile.save(output)
        if report is not None:
            with errors.status("drawing"):
                write_report(
                    report,
                    calibration,
                    cost_points=None
                    if cost is None
                    else list(zip(*cost.verify.to_points(), strict=True)),
                    hinge=None if cost is None else fit_hinge(cost.verify),
                )
            written.append(report)
    except OSError as error:
        fail(f"{error.filename or output} cannot be written ({error.strerror or error})")
    out = Console(highlight=False)
    out.print(_table(*rows_of(calibration)))
    if (drawn := calibration.profile.drawn) is not None:
        out.print(_table(*rows_of_drawn(drawn), title="Drawn candidates"))
    out.print(Text(f"Gates maximise {calibration.profile.objective}."))
    out.print(Text(f"Wrote {' and '.join(map(str, written))}."), soft_wrap=True)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], title: str | None = None) -> Table:
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    return table
