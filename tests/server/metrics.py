# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Reads a server's /metrics page."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Server

Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Metrics:
    """The samples of one moment, or of the time between two moments."""

    samples: dict[Key, float]

    @classmethod
    def read(cls, server: Server) -> Metrics:
        families = text_string_to_metric_families(server.get("/metrics"))
        return cls(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in families
                for sample in family.samples
            }
        )

    def __sub__(self, before: Metrics) -> Metrics:
        """What was counted since `before`; meaningless for gauges."""
        return Metrics({k: v - before.samples.get(k, 0.0) for k, v in self.samples.items()})

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples `vllm:name` that have these labels; there must be one."""
        found = [
            value
            for (sample, its), value in self.samples.items()
            if sample == f"vllm:{name}" and its >= labels.items()
        ]
        assert found, f"there is no vllm:{name} with {labels} on /metrics"
        return sum(found)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Samples `vllm:name` by the value of `label`."""
        return {
            dict(its)[label]: value
            for (sample, its), value in self.samples.items()
            if sample == f"vllm:{name}"
        }


def wait_until_idle(server: Server, timeout_s: float = 300) -> Metrics:
    """Wait until no request runs or waits and every KV block is free.

    The engine publishes with every step, and an abort makes none: a request of one token
    does.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        _generate_one_token(server)
        metrics = Metrics.read(server)
        left = {
            name: metrics.total(name)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        if not any(left.values()):
            return metrics
        assert time.monotonic() < deadline, f"the server does not get idle: {left}"
        time.sleep(0.2)


def _generate_one_token(server: Server) -> None:
    model = json.loads(server.get("/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": "One", "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()
