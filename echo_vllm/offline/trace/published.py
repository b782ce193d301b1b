# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Step costs of machines that others have measured, as far as their numbers say.

One study publishes a cost model (`specdecode-bench-8b-h100`). Elsewhere what is published are
throughput ratios, and a ratio at a batch size says how much longer a step with so many more rows
took, if the tokens of a step and the share of the drafter are known. Neither is published with the
ratios, so each cost here comes with the assumptions that it needs. They bend the answer: a replay
on these curves plans an experiment, it does not replace one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from echo_vllm.forecast import CostCurve, Hinge, StepCost, fit_hinge

EAGLE3_BATCHES = (2, 4, 8, 16, 24, 32, 48, 56, 64)
EAGLE3_RATIOS = (1.81, 1.82, 1.62, 1.48, 1.39, 1.32, 1.38, 1.34, 1.38)
"""Throughput of a chain of three over plain decoding, by batch size (EAGLE-3, arXiv 2503.01840):
LLaMA-3.1-8B, SGLang, one H100."""

EAGLE3_CHAIN = 3
H100_PLAIN_TOKENS_PER_SECOND = 158.34
"""Plain decoding of the same model on the same machine, one request (SGLang's documentation)."""

DRAFTER_SHARE = 0.08
"""One drafter forward over one target forward with the same rows. A head of one layer with a
vocabulary of 32,000 reads about 5 % of the 8 billion weights; the rest is for launching it."""

ECHO_TOKENS_PER_SECOND = 10_703.0
"""EAGLE-3, LLaMA-3.1-8B, 8 x H100, 256 requests (ECHO, arXiv 2604.09603)."""

ECHO_BATCH = 256
ECHO_BREAK_EVEN = 128
ECHO_NODES = 5
ECHO_TOKENS_PER_STEP = 2.5
ECHO_K_MAX = 128

SPECDECODE_BENCH_STEP = 5.886e-3
SPECDECODE_BENCH_TOKEN = 2.10e-5
SPECDECODE_BENCH_CONTEXT = 3.93e-8
SPECDECODE_BENCH_DRAFT = 2.135e-3
SPECDECODE_BENCH_DRAFT_TOKEN = 8.4e-7
SPECDECODE_BENCH_DRAFT_CONTEXT = 2.4e-9
SPECDECODE_BENCH_OVERHEAD = 1.207e-3
"""Seconds of a target forward, a row and a token of context; of a drafting, likewise; of what a
step takes beside them (2601.11580, its simulator: Llama-3.1-8B with EAGLE-3 on one H100)."""


@dataclass(frozen=True)
class PublishedCost:
    """A cost that follows from published numbers and assumptions.

    Attributes:
        name: as on the command line, after `published:`.
        cost: of a step whose requests have no context.
        sources: what was published, and where.
        assumptions: what was not, one sentence each.
        context_s: seconds more of every step, a token of the batch's context.
        draft_context_s: of every drafting, likewise.
    """

    name: str
    cost: StepCost
    sources: tuple[str, ...]
    assumptions: tuple[str, ...]
    context_s: float = 0.0
    draft_context_s: float = 0.0

    def with_context(self, tokens: float) -> StepCost:
        """Of a step whose requests have `tokens` of context in all.

        No choice of nodes changes the context, so its time is a constant of the step: part of what
        a step takes outside of rows, and of what a drafting does.
        """
        return replace(
            self.cost,
            other=self.cost.other + self.context_s * tokens,
            draft_fixed=self.cost.draft_fixed + self.draft_context_s * tokens,
        )


def eagle3_h100() -> PublishedCost:
    """LLaMA-3.1-8B on one H100, from EAGLE-3's throughput ratios in SGLang."""
    base = 1.0 / H100_PLAIN_TOKENS_PER_SECOND
    drafting = EAGLE3_CHAIN * DRAFTER_SHARE
    # T(B * 4) + drafting * T(B) = T(B) * (1 + drafting) * ratio(2) / ratio(B), from small B on.
    rows, seconds = [1.0, 2.0 * (1 + EAGLE3_CHAIN)], [base, base]
    for batch, ratio in zip(EAGLE3_BATCHES[1:], EAGLE3_RATIOS[1:], strict=True):
        plain = CostCurve.from_points(rows, seconds)(float(batch))
        growth = (1.0 + drafting) * EAGLE3_RATIOS[0] / ratio - drafting
        rows.append(float(batch * (1 + EAGLE3_CHAIN)))
        seconds.append(plain * growth)
    measured = CostCurve.from_points(rows, seconds)
    hinge = fit_hinge(measured)
    last = measured.counts[-1]
    beyond = measured.seconds[-1] + hinge.gamma * hinge.base * last
    verify = CostCurve((*measured.counts, 2 * last), (*measured.seconds, beyond))
    return PublishedCost(
        name="eagle3-h100",
        cost=_with_drafter(verify),
        sources=(
            "EAGLE-3 (arXiv 2503.01840): throughput of a chain of 3 over plain decoding, "
            "LLaMA-3.1-8B in SGLang on one H100, at batch sizes "
            f"{', '.join(map(str, EAGLE3_BATCHES))}: {', '.join(map(str, EAGLE3_RATIOS))}.",
            "SGLang's documentation: 158.34 tokens/s of plain decoding with one request there.",
        ),
        assumptions=(
            "A step makes the same tokens at every batch size, so the ratios fall because the "
            "steps take longer.",
            f"At batch size 2 the {2 * (1 + EAGLE3_CHAIN)} rows of a verification take as long as "
            "2 rows; from there on T(4B) follows from T(B) and the ratio at B.",
            f"A drafter forward takes {DRAFTER_SHARE:.0%} of a target forward with the same rows, "
            "catch-up or level.",
            f"Up to {last:.0f} rows this is what the ratios imply, made monotone; beyond, where "
            f"nothing was measured, the slope of the fitted hinge (K_max {hinge.k_max:.0f} rows, "
            f"gamma {hinge.gamma:.4f} a row, error {hinge.error:.0%}).",
            "Context lengths, sampling and the scheduler are in the rows' cost; none is modelled.",
        ),
    )


