# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The report is one file with all that it should show."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from echo_vllm.forecast import Hinge
from echo_vllm.offline.calibrate.fit import Calibration, fit
from echo_vllm.offline.calibrate.page import write_report
from echo_vllm.offline.calibrate.samples import collect
from tests.offline.calibrate.synthetic import chain, step

PLOTS = ["AUC per depth", "Distribution of c", "Reliability", "Survival curves"]
PLOTS += ["Acceptance against rank"]


def test_the_report_holds_every_plot_in_itself(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    points = [(float(rows), 0.01 * max(1.0, rows / 64)) for rows in (1, 16, 64, 128, 256)]
    hinge = Hinge(k_max=64, gamma=1 / 64, base=0.01, error=0.001)
    write_report(path, calibration, cost_points=points, hinge=hinge)
    text = path.read_text()
    assert re.findall(r'<img alt="([^"]*)"', text) == [*PLOTS, "Cost of verification"]
    for picture in re.findall(r"base64,([^\"]*)\"", text):
        assert base64.b64decode(picture, validate=True).startswith(b"\x89PNG")
    assert "K_max 64 rows" in text
    assert "http" not in text  # Nothing is fetched.
    for depth in calibration.profile.depths:
        row = f"<td>{depth.depth}</td><td>3000</td><td>{depth.acceptance:.1%}</td>"
        assert f"{row}<td>{depth.auc:.3f}</td>" in text


def test_a_poor_trace_and_strange_names_still_make_a_report(tmp_path: Path) -> None:
    """One tree, one depth, no costs, nothing to separate."""
    poor = fit(
        collect([step([chain("a", [-0.5], 1)])], num_nodes=1),
        target="<b>t</b>",
        drafter="d & e",
        dtype="float32",
        prompts="one",
    )
    path = tmp_path / "report.html"
    write_report(path, poor)
    text = path.read_text()
    assert re.findall(r'<img alt="([^"]*)"', text) == PLOTS
    assert "&lt;b&gt;t&lt;/b&gt;" in text
    assert "<b>" not in text
