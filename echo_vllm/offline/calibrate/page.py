# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The report of a calibration: one HTML file with its plots inside.

Offline only; needs matplotlib, which draws without a display.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from echo_vllm import atomic
from echo_vllm.forecast.drafter_profile import DepthProfile, DrawnDepth, DrawnProfile
from echo_vllm.offline.calibrate.fit import Calibration, Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from echo_vllm.forecast import Hinge

MAX_RANKS = 16


def write_report(
    path: str | Path,
    calibration: Calibration,
    *,
    cost_points: Sequence[tuple[float, float]] | None = None,
    hinge: Hinge | None = None,
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        calibration: what to show.
        cost_points: (rows, seconds) of target forwards; None leaves the cost curve out.
        hinge: fitted to them.

    Raises:
        OSError: the file cannot be written.
    """
    profile = calibration.profile
    samples = calibration.samples
    facts = {
        "target": profile.target,
        "drafter": profile.drafter,
        "dtype": profile.dtype,
        "prompts": profile.prompts,
        "made on": profile.created,
        "verified trees": f"{profile.num_steps}, of {len(set(samples.request_ids))} requests",
        "left out": f"{samples.skipped} trees that were cut before they were verified",
        "gates maximise": profile.objective,
    }
    if samples.partial:
        facts["note"] = f"{samples.partial} trees had more candidates than were verified"
    tables = [("Profile", *rows_of(calibration))]
    if profile.drawn is not None:
        tables.append(("Drawn candidates", *rows_of_drawn(profile.drawn)))
    page = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    ).get_template("report.html.j2")
    atomic.write_text(
        path,
        page.render(
            title=f"Calibration of {profile.drafter} for {profile.target}",
            facts=facts,
            tables=tables,
            sections=[
                (title, text, _png(figure))
                for title, text, figure in _figures(calibration, cost_points, hinge)
            ],
        ),
    )


def rows_of(calibration: Calibration) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The profile as a table: header and one row a depth."""
    header = ("depth", "trees", "accepted", "AUC", "gate: c >", "ECE before", "after", "knots")

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    depths = calibration.profile.depths
    return header, [_row(depth, shown(depth.auc), shown(depth.tau)) for depth in depths]


def rows_of_drawn(drawn: DrawnProfile) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The part of drawn candidates as a table: header and one row a depth."""
    header = ("depth", "slots", "accepted", "ECE before", "after", "knots")
    return header, [_row(depth) for depth in drawn.depths]


def _row(known: DepthProfile | DrawnDepth, *more: str) -> tuple[str, ...]:
    return (
        str(known.depth),
        str(known.samples),
        f"{known.acceptance:.1%}",
        *more,
        f"{known.ece_before:.2%}",
        f"{known.ece_after:.2%}",
        str(len(known.survival_probs)),
    )


def _figures(
    calibration: Calibration,
    cost_points: Sequence[tuple[float, float]] | None,
    hinge: Hinge | None,
) -> Iterator[tuple[str, str, Figure]]:
    """Title, explanation and plot, in the order of the page."""
    yield (
        "AUC per depth",
        "How well c, the probability of a depth's best path, separates trees in which a node of "
        "the depth was accepted from the others. 0.5 is chance; a gate needs more than delta.",
        _auc(calibration),
    )
    yield (
        "Distribution of c",
        "c of the trees in which a node of the depth was accepted and of the others. A gate stops "
        "the trees to the left of its threshold.",
        _confidence(calibration),
    )
    yield (
        "Reliability",
        "Predicted against observed acceptance of nodes, on requests that were not used for the "
        "curve. Before: the drafter's path probability. After: the survival curve.",
        _reliability(calibration),
    )
    yield (
        "Survival curves",
        "What a path probability of the drafter is worth at each depth. Below the diagonal the "
        "drafter is too sure of itself.",
        _survival(calibration),
    )
    yield (
        "Acceptance against rank",
        "Left: how often a node's child is accepted once the node was, by the child's rank. Right: "
        "how often a node is accepted, by its rank among all nodes of its depth.",
        _ranks(calibration),
    )
    if cost_points:
        text = "Seconds of a target forward over its rows."
        if hinge is not None:
            text += (
                f" Fitted hinge: K_max {hinge.k_max:.0f} rows, gamma {hinge.gamma:.2e} a row, base "
                f"{hinge.base * 1e3:.3g} ms, relative error {hinge.error:.1%}."
            )
        yield "Cost of verification", text, _cost(cost_points, hinge)


def _auc(calibration: Calibration) -> Figure:
    figure, [axes] = _panels(1)
    profile = calibration.profile
    aucs = {d.depth: d.auc for d in profile.depths if d.auc is not None}
    axes.plot(list(aucs), list(aucs.values()), "o-", color="C0")
    gates = list(profile.gates())
    axes.plot(gates, [aucs[d] for d in gates], "s", color="C3", ms=11, label="gate")
    axes.axhline(profile.delta, color="0.4", ls="--", label=f"delta = {profile.delta:g}")
    axes.axhline(0.5, color="0.8", lw=1)
    axes.set(xlabel="depth", ylabel="AUC of c", xticks=[d.depth for d in profile.depths])
    axes.set_ylim(top=1.0)
    axes.legend()
    return figure


def _confidence(calibration: Calibration) -> Figure:
    samples = calibration.samples
    figure, panels = _panels(samples.max_depth)
    bins = np.linspace(0, 1, 26)
    for depth, (axes, known) in enumerate(
        zip(panels, calibration.profile.depths, strict=True), start=1
    ):
        drafted = samples.drafted[:, depth - 1]
        c = samples.confidence[drafted, depth - 1]
        accepted = samples.accepted_depth[drafted] >= depth
        for chosen, label, color in ((accepted, "accepted", "C2"), (~accepted, "not", "C1")):
            axes.hist(c[chosen], bins=list(bins), alpha=0.6, label=label, color=color)
        if known.tau is not None:
            axes.axvline(known.tau, color="C3", label=f"tau = {known.tau:.2f}")
        axes.set(title=f"depth {depth}", xlabel="c", ylabel="trees")
        axes.legend(fontsize="small")
    return figure


def _reliability(calibration: Calibration) -> Figure:
    figure, panels = _panels(len(calibration.held_out))

    def draw(axes: Axes, bins: Reliability, label: str, color: str) -> None:
        axes.plot(
            bins.predicted,
            bins.accepted,
            "o-",
            ms=4,
            color=color,
            label=f"{label}: ECE {bins.ece:.1%}",
        )

    for depth, (axes, errors) in enumerate(zip(panels, calibration.held_out, strict=True), start=1):
        axes.plot([0, 1], [0, 1], color="0.7", lw=1)
        draw(axes, errors.before, "before", "C1")
        draw(axes, errors.after, "after", "C2")
        axes.set(title=f"depth {depth}", xlabel="predicted", ylabel="accepted")
        axes.legend(fontsize="small")
    return figure


def _survival(calibration: Calibration) -> Figure:
    figure, [axes] = _panels(1)
    axes.plot([1e-4, 1], [1e-4, 1], color="0.7", lw=1)
    for known in calibration.profile.depths:
        axes.plot(
            np.exp(known.survival_logprobs),
            known.survival_probs,
            ".-",
            label=f"depth {known.depth}",
        )
    axes.set(
        xlabel="path probability of the drafter",
        ylabel="probability of being accepted",
        xscale="log",
        yscale="log",
        xlim=(1e-4, 1),
        ylim=(1e-4, 1),
    )
    axes.legend()
    return figure


def _ranks(calibration: Calibration) -> Figure:
    from matplotlib.ticker import MaxNLocator

    samples = calibration.samples
    figure, (left, right) = _panels(2)
    for depth in range(1, samples.max_depth + 1):
        here = samples.node_depth == depth
        asked = here & samples.node_parent_accepted
        for axes, rank, chosen in (
            (left, samples.node_child_rank, asked),
            (right, samples.node_level_rank, here),
        ):
            if not chosen.any():
                continue
            count = np.bincount(rank[chosen])
            hits = np.bincount(rank[chosen], weights=samples.node_accepted[chosen])
            axes.plot(
                np.arange(1, len(count) + 1)[:MAX_RANKS],
                (hits / count)[:MAX_RANKS],
                "o-",
                ms=4,
                label=f"depth {depth}",
            )
    left.set(xlabel="rank among siblings", ylabel="accepted, if its parent was")
    right.set(xlabel="rank in its depth", ylabel="accepted")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    return figure


def _cost(points: Sequence[tuple[float, float]], hinge: Hinge | None) -> Figure:
    figure, [axes] = _panels(1)
    rows = np.array([row for row, _ in points])
    axes.plot(rows, [1e3 * s for _, s in points], "o", color="C0", label="measured")
    if hinge is not None:
        grid = np.union1d(np.linspace(rows.min(), rows.max(), 200), [hinge.k_max])
        grid = grid[(grid >= rows.min()) & (grid <= rows.max())]
        axes.plot(grid, 1e3 * hinge(grid), color="C3", label="hinge")
    axes.set(xlabel="rows of the forward", ylabel="ms")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` plots, at most three in a row. Not pyplot: that keeps every figure."""
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    width = 6.5 if count == 1 else 4.2 * columns
    figure = Figure(figsize=(width, 3.6 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
