# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm watch`: what it makes of two readings of /metrics."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console
from typer.testing import CliRunner

from echo_vllm.cli import app
from echo_vllm.cli.watch import Scrape, Window, dashboard, decision


def page(scale: int) -> str:
    """A server's metrics after `scale` equal spells of work."""
    labels = '{engine="0",model_name="m"}'
    counters = {
        "generation_tokens": 200,
        "echo_trees": 100,
        "echo_verified_nodes": 800,
        "echo_accepted_tokens": 100,
        "echo_budget_nodes": 1600,
        "echo_steps": 100,
        "echo_resting_steps": 25,
        "echo_step_seconds": 2,
        "echo_predicted_step_seconds": 1,
        "echo_predicted_steps": 100,
        "echo_verify_seconds": 3,
        "echo_draft_seconds": 1,
    }
    lines = []
    for name, value in counters.items():
        lines += [f"# TYPE vllm:{name} counter", f"vllm:{name}_total{labels} {value * scale}"]
    for name, per_depth in (("trees", (100, 50)), ("accepted", (60, 10)), ("expected", (55, 20))):
        lines.append(f"# TYPE vllm:echo_depth_{name} counter")
        for depth, value in enumerate(per_depth, 1):
            extra = labels.replace("}", f',depth="{depth}"}}')
            lines.append(f"vllm:echo_depth_{name}_total{extra} {value * scale}")
    lines.append("# TYPE vllm:echo_tree_depth histogram")
    for limit, value in (("1.0", 50), ("2.0", 100), ("+Inf", 100)):
        extra = labels.replace("}", f',le="{limit}"}}')
        lines.append(f"vllm:echo_tree_depth_bucket{extra} {value * scale}")
    for name, value in (("plan_depth", 3), ("plan_price", 40), ("plan_max_rows", 0)):
        lines += [f"# TYPE vllm:echo_{name} gauge", f"vllm:echo_{name}{labels} {value}"]
    return "\n".join(lines) + "\n"


def shown(window: Window) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(dashboard("http://server", window))
    return " ".join(console.export_text().split())


def test_figures_are_of_the_time_between_two_readings() -> None:
    text = shown(Window(Scrape.parse(page(3), 10.0), Scrape.parse(page(4), 20.0)))
    for said in (
        "tokens per second 20.0",
        "tokens a step and tree 2.00",
        "nodes per accepted token 8.0",
        "steps that rest 25 %",
        "of the budget used 50 %",
        "draft to depth 3 (a second is worth 40 tokens)",
        "step 20.0 ms",
        "predicted 10.0 ms",
        "draft 25 %",
        "60 % (expected 55 %)",
        "20 % (expected 40 %)",
    ):
        assert said in text


def test_an_idle_server_has_dashes_and_no_division_by_nothing() -> None:
    same = Scrape.parse(page(1), 1.0)
    assert "tokens a step and tree -" in shown(Window(same, same))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ((None, None, None), "-"),
        ((0.0, 50.0, 0.0), "rest (a second is worth 50 tokens)"),
        ((4.0, 0.0, 32.0), "draft to depth 4, up to 32 rows"),
    ],
)
def test_the_plan_in_words(plan: tuple[float | None, ...], said: str) -> None:
    assert decision(*plan) == said


@pytest.fixture
def server() -> Iterator[str]:
    """A server without ECHO."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"# TYPE vllm:num_requests_running gauge\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_server_without_echo_is_named(server: str) -> None:
    result = CliRunner().invoke(app, ["watch", server])
    assert result.exit_code == 2
    assert "serves without ECHO" in result.output


def test_no_server_is_named() -> None:
    result = CliRunner().invoke(app, ["watch", "http://127.0.0.1:1"])
    assert result.exit_code == 2
    assert "give the address of a running server" in " ".join(result.output.split())
