# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm watch`: what a server does right now, from its /metrics alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from echo_vllm.cli.console import fail

BAR = 30
"""Characters of the longest bar of a histogram."""


@dataclass(frozen=True)
class Scrape:
    """One reading of /metrics, summed over engines and models.

    Attributes:
        at: seconds, monotonic.
        values: name without `vllm:` -> value.
        labelled: name -> label `le`, `position` or `depth` -> value.
    """

    at: float
    values: Mapping[str, float]
    labelled: Mapping[str, Mapping[float, float]]

    @classmethod
    def parse(cls, text: str, at: float) -> Scrape:
        values: dict[str, float] = defaultdict(float)
        labelled: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix("vllm:")
                label = next((x for x in ("le", "position", "depth") if x in sample.labels), None)
                if label is None:
                    values[name] += sample.value
                else:
                    labelled[name][float(sample.labels[label])] += sample.value
        return cls(at, values, labelled)


@dataclass(frozen=True)
class Window:
    """What happened between two readings."""

    before: Scrape
    after: Scrape

    def count(self, name: str) -> float:
        """Of a counter, without its `_total`."""
        key = f"{name}_total"
        return self.after.values.get(key, 0.0) - self.before.values.get(key, 0.0)

    def rate(self, name: str) -> float:
        return self.count(name) / max(1e-9, self.after.at - self.before.at)

    def ratio(self, above: str, below: str) -> float | None:
        """One counter over another; None where the second stood still."""
        count = self.count(below)
        return self.count(above) / count if count else None

    def now(self, name: str) -> float | None:
        """Of a gauge."""
        return self.after.values.get(name)

    def by_label(self, name: str) -> dict[float, float]:
        before = self.before.labelled.get(name, {})
        now = self.after.labelled.get(name, {})
        return {label: now[label] - before.get(label, 0.0) for label in sorted(now)}

    def histogram(self, name: str) -> dict[float, float]:
        """Observations by their bucket's upper limit, the infinite one only where it has any."""
        below, found = 0.0, {}
        for limit, count in self.by_label(f"{name}_bucket").items():
            if limit != float("inf") or count > below:
                found[limit] = count - below
            below = count
        return found


def watch(
    url: Annotated[str, typer.Argument(help="Of the server.")] = "http://127.0.0.1:8000",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two readings.")] = 1.0,
    window: Annotated[float, typer.Option(min=1, help="Seconds that figures are of.")] = 10.0,
    times: Annotated[
        int | None, typer.Option(min=1, help="End after so many.", show_default="ctrl-C ends it")
    ] = None,
) -> None:
    """Speed, decisions, tree shapes and acceptance of a running server, live."""
    address = url.rstrip("/").removesuffix("/v1").removesuffix("/metrics")
    console = Console()
    with httpx.Client(timeout=10) as client, Live(console=console, auto_refresh=False) as live:
        readings = [_read(client, address)]
        try:
            while times is None or len(readings) <= times:
                time.sleep(every)
                readings.append(_read(client, address))
                latest = readings[-1].at
                first = next(r for r in readings if r.at >= latest - window or r is readings[-2])
                live.update(dashboard(address, Window(first, readings[-1])), refresh=True)
                if times is None:
                    readings = [r for r in readings if r.at >= latest - 2 * window]
        except KeyboardInterrupt:
            return


def _read(client: httpx.Client, address: str) -> Scrape:
    try:
        response = client.get(f"{address}/metrics")
        response.raise_for_status()
    except httpx.HTTPError as error:
        fail(f"URL {address} has no /metrics ({error}); give the address of a running server")
    scrape = Scrape.parse(response.text, time.monotonic())
    if not any(name.startswith("echo_") for name in scrape.values):
        fail(f'URL {address} serves without ECHO; start it with "method": "echo"')
    return scrape


def dashboard(address: str, window: Window) -> RenderableType:
    """Everything, for one look."""
    seconds = window.after.at - window.before.at
    return Group(
        Text(f"{address}, the last {seconds:.0f} s", "bold"),
        Columns([_speed(window), _decision(window), _time(window)]),
        Columns(
            [
                _bars("depth of trees", window.histogram("echo_tree_depth")),
                _bars("width of trees", window.histogram("echo_tree_width")),
                _acceptance(window),
            ]
        ),
    )


