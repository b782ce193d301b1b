# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm show`: the trees behind one answer, in the terminal or as a page."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from echo_vllm import atomic
from echo_vllm.cli.console import fail, last_line, located
from echo_vllm.machine import fast_dtype
from echo_vllm.offline.bench.configurations import DEMO_HEAD, DEMO_TARGET

if TYPE_CHECKING:
    from echo_vllm.offline.steps_of_prompt import Candidate, Shown, ShownStep

TEMPLATE = Path(__file__).with_name("show.html.j2")
_out = Console(highlight=False)


def show(
    prompt: Annotated[str, typer.Argument(help="What the model is asked.")],
    model: Annotated[str, typer.Option(help="Target: a folder or a Hub id.")] = str(DEMO_TARGET),
    config: Annotated[
        str | None,
        typer.Option(help="speculative_config: a file or JSON.", show_default="the demo's"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the answer at most.")] = 48,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="As in vLLM.")] = fast_dtype(),
    whole: Annotated[
        bool, typer.Option("--all", help="Candidates that were not verified, too.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
) -> None:
    """Each step's tree as drafted, what was verified, the accepted path in colour; a summary."""
    from echo_vllm.offline.steps_of_prompt import Shown, steps_of_prompt

    if model == str(DEMO_TARGET) and not DEMO_TARGET.is_dir():
        fail(f"the demo is not at {model}; run `make setup` in a checkout, or give --model")
    speculation = _speculation(config)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    steps = []
    try:
        for step in steps_of_prompt(
            located(model),
            speculation,
            prompt,
            max_tokens=tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
        ):
            steps.append(step)
            if html is None:
                _out.print(step_tree(len(steps), step, whole=whole))
    except (ValueError, OSError, RuntimeError) as error:
        fail(f"the engine does not start: {last_line(error)}")
    shown = Shown(Path(model).name, prompt, speculation, tuple(steps))
    if html is not None:
        atomic.write_text(html, page(shown))
        typer.echo(f"wrote {html}")
        return
    _out.print(answer_text(shown))
    _out.print(summary_table(shown))


def _speculation(config: str | None) -> dict[str, Any]:
    if config is None:
        return {
            "method": "echo",
            "model": str(DEMO_HEAD),
            "num_speculative_tokens": 16,
            # A budget in rows: with none it would depend on the speed of this machine.
            "echo": {"policy": "echo", "max_depth": 5, "top_k": 4, "k_max": 32},
        }
    path = Path(config)
    try:
        text = config if config.lstrip().startswith("{") else path.read_text("utf-8")
        found: dict[str, Any] = json.loads(text)
        found["model"] = located(found["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--config must be a speculative_config, a file or JSON, got {config!r} ({error})")
    return found


# --- in the terminal -----------------------------------------------------------------------


def step_tree(number: int, step: ShownStep, *, whole: bool = False) -> Tree:
    """A step as a tree of its candidates; without `whole`, of those that were verified."""
    head = Text.assemble((f"step {number} ", "bold"), (visible(step.root), "bold cyan"))
    head.append(f"  {_what_happened(step)}", "dim")
    tree = Tree(head, guide_style="dim")
    places = {-1: tree}
    for i, candidate in enumerate(step.candidates):
        if not (candidate.verified or whole):
            continue
        label = Text(visible(candidate.token), _style(candidate))
        label.append(f" {candidate.probability:.2f}", "dim")
        places[i] = places[candidate.parent].add(label)
    if step.tokens:
        own = Text("then ", "dim").append(visible(step.tokens[-1]), "cyan")
        last = max((i for i, c in enumerate(step.candidates) if c.accepted), default=-1)
        places[last].add(own.append(" the target's own", "dim"))
    return tree


def _what_happened(step: ShownStep) -> str:
    if not step.candidates:
        return "no draft: " + ("the plan rests" if step.max_depth == 0 else "a prompt was read")
    return (
        f"{len(step.candidates)} drafted, {step.num_verified} verified, {step.num_accepted} "
        f"accepted; {1000 * step.draft_s:.0f} + {1000 * step.verify_s:.0f} ms"
    )


def _style(candidate: Candidate) -> str:
    if candidate.accepted:
        return "bold green"
    return "red" if candidate.verified else "dim"


def visible(token: str) -> str:
    """A token's text with blanks that can be seen."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "(nothing)"


def answer_text(shown: Shown) -> Text:
    """The answer; what the drafter guessed is green."""
    text = Text()
    for step in shown.steps:
        for i, token in enumerate(step.tokens):
            text.append(token, "bold green" if i < step.num_accepted else "cyan")
    return text


def summary(shown: Shown) -> list[tuple[str, str]]:
    """Names and figures, of the steps after the one that read the prompt."""
    steps = shown.steps[1:]
    drafted = [step for step in steps if step.candidates]
    tokens = sum(len(step.tokens) for step in steps)
    nodes, accepted = (sum(getattr(s, f"num_{x}") for s in steps) for x in ("verified", "accepted"))
    seconds = sum(step.draft_s + step.verify_s for step in steps)
    rows = [
        ("steps", f"{len(steps)}, of which {len(steps) - len(drafted)} without a draft"),
        ("tokens", f"{tokens}, {tokens / max(1, len(steps)):.2f} a step (plain decoding has 1)"),
        ("nodes", f"{nodes} verified, {accepted} accepted"),
        ("time", f"{seconds:.2f} s, {tokens / seconds if seconds else 0:.1f} tokens per second"),
    ]
    reached = Counter(depth for step in drafted for depth in range(1, step.num_accepted + 1))
    for depth in range(1, max((step.depth for step in drafted), default=0) + 1):
        trees = sum(step.depth >= depth for step in drafted)
        rows.append((f"depth {depth}", f"accepted in {reached[depth]} of {trees} trees"))
    return rows


def summary_table(shown: Shown) -> Table:
    table = Table(title="summary", show_header=False, title_justify="left")
    for row in summary(shown):
        table.add_row(*row)
    return table


# --- as a page -----------------------------------------------------------------------------


def page(shown: Shown) -> str:
    """One HTML page that needs nothing else."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    children = [
        {
            parent: [i for i, c in enumerate(step.candidates) if c.parent == parent]
            for parent in range(-1, len(step.candidates))
        }
        for step in shown.steps
    ]
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        shown=shown,
        children=children,
        summary=summary(shown),
        visible=visible,
        what_happened=_what_happened,
        config=json.dumps({**shown.config, "model": Path(shown.config["model"]).name}),
    )