def echo_8xh100() -> PublishedCost:
    """LLaMA-3.1-8B as in ECHO's high-load experiments: a hinge, mostly assumed."""
    rows = ECHO_BREAK_EVEN * (1 + ECHO_NODES)
    drafting = 3 * DRAFTER_SHARE
    # At 128 requests: tokens per step = step time over plain step time, plain being flat there.
    gamma = (ECHO_TOKENS_PER_STEP - 1.0 - drafting) / (rows - ECHO_K_MAX)
    relative = Hinge(float(ECHO_K_MAX), gamma, 1.0)
    plain_rows = float(ECHO_BATCH)
    step = relative(ECHO_BATCH * (1.0 + ECHO_NODES)) + drafting * relative(plain_rows)
    base = ECHO_BATCH * ECHO_TOKENS_PER_STEP / ECHO_TOKENS_PER_SECOND / step
    return PublishedCost(
        name="echo-8xh100",
        cost=_with_drafter(Hinge(float(ECHO_K_MAX), gamma, base).to_curve()),
        sources=(
            "ECHO (arXiv 2604.09603): T_verify = T_ar * (1 + gamma * max(0, K - K_max)); K_max and "
            "gamma are not published.",
            "ECHO: EAGLE-3 makes 10,703 tokens/s with LLaMA-3.1-8B and 256 requests on 8 x H100, "
            "and is slower than plain decoding at 128; the high-load setting has 5 nodes a tree "
            "and starts with depth 3.",
        ),
        assumptions=(
            f"K_max is {ECHO_K_MAX} rows: plain decoding of {ECHO_BREAK_EVEN} requests still "
            "costs what one request costs.",
            f"EAGLE-3 makes {ECHO_TOKENS_PER_STEP} tokens a step with {ECHO_NODES} nodes.",
            f"At {ECHO_BREAK_EVEN} requests EAGLE-3 is exactly as fast as plain decoding; it was "
            f"slower, so the real gamma is larger than {gamma:.5f} a row.",
            f"A drafter forward takes {DRAFTER_SHARE:.0%} of a target forward with the same rows; "
            "EAGLE-3 runs three.",
            f"T_ar is {1e3 * base:.1f} ms, so that EAGLE-3's published throughput at 256 requests "
            "comes out.",
        ),
    )


def specdecode_bench() -> PublishedCost:
    """LLaMA-3.1-8B with EAGLE-3 on one H100, as the study with the oracle has it."""

    def linear(fixed: float, row: float) -> CostCurve:
        return CostCurve((0.0, 1.0), (fixed, fixed + row))

    return PublishedCost(
        name="specdecode-bench-8b-h100",
        cost=StepCost(
            verify=linear(SPECDECODE_BENCH_STEP, SPECDECODE_BENCH_TOKEN),
            draft_level=linear(0.0, SPECDECODE_BENCH_DRAFT_TOKEN),
            catch_up=linear(0.0, SPECDECODE_BENCH_DRAFT_TOKEN),
            other=SPECDECODE_BENCH_OVERHEAD,
            draft_fixed=SPECDECODE_BENCH_DRAFT,
        ),
        sources=(
            "Speculative Decoding: Performance or Illusion? (arXiv 2601.11580) and its simulator, "
            "LLaMA-3.1-8B with EAGLE-3 on one H100: a target forward takes 5.886 ms + 0.0210 ms a "
            "token + 3.93e-5 ms a token of KV context, a drafting 2.135 ms + 8.4e-4 ms a token + "
            "2.4e-6 ms a token of context whatever its length, a step 1.207 ms beside them.",
        ),
        assumptions=(
            "A drafting's tokens are all rows of its forwards.",
            "The cost is linear as far as a replay goes; it was fitted with up to 64 requests.",
            "Drafting a tree takes what drafting a chain does, but for its rows.",
        ),
        context_s=SPECDECODE_BENCH_CONTEXT,
        draft_context_s=SPECDECODE_BENCH_DRAFT_CONTEXT,
    )


def _with_drafter(verify: CostCurve) -> StepCost:
    counts, seconds = verify.to_points()
    drafter = CostCurve(tuple(counts), tuple((DRAFTER_SHARE * np.array(seconds)).tolist()))
    return StepCost(verify=verify, draft_level=drafter, catch_up=drafter)


PUBLISHED: dict[str, Callable[[], PublishedCost]] = {
    "eagle3-h100": eagle3_h100,
    "echo-8xh100": echo_8xh100,
    "specdecode-bench-8b-h100": specdecode_bench,
}
