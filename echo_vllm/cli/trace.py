# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm trace`: records what policies could have known, and replays any policy over it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from echo_vllm import atomic
from echo_vllm.cli.console import (
    Drafter,
    Target,
    fail,
    located,
    note,
    numbers,
    out,
    read_prompts,
    read_step_cost,
    record_prompts,
    refusing,
    say,
)
from echo_vllm.config import EchoConfigError, num_candidates
from echo_vllm.forecast import CostError, StepCost
from echo_vllm.machine import fast_dtype
from echo_vllm.trace_format import TraceError, read_trace

if TYPE_CHECKING:
    from echo_vllm.forecast.drafter_profile import DrafterProfile
    from echo_vllm.offline.trace.comparison import Comparison, Figures

trace_app = typer.Typer(
    help="Record what a policy could have known in each step, and replay any policy over it.",
    no_args_is_help=True,
)
PUBLISHED_PREFIX = "published:"
FULL = {"policy": "topn", "max_depth": 6, "top_k": 4, "candidates": "best"}
"""The default recording: with as many nodes as candidates, the fate of each is known."""

FULL_NODES = num_candidates(6, 4, 4)
# Figures are not to be cut where the output is a file, or a narrow terminal.
_wide = Console(width=max(out.width, 132), highlight=False)
TraceFile = Annotated[Path, typer.Argument(help="A recorded trace.", show_default=False)]
_refusing = functools.partial(refusing, EchoConfigError, TraceError, CostError)


# --- record --------------------------------------------------------------------------------


@trace_app.command()
def record(
    model: Target,
    drafter: Drafter,
    prompts: Annotated[
        list[Path],
        typer.Option(
            help="JSON lines with 'prompt' or 'turns' (the first turn is asked, or a later "
            "one with --min-context); may be given several times.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The trace; .gz compresses it.")
    ] = Path("trace.jsonl.gz"),
    config: Annotated[
        Path | None,
        typer.Option(
            help="A speculative config, to record a policy at work. Without it all candidates of "
            "depth 6 and width 4 are verified, which replays need.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts to ask.", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for a prompt.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling.")] = 0.0,
    min_context: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of a recorded prompt: the turns of a conversation are asked one after "
            "another, without being recorded, until a prompt is that long.",
        ),
    ] = 0,
    dtype: Annotated[str, typer.Option(help="As in vLLM.")] = fast_dtype(),
    max_model_len: Annotated[int, typer.Option(min=16, help="As in vLLM.")] = 2048,
    kv_cache_mib: Annotated[int, typer.Option(min=1, help="KV cache of the engine, MiB.")] = 1024,
) -> None:
    """Record a trace with the real engine."""
    speculation = _speculation(drafter, output, config)
    conversations = read_prompts(prompts)[:limit]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(str(error))
    count, generated = record_prompts(
        model,
        speculation,
        conversations,
        max_tokens=tokens,
        concurrency=concurrency,
        temperature=temperature,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_cache_bytes=kv_cache_mib << 20,
        min_context=min_context,
    )
    say(f"{count} prompts, {generated} tokens: {output}")
    show(output)


