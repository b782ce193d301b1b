# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs every query of the dashboard and every rule in a real Prometheus that scrapes a real server
under load; each must return data.

    python -m monitoring.check [--picture FILE.png] [--seconds 60]

Needs `prometheus` and `promtool` (Debian and Ubuntu: apt-get install prometheus) and the demo
model. Called by `make dashboard-test`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import yaml

from echo_vllm.conversations import PROMPTS, read_conversations
from monitoring.panels import DASHBOARD, PANELS, VARIABLES, dashboard_json

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "monitoring" / "rules.yml"
MODEL = "smollm2-135m-instruct"
# `auto` that drafts and rests for certain, however busy the machine is: up to 8 rows a forward
# takes as long as one of a single row, each row more takes as long again, and nothing is learnt.
CONFIG = (
    '{"method": "echo", "model": "models/smollm2-135m-eagle3", "num_speculative_tokens": 8, '
    '"echo": {"policy": "auto", "max_depth": 4, "k_max": 8, "gamma": 1, "online": false}}'
)
AT_ONCE = (1, 4, 8, 2)
"""Requests of the load's phases: beside 8 a node costs a whole forward, beside fewer nothing."""
HAPPENED = ("echo_trees_total", "echo_resting_steps_total", "echo_accepted_tokens_total")
"""Counters without which the panels would show a load that says nothing."""
SCRAPE_S = 2
RATE_INTERVAL = "15s"
TIMEOUT_S = 60

