# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The dashboard for Grafana, beside vLLM's own: `python -m monitoring.panels` writes its JSON.

It has vLLM's variables and tag, so the two link to each other and keep the chosen instance.
`monitoring.check` runs every query here in a real Prometheus.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "echo.json"
SELECTOR = 'job=~"$job", model_name=~"$model_name", instance=~"$instance", engine=~"$engine"'
VARIABLES = ("job", "model_name", "instance", "engine")


@dataclass(frozen=True)
class Query:
    """A line of a panel: PromQL with `NAME[]` for a rate of `vllm:NAME`, and its legend."""

    template: str
    legend: str

    @property
    def expression(self) -> str:
        """PromQL with the dashboard's variables; `{name}` is the metric's instant value."""
        out = ""
        for i, part in enumerate(self.template.split("`")):
            if i % 2 == 0:
                out += part
            elif part.startswith("="):
                out += f"vllm:{part[1:]}{{{SELECTOR}}}"
            else:
                out += f"rate(vllm:{part}{{{SELECTOR}}}[$__rate_interval])"
        return out


@dataclass(frozen=True)
class Panel:
    """A time series panel; `unit` as Grafana calls it."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"


def ratio(above: str, below: str, by: str = "") -> str:
    """One sum of rates over another."""
    group = f" by ({by})" if by else ""
    return f"sum{group}(`{above}`) / sum{group}(`{below}`)"


def quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({q}, sum by (le) (`{histogram}_bucket`))", f"p{100 * q:.0f}")
        for q in (0.5, 0.9)
    )


PANELS = (
    Panel(
        "Tokens a step",
        "Tokens that a request gets of a step in which its tree is verified. Plain decoding has 1.",
        (Query("1 + " + ratio("echo_accepted_tokens_total", "echo_trees_total"), "tokens"),),
    ),
    Panel(
        "Tokens per second",
        "Generated tokens, all requests together.",
        (Query("sum(`generation_tokens_total`)", "tokens per second"),),
    ),
    Panel(
        "Steps that rest",
        "Share of steps that neither draft nor verify, because drafting does not pay at this load.",
        (Query(ratio("echo_resting_steps_total", "echo_steps_total"), "resting"),),
        "percentunit",
    ),
    Panel(
        "What the policy decides",
        "Levels that the latest plan allows (0 rests) and the tokens that a second is worth to it.",
        (
            Query("avg(`=echo_plan_depth`)", "depth allowed"),
            Query("avg(`=echo_plan_price`)", "price, tokens per second"),
        ),
    ),
    Panel(
        "Budget",
        "Nodes a second that trees were given room for, that were verified, and accepted.",
        (
            Query("sum(`echo_budget_nodes_total`)", "given"),
            Query("sum(`echo_verified_nodes_total`)", "verified"),
            Query("sum(`echo_accepted_tokens_total`)", "accepted"),
        ),
    ),
    Panel(
        "Depth and width of trees",
        "Of verified trees: levels, and the most nodes in one level.",
        tuple(
            Query(query.template, f"{what} {query.legend}")
            for what in ("depth", "width")
            for query in quantiles(f"echo_tree_{what}")
        ),
    ),
    Panel(
        "Acceptance by depth",
        "Share of the trees of a depth that were accepted to it.",
        (
            Query(
                ratio("echo_depth_accepted_total", "echo_depth_trees_total", "depth"),
                "depth {{depth}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "Acceptance against calibration",
        "Accepted nodes over those that the calibration expects; 1 is right, far below 1 asks for "
        "`echo-vllm calibrate` on your traffic. Empty where the policy has no calibration.",
        (
            Query(
                ratio("echo_depth_accepted_total", "echo_depth_expected_total", "depth"),
                "depth {{depth}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "Step time, predicted and real",
        "Mean seconds of the steps that the policy had a prediction for.",
        (
            Query(
                ratio("echo_predicted_step_seconds_total", "echo_predicted_steps_total"),
                "predicted",
            ),
            Query(ratio("echo_step_seconds_total", "echo_predicted_steps_total"), "real"),
        ),
        "s",
    ),
    Panel(
        "Time in verification and drafting",
        "Seconds a second; what is missing to 1 is scheduling, output and idleness.",
        (
            Query("sum(`echo_verify_seconds_total`)", "verify"),
            Query("sum(`echo_draft_seconds_total`)", "draft"),
        ),
        "percentunit",
    ),
    Panel(
        "Requests without a tree",
        "Drafts a second that got no node because others paid better, and running requests that "
        "the head has no positions for.",
        (
            Query("sum(`echo_starved_requests_total`)", "starved a second"),
            Query("sum(`=echo_requests_beyond_head`)", "beyond the head"),
        ),
    ),
    Panel(
        "Waiting for the drafter",
        "Tokens that the drafter has not seen, because the plan rested.",
        (Query("sum(`=echo_backlog_tokens`)", "tokens"),),
    ),
)


def dashboard_json() -> str:
    """The dashboard, as Grafana imports it."""
    from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import (
        DashboardCursorSync,
        DashboardLinkType,
        DataSourceRef,
        VariableRefresh,
    )

    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    builder = (
        dashboard.Dashboard("vLLM: ECHO tree speculation")
        .uid("vllm-echo")
        .tags(["vllm"])
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("vLLM")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["vllm"])
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    )
    for name in VARIABLES:
        builder = builder.with_variable(
            dashboard.QueryVariable(name)
            .datasource(source)
            .query(f"label_values(vllm:echo_steps_total, {name})")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    for panel in PANELS:
        built = (
            timeseries.Panel()
            .title(panel.title)
            .description(panel.description)
            .datasource(source)
            .unit(panel.unit)
            .min(0)
            .height(8)
            .span(12)
        )
        for query in panel.queries:
            target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend)
            built = built.with_target(target)
        builder = builder.with_panel(built)
    return str(JSONEncoder(sort_keys=True, indent=2).encode(builder.build())) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard_json(), encoding="utf-8")
    print(f"wrote {DASHBOARD}")