def _figures(title: str, rows: Mapping[str, str]) -> Panel:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, "dim"), value)
    return Panel(table, title=title, title_align="left")


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _speed(window: Window) -> Panel:
    drafts, accepted = (window.count(f"echo_{name}") for name in ("trees", "accepted_tokens"))
    return _figures(
        "speed",
        {
            "tokens per second": f"{window.rate('generation_tokens'):.1f}",
            "requests running": _shown(window.now("num_requests_running"), "{:.0f}".format),
            "requests waiting": _shown(window.now("num_requests_waiting"), "{:.0f}".format),
            "tokens a step and tree": f"{1 + accepted / drafts:.2f}" if drafts else "-",
            "nodes per accepted token": _shown(
                window.ratio("echo_verified_nodes", "echo_accepted_tokens"), "{:.1f}".format
            ),
        },
    )


def _decision(window: Window) -> Panel:
    depth, price = window.now("echo_plan_depth"), window.now("echo_plan_price")
    return _figures(
        "what the policy decides",
        {
            "now": decision(depth, price, window.now("echo_plan_max_rows")),
            "steps that rest": _shown(window.ratio("echo_resting_steps", "echo_steps"), _percent),
            "of the budget used": _shown(
                window.ratio("echo_verified_nodes", "echo_budget_nodes"), _percent
            ),
            "drafts without a node": f"{window.rate('echo_starved_requests'):.1f} a second",
            "waiting for the drafter": _shown(
                window.now("echo_backlog_tokens"), "{:.0f} tokens".format
            ),
        },
    )


def decision(depth: float | None, price: float | None, max_rows: float | None) -> str:
    """What the latest plan says, and why."""
    if depth is None:
        return "-"
    why = f" (a second is worth {price:.0f} tokens)" if price else ""
    if depth == 0:
        return f"rest{why}"
    rows = f", up to {max_rows:.0f} rows" if max_rows else ""
    return f"draft to depth {depth:.0f}{rows}{why}"


def _time(window: Window) -> Panel:
    steps = "echo_predicted_steps"
    return _figures(
        "where the time goes",
        {
            "verify": _shown(_share(window, "echo_verify_seconds"), _percent),
            "draft": _shown(_share(window, "echo_draft_seconds"), _percent),
            "step": _shown(window.ratio("echo_step_seconds", steps), _milliseconds),
            "predicted": _shown(window.ratio("echo_predicted_step_seconds", steps), _milliseconds),
        },
    )


def _share(window: Window, name: str) -> float | None:
    both = window.count("echo_verify_seconds") + window.count("echo_draft_seconds")
    return window.count(name) / both if both else None


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _milliseconds(value: float) -> str:
    return f"{1000 * value:.1f} ms"


def _bars(title: str, counts: Mapping[float, float]) -> Panel:
    """A bar a bucket, up to the last that has any."""
    most = max(counts.values(), default=0.0)
    last = max((limit for limit, count in counts.items() if count), default=0.0)
    rows = {
        f"{limit:.0f}": "█" * round(BAR * count / most) + f" {count:.0f}"
        for limit, count in counts.items()
        if limit <= last
    }
    return _figures(title, rows or {"none": ""})


def _acceptance(window: Window) -> Panel:
    """Per depth, the share of the trees that reach it whose path was accepted to it; beside it what
    the calibrated scores promise, where the policy has them."""
    reached = window.by_label("echo_depth_trees_total")
    accepted = window.by_label("echo_depth_accepted_total")
    expected = window.by_label("echo_depth_expected_total")
    rows = {}
    for depth, trees in reached.items():
        if not trees:
            continue
        share = accepted.get(depth, 0.0) / trees
        text = "█" * round(BAR * share) + f" {_percent(share)}"
        if expected.get(depth):
            text += f" (expected {_percent(expected[depth] / trees)})"
        rows[f"{depth:.0f}"] = text
    return _figures("accepted, by depth", rows or {"none": ""})