Series = list[tuple[str, list[tuple[float, float]]]]
"""Legends and their points: seconds, value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--picture", type=Path, help="draw the panels from Prometheus' data")
    parser.add_argument("--seconds", type=float, default=60, help="of load (60)")
    options = parser.parse_args()
    for tool in ("prometheus", "promtool"):
        if shutil.which(tool) is None:
            sys.exit(f"error: {tool} was not found: apt-get install prometheus")
    subprocess.run(["promtool", "check", "rules", str(RULES)], check=True)
    if DASHBOARD.read_text("utf-8") != dashboard_json():
        sys.exit(f"error: {DASHBOARD} is old: python -m monitoring.panels")
    ports = [free_port(), free_port()]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        url = stack.enter_context(server(ports[0], folder))
        prometheus = stack.enter_context(scraping(ports[0], ports[1], folder))
        # What happens before the first reading is in no rate.
        wait_for(prometheus, "vllm:echo_steps_total")
        begin = time.time()
        load(url, options.seconds)
        wait_for(prometheus, f"timestamp(vllm:echo_steps_total) > {time.time()}")
        time.sleep(2 * SCRAPE_S)  # Until the rules have seen that.
        end = time.time()
        found = {
            panel.title: [
                (query.legend, series(prometheus, query.expression, query.legend, begin, end))
                for query in panel.queries
            ]
            for panel in PANELS
        }
        empty = [
            f"{title}: {legend}"
            for title, queries in found.items()
            for legend, lines in queries
            if not any(math.isfinite(y) for _, points in lines for _, y in points)
        ]
        empty += rules_without_data(prometheus)
        empty += [name for name in HAPPENED if not sum(instant(prometheus, f"vllm:{name}"))]
    if options.picture:
        draw({t: [line for _, lines in qs for line in lines] for t, qs in found.items()}, begin,
             options.picture)  # fmt: skip
    queries = sum(len(panel.queries) for panel in PANELS)
    print(f"{queries} queries of {len(PANELS)} panels and {num_rules()} rules: ", end="")
    if empty:
        sys.exit("no data for " + "; ".join(empty))
    print("all return data")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], url: str, folder: Path, **env: str) -> Iterator[str]:
    """A process, from when `url` answers; ended with the block."""
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **env}
        )
    try:
        until = time.monotonic() + 600
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=5).is_success:
                    break
            if process.poll() is not None or time.monotonic() > until:
                tail = log.read_text(errors="replace").splitlines()[-30:]
                sys.exit("\n".join([*tail, f"error: {command[0]} does not start"]))
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def server(port: int, folder: Path) -> Iterator[str]:
    """The demo, with a drafting policy that predicts."""
    url = f"http://127.0.0.1:{port}"
    env = {"PORT": str(port), "CONFIG": CONFIG, "KV_CACHE": "512M", "ARGS": "--max-num-seqs 8"}
    with running(["scripts/serve.sh"], f"{url}/health", folder, **env):
        yield url


@contextlib.contextmanager
def scraping(target: int, port: int, folder: Path) -> Iterator[str]:
    """A Prometheus with the shipped rules and a quick pulse."""
    config = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    subprocess.run(["promtool", "check", "config", str(file)], check=True)
    url = f"http://127.0.0.1:{port}"
    command = [
        *("prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with running(command, f"{url}/-/ready", folder):
        yield url


def load(url: str, seconds: float) -> None:
    """Chats at a changing number of requests at once: all phases, as often as the time allows."""
    until = time.monotonic() + seconds
    prompts = itertools.cycle(turns[0] for turns in read_conversations(PROMPTS))

    def ask(prompt: str) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 48,
            "temperature": 0,
            "ignore_eos": True,  # So that a phase keeps its number of requests.
        }
        client.post("/v1/chat/completions", json=body).raise_for_status()

    with httpx.Client(base_url=url, timeout=300) as client:
        while True:
            for at_once in AT_ONCE:
                with ThreadPoolExecutor(at_once) as pool:
                    list(pool.map(ask, itertools.islice(prompts, at_once)))  # Raises their errors.
            if time.monotonic() > until:
                return


def instant(prometheus: str, expression: str) -> list[float]:
    """The values that PromQL has now."""
    answer = httpx.get(
        f"{prometheus}/api/v1/query", params={"query": expression}, timeout=TIMEOUT_S
    )
    if not answer.is_success:
        sys.exit(f"error: {expression}: {answer.text}")
    return [float(result["value"][1]) for result in answer.json()["data"]["result"]]


def wait_for(prometheus: str, expression: str) -> None:
    """Until PromQL has a value."""
    until = time.monotonic() + 120
    while not instant(prometheus, expression):
        if time.monotonic() > until:
            sys.exit(f"error: Prometheus has no {expression} after 120 s")
        time.sleep(0.5)


def series(prometheus: str, expression: str, legend: str, begin: float, end: float) -> Series:
    """What a panel would draw of a query."""
    for name in VARIABLES:
        expression = expression.replace(f"${name}", ".*")
    expression = expression.replace("$__rate_interval", RATE_INTERVAL)
    answer = httpx.get(
        f"{prometheus}/api/v1/query_range",
        params={"query": expression, "start": begin, "end": end, "step": SCRAPE_S},
        timeout=TIMEOUT_S,
    )
    if not answer.is_success:
        sys.exit(f"error: {expression}: {answer.text}")
    return [
        (named(legend, result["metric"]), [(float(t), float(v)) for t, v in result["values"]])
        for result in answer.json()["data"]["result"]
    ]


def named(legend: str, labels: Mapping[str, str]) -> str:
    """A legend as Grafana fills it in."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def rules_without_data(prometheus: str) -> list[str]:
    """Rules that do not evaluate, and recorded ones without a value."""
    groups: list[dict[str, Any]] = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    bad = []
    for rule in (rule for group in groups for rule in group["rules"]):
        has_data = rule["type"] == "alerting" or any(
            map(math.isfinite, instant(prometheus, rule["name"]))
        )
        if rule["health"] != "ok" or not has_data:
            bad.append(f"rule {rule['name']} ({rule.get('lastError', 'no value')})")
    return bad


def num_rules() -> int:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return sum(len(group["rules"]) for group in groups)


def draw(panels: Mapping[str, Series], begin: float, path: Path) -> None:
    """All panels in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 3, figsize=(15, 12), constrained_layout=True)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        for legend, points in lines:
            axis.plot([t - begin for t, _ in points], [v for _, v in points], label=legend)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.supxlabel("seconds")
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    main()