def _speculation(drafter: str, output: Path, config: Path | None) -> dict[str, Any]:
    """The speculative config of a recording."""
    if config is None:
        given: dict[str, Any] = {"num_speculative_tokens": FULL_NODES, "echo": FULL}
    else:
        try:
            given = json.loads(config.read_text(encoding="utf-8"))
            nodes, section = given.get("num_speculative_tokens"), given.get("echo", {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(
                f"--config must be a JSON file with a speculative config of method echo, got "
                f"{str(config)!r} ({type(error).__name__}: {error}); see examples/."
            )
        from echo_vllm.config import check_num_nodes
        from echo_vllm.policies import parse_section

        with _refusing():
            parse_section(section, num_speculative_tokens=check_num_nodes(nodes))
    path = str(output.resolve())
    return {
        **given,
        "method": "echo",
        "model": located(drafter),
        "echo": {**given.get("echo", {}), "trace": path},
    }


# --- show ----------------------------------------------------------------------------------


@trace_app.command()
def show(trace: TraceFile) -> None:
    """Say what a trace holds."""
    from echo_vllm.offline.trace.summary import summary

    with _refusing():
        found = summary(*read_trace(trace, whole=False))
    by_depth = ", ".join(f"{share:.0%}" for share in found["accepted_by_depth"])
    for line in (
        f"{found['model']} with {found['drafter']}, {found['dtype']}, {found['created']}",
        f"policy {found['policy']}, num_speculative_tokens {found['num_speculative_tokens']}",
        f"{found['steps']} steps, {found['trees']} trees ({found['concurrency']:.1f} a step), "
        f"{found['fully_verified']:.0%} of them fully verified",
        f"{found['candidates']:.1f} candidates in up to {found['levels']} levels, "
        f"{found['nodes']:.1f} verified nodes and {found['accepted']:.2f} accepted a tree",
        f"accepted by depth: {by_depth}",
        f"median times of a step: target {found['verify_ms']:.1f} ms, drafter "
        f"{found['draft_ms']:.1f} ms",
    ):
        say(line)


# --- replay --------------------------------------------------------------------------------


@trace_app.command()
def replay(
    trace: TraceFile,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:N, NAME:N:{more fields as JSON}, or a JSON file with a speculative config; "
            "may be given several times. Plain decoding, the best table of fixed chains and the "
            "oracles always join.",
            show_default="the usual ones",
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = ("1,8,32,64,128,256"),
    cost: Annotated[
        str,
        typer.Option(
            help="published:eagle3-h100, published:echo-8xh100, "
            "published:specdecode-bench-8b-h100, or a JSON file with a step cost."
        ),
    ] = "published:eagle3-h100",
    profile: Annotated[
        Path | None,
        typer.Option(help="The drafter's profile, for echo and auto.", show_default=False),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Decide the recorded steps again and compare with the recording."
        ),
    ] = False,
    prefill: Annotated[int, typer.Option(min=0, help="Prompt tokens in every step.")] = 0,
    request_steps: Annotated[
        int, typer.Option(min=1, help="Request-steps to draw for each figure.")
    ] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="All figures as JSON.", show_default=False)
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="The tables of speeds and shares as Markdown.", show_default=False),
    ] = None,
) -> None:
    """Replay policies over a trace, at any load and under any step cost, against an oracle."""
    from echo_vllm.forecast.drafter_profile import DrafterProfile
    from echo_vllm.offline.trace.comparison import TABLES, compare
    from echo_vllm.offline.trace.comparison import markdown as as_markdown
    from echo_vllm.offline.trace.contenders import parse_contender
    from echo_vllm.offline.trace.recorded import RecordedDrafter, fully_verified, replayable

    with _refusing():
        known = None if profile is None else DrafterProfile.load(profile)
    if exact:
        _replay_exact(trace, known)
        return
    loads = numbers("--concurrency", concurrency, int, 1)
    with _refusing():
        step_cost, notes = _cost(cost)
        chosen = [parse_contender(text, known) for text in policy] if policy else None
        header, steps = read_trace(trace, whole=False)
        drafter = RecordedDrafter(fully_verified(replayable(steps)))
        notes = [
            f"{drafter.num_samples} request-steps of {drafter.answers.max() + 1} answers of "
            f"{header.model} with {header.drafter}, contexts of {drafter.contexts.min()} to "
            f"{drafter.contexts.max()} tokens, drawn with seed {seed} as if they were exchangeable",
            *notes,
        ]
        for sentence in notes:
            say(sentence)
        comparison = compare(
            drafter,
            chosen,
            loads,
            step_cost,
            profile=known,
            prefill_tokens=prefill,
            request_steps=request_steps,
            seed=seed,
            on_load=lambda load, figures: _wide.print(_table(load, figures)),
        )
    for title in TABLES:
        _wide.print(_shares(comparison, title))
    figures = [each.to_dict() for at_load in comparison.values() for each in at_load.values()]
    content = {
        "trace": trace.name,
        "cost": cost,
        "notes": notes,
        "prefill_tokens": prefill,
        "seed": seed,
        "results": figures,
    }
    said = "".join(f"- {sentence}\n" for sentence in notes)
    for option, path, text in (
        ("--output", output, json.dumps(content, indent=1) + "\n"),
        ("--markdown", markdown, f"{said}\n{as_markdown(comparison)}"),
    ):
        if path is not None:
            try:
                atomic.write_text(path, text)
            except OSError as error:
                fail(f"{option} {path} cannot be written ({error.strerror}); choose another file.")


def _cost(text: str) -> tuple[Callable[[float], StepCost], list[str]]:
    """The step cost for a batch's tokens of context, and what is to be said about it."""
    from echo_vllm.offline.trace.published import PUBLISHED

    if text.startswith(PUBLISHED_PREFIX):
        name = text.removeprefix(PUBLISHED_PREFIX)
        if name not in PUBLISHED:
            fail(
                f"--cost must name one of {', '.join(PUBLISHED_PREFIX + n for n in PUBLISHED)}, "
                f"or a file, got {text!r}."
            )
        found = PUBLISHED[name]()
        return found.with_context, [
            *(f"published: {source}" for source in found.sources),
            *(f"assumed: {assumption}" for assumption in found.assumptions),
        ]
    measured = read_step_cost("--cost", Path(text))
    return lambda context: measured, [f"step cost: {Path(text).name}"]


def _table(load: int, figures: Mapping[str, Figures]) -> Table:
    table = Table(title=f"{load} requests", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for name in (
        "tokens/s", "+-", "vs plain", "tokens", "nodes", "drafter rows", "levels", "step ms",
        "drafting", "starved", "unknown",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for figure in figures.values():
        r = figure.result
        table.add_row(
            r.policy,
            f"{r.tokens_per_second:,.0f}",
            f"{r.error:.1%}",
            f"{figure.over_plain.middle:.3f}",
            f"{r.tokens:.2f}",
            f"{r.nodes:.1f}",
            f"{r.drafter_rows:.1f}",
            f"{r.drafter_levels:.1f}",
            f"{1e3 * r.seconds:.2f}",
            f"{r.drafting:.0%}",
            f"{r.starved:.0%}",
            f"{r.unknown:.1%}",
        )
    return table


def _shares(comparison: Comparison, title: str) -> Table:
    from echo_vllm.offline.trace.comparison import rows

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(["policy", *map(str, comparison)]):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows(comparison, title):
        # A name may have brackets, and so have intervals.
        table.add_row(*map(Text, row))
    return table


def _replay_exact(trace: Path, profile: DrafterProfile | None) -> None:
    from echo_vllm.offline.trace.exact import recorded_policy, replay_exact
    from echo_vllm.offline.trace.recorded import replayable

    with _refusing():
        header, steps = read_trace(trace, whole=False)
        report = replay_exact(replayable(steps), recorded_policy(header, profile))
    say(
        f"{report.steps} steps decided again, {report.incomplete} incomplete; trees: "
        f"{report.equal} equal, {report.cut} cut by the engine, {report.different} different"
    )
    if not report.agrees:
        note(
            f"error: {report.first}; give the profile that the engine had with --profile, and "
            "the version that recorded the trace."
        )
        raise typer.Exit(1)
    if not report.steps:
        fail(f"{trace} has no complete step to decide again; record it with one request at once.")
