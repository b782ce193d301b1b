# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Prometheus metrics `vllm:echo_*` and one log line, through vLLM's stat-logger plug-in.

vLLM's own `vllm:spec_decode_*` counters stay true for trees: a draft is a tree, its draft tokens
are the verified nodes, and position p counts the trees whose accepted path reached depth p + 1.
What they cannot say (shape, use of the budget) is here.
"""

from __future__ import annotations

from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from echo_vllm.step.stats import StepStats

# Under vLLM's own name, because vLLM configures the loggers below "vllm" and no others.
logger = init_logger(f"vllm.{__name__}")

_LABELS = ["model_name", "engine"]
_POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class EchoStatLogger(AggregateStatLoggerBase):
    """Counts what the worker reports per step; silent unless the method is `echo`."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        spec = vllm_config.speculative_config
        self.enabled = spec is not None and spec.echo is not None
        if not self.enabled:
            return
        self.max_nodes = spec.num_speculative_tokens
        self.max_depth = spec.echo.max_depth
        self.model_name = vllm_config.model_config.served_model_name
        self.engine_indexes = engine_indexes
        self.metrics: dict[int, dict[str, Any]] = {}
        self._reset()

    def _register(self) -> None:
        """Make the metrics, once all of vLLM's loggers exist.

        vLLM's own Prometheus logger is made after the plug-ins' and clears the registry of every
        name with `vllm` in it.
        """
        if self.metrics:
            return
        counter, histogram = prometheus_client.Counter, prometheus_client.Histogram
        gauge = prometheus_client.Gauge
        depths = list(range(1, self.max_depth + 1))
        metrics: dict[str, Any] = {
            "trees": counter("vllm:echo_trees", "Draft trees that the target verified.", _LABELS),
            "nodes": counter(
                "vllm:echo_verified_nodes", "Draft nodes that the target verified.", _LABELS
            ),
            "accepted": counter(
                "vllm:echo_accepted_tokens", "Draft nodes that were accepted.", _LABELS
            ),
            "budget": counter(
                "vllm:echo_budget_nodes",
                "Nodes that the verified trees could have had at most; "
                "verified nodes over this is the use of the budget.",
                _LABELS,
            ),
            "verify_s": counter(
                "vllm:echo_verify_seconds", "Seconds in target forward, sampling, commit.", _LABELS
            ),
            "draft_s": counter(
                "vllm:echo_draft_seconds", "Seconds in the drafter and the policy.", _LABELS
            ),
            "starved": counter(
                "vllm:echo_starved_requests",
                "Drafts that got no node because others paid better, one a request and step.",
                _LABELS,
            ),
            "waiting": gauge(
                "vllm:echo_backlog_tokens", "Tokens that the drafter has not seen yet.", _LABELS
            ),
            "beyond_head": gauge(
                "vllm:echo_requests_beyond_head",
                "Running requests that the draft head has no positions for.",
                _LABELS,
            ),
            "depth": histogram(
                "vllm:echo_tree_depth", "Depth of verified trees.", _LABELS, buckets=depths
            ),
            "width": histogram(
                "vllm:echo_tree_width",
                "The most nodes in one level of verified trees.",
                _LABELS,
                buckets=_POWERS,
            ),
            "path": histogram(
                "vllm:echo_accepted_depth",
                "Depth down to which a verified tree was accepted.",
                _LABELS,
                buckets=[0, *depths],
            ),
        }
        self.metrics = {
            index: {
                key: metric.labels(self.model_name, str(index)) for key, metric in metrics.items()
            }
            for index in self.engine_indexes
        }

    def _reset(self) -> None:
        self.trees = self.nodes = self.accepted = 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add one step's report."""
        if not self.enabled or scheduler_stats is None or scheduler_stats.echo_stats is None:
            return
        step = StepStats(**scheduler_stats.echo_stats)
        self._register()
        metrics = self.metrics[engine_idx]
        metrics["verify_s"].inc(step.verify_s)
        metrics["draft_s"].inc(step.draft_s)
        metrics["starved"].inc(step.starved)
        metrics["waiting"].set(step.waiting)
        # The step still counts requests that end with it.
        running = scheduler_stats.num_running_reqs
        metrics["beyond_head"].set(min(step.beyond_head, running))
        if not step.nodes:
            return
        metrics["trees"].inc(len(step.nodes))
        metrics["nodes"].inc(sum(step.nodes))
        metrics["accepted"].inc(sum(step.accepted))
        metrics["budget"].inc(len(step.nodes) * self.max_nodes)
        for key, values in (
            ("depth", step.depths),
            ("width", step.widths),
            ("path", step.accepted),
        ):
            for value in values:
                metrics[key].observe(value)
        self.trees += len(step.nodes)
        self.nodes += sum(step.nodes)
        self.accepted += sum(step.accepted)

    def log(self) -> None:
        """One line for the time since the last call, if anything was verified."""
        if not self.enabled or not self.trees:
            return
        logger.info(
            "ECHO: %d trees verified, %.1f nodes a tree, %.2f tokens a step and request, "
            "%.2f verified nodes per accepted token, %.0f%% of the budget used",
            self.trees,
            self.nodes / self.trees,
            1 + self.accepted / self.trees,
            self.nodes / self.accepted if self.accepted else float("inf"),
            100 * self.nodes / (self.trees * self.max_nodes),
        )
        self._reset()

    def log_engine_initialized(self) -> None:
        """Called when all loggers exist: show the metrics from the start, at zero."""
        if self.enabled:
            self._register()
