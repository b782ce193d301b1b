# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What can be seen of the dashboard without a server; `make dashboard-test` does the rest."""

from __future__ import annotations

import json
import re

from monitoring.panels import DASHBOARD, PANELS, VARIABLES, dashboard_json
from tests.conftest import ROOT

METRICS = set(
    re.findall(r'"vllm:(echo_\w+)"', (ROOT / "echo_vllm" / "step" / "metrics.py").read_text())
)


def asked(text: str) -> set[str]:
    """Metrics of ours in PromQL, without the ends that Prometheus adds."""
    return {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"vllm:(echo_\w+)", text)}


def test_every_query_asks_for_a_metric_that_there_is() -> None:
    queries = " ".join(query.expression for panel in PANELS for query in panel.queries)
    rules = (ROOT / "monitoring" / "rules.yml").read_text()
    assert asked(queries + rules) <= METRICS
    watch = (ROOT / "echo_vllm" / "cli" / "watch.py").read_text()
    named = {re.sub(r"_total$", "", name) for name in re.findall(r'"(echo_\w+)"', watch)}
    assert named <= METRICS


def test_every_metric_is_on_the_dashboard() -> None:
    queries = " ".join(query.expression for panel in PANELS for query in panel.queries)
    elsewhere = {"echo_accepted_depth", "echo_plan_max_rows"}
    assert METRICS - asked(queries) <= elsewhere


def test_the_dashboard_is_what_its_panels_make() -> None:
    assert DASHBOARD.read_text() == dashboard_json(), "run python -m monitoring.panels"


def test_the_dashboard_has_the_variables_and_the_tag_of_vllms_own() -> None:
    found = json.loads(DASHBOARD.read_text())
    names = [variable["name"] for variable in found["templating"]["list"]]
    assert names == ["datasource", *VARIABLES]
    assert found["tags"] == ["vllm"]
    assert len(found["panels"]) == len(PANELS)
