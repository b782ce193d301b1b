# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Prometheus metrics `vllm:echo_*` and one log line; the patched vLLM makes the logger.

vLLM's own `vllm:spec_decode_*` counters stay true for trees: a draft is a tree, its draft tokens
are the verified nodes, and position p counts the trees whose accepted path reached depth p + 1.
What they cannot say (shape, use of the budget) is here. Both count as accepted only what the user
got: the scheduler leaves out what lies behind a limit or a stop token, `leave_out` what lies behind
a stop string, which only the front end sees.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
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
    """Counts what the worker reports per step."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        spec = vllm_config.speculative_config
        assert spec is not None
        self.max_depth = spec.echo.max_depth
        self._reset()
        counter = functools.partial(prometheus_client.Counter, labelnames=_LABELS)
        histogram = functools.partial(prometheus_client.Histogram, labelnames=_LABELS)
        # As vLLM's own, for when several processes write (PROMETHEUS_MULTIPROC_DIR).
        gauge = functools.partial(
            prometheus_client.Gauge, labelnames=_LABELS, multiprocess_mode="mostrecent"
        )
        depths = list(range(1, self.max_depth + 1))
        metrics: dict[str, Any] = {
            "trees": counter("vllm:echo_trees", "Draft trees that the target verified."),
            "nodes": counter("vllm:echo_verified_nodes", "Draft nodes that the target verified."),
            "accepted": counter("vllm:echo_accepted_tokens", "Draft nodes that were accepted."),
            "budget": counter(
                "vllm:echo_budget_nodes",
                "Nodes that the verified trees could have had at most, together: k_max or what the "
                "step has room for; verified nodes over this is the use of the budget.",
            ),
            "verify_s": counter(
                "vllm:echo_verify_seconds", "Seconds in target forward, sampling, commit."
            ),
            "draft_s": counter("vllm:echo_draft_seconds", "Seconds in the drafter and the policy."),
            "starved": counter(
                "vllm:echo_starved_requests",
                "Drafts that got no node because others paid better, one a request and step.",
            ),
            "waiting": gauge(
                "vllm:echo_backlog_tokens", "Tokens that the drafter has not seen yet."
            ),
            "beyond_head": gauge(
                "vllm:echo_requests_beyond_head",
                "Running requests that the draft head has no positions for.",
            ),
            "steps": counter("vllm:echo_steps", "Steps of the engine with rows."),
            "resting": counter(
                "vllm:echo_resting_steps", "Of these, steps that neither draft nor verify."
            ),
            "step_s": counter(
                "vllm:echo_step_seconds", "Seconds of steps whose time was predicted."
            ),
            "predicted_s": counter("vllm:echo_predicted_step_seconds", "Their predicted seconds."),
            "predicted": counter("vllm:echo_predicted_steps", "Steps whose time was predicted."),
            "plan_depth": gauge(
                "vllm:echo_plan_depth",
                "Levels that the latest plan allows: 0 rests, as many as trees may have leaves it "
                "to the policy.",
            ),
            "plan_price": gauge(
                "vllm:echo_plan_price", "Tokens that a second was worth to it; 0: unknown."
            ),
            "plan_rows": gauge(
                "vllm:echo_plan_max_rows",
                "Rows up to which it lets a target forward be filled; 0: unknown.",
            ),
            "depth": histogram("vllm:echo_tree_depth", "Depth of verified trees.", buckets=depths),
            "width": histogram(
                "vllm:echo_tree_width",
                "The most nodes in one level of verified trees.",
                buckets=_POWERS,
            ),
            "path": histogram(
                "vllm:echo_accepted_depth",
                "Depth down to which a verified tree was accepted.",
                buckets=[0, *depths],
            ),
        }
        name = vllm_config.model_config.served_model_name
        counter = functools.partial(prometheus_client.Counter, labelnames=[*_LABELS, "depth"])
        by_depth = {
            "reached": counter("vllm:echo_depth_trees", "Verified trees of this depth."),
            "accepted": counter(
                "vllm:echo_depth_accepted", "Of these, those accepted to this depth."
            ),
            "expected": counter(
                "vllm:echo_depth_expected",
                "How many were to be accepted to it by the calibration; 0 where the policy has "
                "none.",
            ),
        }
        self.metrics = {
            index: {key: metric.labels(name, str(index)) for key, metric in metrics.items()}
            for index in engine_indexes
        }

        self.by_depth = {
            index: {
                key: [metric.labels(name, str(index), str(depth)) for depth in depths]
                for key, metric in by_depth.items()
            }
            for index in engine_indexes
        }

    def _reset(self) -> None:
        self.trees = self.nodes = self.accepted = self.budget = 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add one step's report."""
        if scheduler_stats is None or scheduler_stats.echo_stats is None:
            return
        step = StepStats(**scheduler_stats.echo_stats)
        metrics = self.metrics[engine_idx]
        metrics["verify_s"].inc(step.verify_s)
        metrics["draft_s"].inc(step.draft_s)
        metrics["starved"].inc(step.starved)
        metrics["waiting"].set(step.waiting)
        # The step still counts requests that end with it.
        running = scheduler_stats.num_running_reqs
        metrics["beyond_head"].set(min(step.beyond_head, running))
        metrics["plan_depth"].set(self.max_depth if step.plan_depth is None else step.plan_depth)
        metrics["plan_price"].set(step.plan_price)
        metrics["plan_rows"].set(step.plan_rows)
        metrics["steps"].inc(bool(step.rows))
        metrics["resting"].inc(step.rested)
        if step.predicted_s:
            metrics["predicted"].inc()
            metrics["predicted_s"].inc(step.predicted_s)
            metrics["step_s"].inc(step.spent_s)
        if not step.nodes:
            return
        metrics["trees"].inc(len(step.nodes))
        metrics["nodes"].inc(sum(step.nodes))
        metrics["accepted"].inc(sum(step.accepted))
        metrics["budget"].inc(step.budget)
        for key, values in (
            ("depth", step.depths),
            ("width", step.widths),
            ("path", step.accepted),
        ):
            for value in values:
                metrics[key].observe(value)
        by_depth = self.by_depth[engine_idx]
        for key, depths in (("reached", step.depths), ("accepted", step.accepted)):
            for depth, count in Counter(depths).items():
                for reached in by_depth[key][:depth]:
                    reached.inc(count)
        for counter, expected in zip(by_depth["expected"], step.expected, strict=False):
            counter.inc(expected)
        self.trees += len(step.nodes)
        self.nodes += sum(step.nodes)
        self.accepted += sum(step.accepted)
        self.budget += step.budget

    def log(self) -> None:
        """One line for the time since the last call, if anything was verified."""
        if not self.trees:
            return
        logger.info(
            "ECHO: %d trees verified, %.1f nodes a tree, %.2f tokens a step and request, "
            "%.2f verified nodes per accepted token, %.0f%% of the budget used",
            self.trees,
            self.nodes / self.trees,
            1 + self.accepted / self.trees,
            self.nodes / self.accepted if self.accepted else float("inf"),
            100 * self.nodes / self.budget,
        )
        self._reset()

    def log_engine_initialized(self) -> None:
        """Nothing to say before the first step."""


def leave_out(scheduler_stats: Any, dropped: Sequence[tuple[int, int]]) -> None:
    """Take back, in place, what a step's statistics count as accepted and no user got.

    Args:
        scheduler_stats: vLLM's, with `spec_decoding_stats` and `echo_stats` of the step.
        dropped: of outputs that were cut at a stop string, or came after it, the tokens that were
            generated and those that were delivered.
    """
    counted = scheduler_stats.spec_decoding_stats
    if counted is None:
        return
    paths = scheduler_stats.echo_stats["accepted"]
    for generated, delivered in dropped:
        # One of a tree's tokens is the bonus token. Which tree it was does not matter.
        before, after = generated - 1, max(0, delivered - 1)
        if before == after:
            continue
        paths[paths.index(before)] = after
        counted.num_accepted_tokens -= before - after
        for position in range(after, before):
            counted.num_accepted_tokens_per_pos[position] -= 1
