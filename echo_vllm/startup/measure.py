# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Measures, at start-up, what forwards of target and drafter cost.

Real forwards of both models over growing numbers of rows, each with what follows it in a step: for
the target logits and their maximum, for the drafter the best tokens. Attention is left out, because
it depends on contexts that do not exist yet; real steps correct the curves while serving. The
result is cached on disk, and a few forwards at each start say whether it still holds: one that was
measured while something else took the machine would mislead every policy for good.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.version import __version__ as vllm_version

from echo_vllm import __version__, ops
from echo_vllm.forecast import (
    CostCache,
    CostCurve,
    CostKey,
    StepCost,
    budget_rows,
    fit_hinge,
)
from echo_vllm.machine import describe_cpu
from echo_vllm.ops import dispatch
from echo_vllm.ops.argmax import argmax_of_rows

logger = init_logger(f"vllm.{__name__}")

BUDGET_S = 12.0
"""Seconds after which no forward is begun; the last slope stands for sizes not reached."""

FIRST_ROUND = 0.6
"""Share of the time that the first round over the sizes may take."""

ROUNDS = 6
CHECKED_ROWS = (1, 4, 16, 64)
"""Sizes whose forwards are timed again at each start."""

CHECKS = 4
"""How often each of them, while there is time."""

CHECK_S = 1.5
"""Seconds of that, the first two sizes excepted."""

DISAGREES = 1.6
"""Ratio between the sizes' changes beyond which a curve is taken for wrong. A machine that got
slower as a whole changes all sizes alike, which no decision depends on."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def measured_cost(
    runner: Any, forwards_of: Callable[[Any], AbstractContextManager[Forwards]] | None = None
) -> StepCost:
    """The cost of this engine's steps: cached, or measured now.

    Args:
        runner: a model runner.
        forwards_of: its forwards; those of a V1 runner without.
    """
    config: VllmConfig = runner.vllm_config
    spec = config.speculative_config
    assert spec is not None
    max_rows = min(
        config.scheduler_config.max_num_batched_tokens,
        config.scheduler_config.max_num_seqs * (1 + spec.num_speculative_tokens),
        ROWS[-1],
    )
    key = cost_key(runner, max_rows)
    cache = CostCache()
    cost = _of_first_rank(lambda: cache.load(key))
    with (forwards_of or _forwards)(runner) as forwards:
        if cost is not None and not _holds(cost, forwards, max_rows):
            logger.info("Forwards no longer cost what %s says.", cache.path(key))
            cost = None
        if cost is None:
            logger.info("Measuring what forwards cost (at most about %.0f s)...", BUDGET_S)
            begin = perf_counter()
            cost = _measure(forwards, max_rows)
            seconds = perf_counter() - begin
            if _holds(cost, forwards, max_rows):
                logger.info("Measured in %.1f s; kept in %s.", seconds, cache.path(key))
                cache.save(key, cost)
            else:
                logger.warning(
                    "What forwards cost was measured in %.1f s, but the machine was not steady: "
                    "it is not kept, and the next start measures again.",
                    seconds,
                )
    hinge = fit_hinge(cost.verify)
    logger.info(
        "Cost of a target forward: %s; fitted hinge: K_max %.0f rows, gamma %.4f per row, "
        "error %.0f%%; budget of policy echo: %.0f rows.",
        ", ".join(
            f"{rows:g} rows {1000 * seconds:.0f} ms"
            for rows, seconds in zip(*cost.verify.to_points(), strict=True)
        ),
        hinge.k_max,
        hinge.gamma,
        100 * hinge.error,
        budget_rows(cost.verify),
    )
    return cost


def cost_key(runner: Any, max_rows: int) -> CostKey:
    """What the costs of this engine's forwards, of up to `max_rows` rows, depend on."""
    config: VllmConfig = runner.vllm_config
    spec = config.speculative_config
    assert spec is not None
    return CostKey(
        target=config.model_config.model,
        drafter=spec.model,
        checkpoints=f"{_checkpoint(config.model_config)}, {_checkpoint(spec.draft_model_config)}",
        dtype=f"{config.model_config.dtype}",
        engine=_engine(config),
        kernels=_kernels(runner.device, spec.echo.linear),
        hardware=f"{_describe(runner.device)}, {config.parallel_config.tensor_parallel_size} ranks",
        threads=torch.get_num_threads(),
        vllm_version=vllm_version,
        echo_vllm_version=__version__,
        max_rows=max_rows,
    )


@dataclass(frozen=True)
class Forwards:
    """Each runs a forward of so many rows, with what follows it in a step.

    `target_sizes` and `draft_sizes` are the rows that the models' CUDA graphs were captured for.
    """

    target: Callable[[int], None]
    draft: Callable[[int], None]
    catch_up: Callable[[int], None]
    target_sizes: Sequence[int] = ()
    draft_sizes: Sequence[int] = ()


@contextmanager
def _forwards(runner: Any) -> Iterator[Forwards]:
    drafter = runner.drafter

    # A CPU has no graphs; on a GPU steps run in those that were captured, if any were.
    mode = CUDAGraphMode.NONE if runner.device.type == "cpu" else None

    def target(rows: int) -> None:
        hidden, _ = runner._dummy_run(rows, cudagraph_runtime_mode=mode)
        argmax_of_rows(runner.model.compute_logits(hidden[:rows]))
        runner._sync_device()

    def draft(rows: int) -> None:
        output, _ = drafter._forward(
            drafter.input_ids[:rows],
            drafter._get_positions(rows),
            drafter.hidden_states[:rows],
            None,
            None,
        )
        drafter._top_tokens(output, drafter.policy.num_ranks)
        runner._sync_device()

    def catch_up(rows: int) -> None:
        features = drafter.model.combine_hidden_states(
            drafter.hidden_states.new_zeros(rows, feature_size(runner))
        )
        drafter._forward(
            drafter.input_ids[:rows], drafter._get_positions(rows), features, None, None
        )
        runner._sync_device()

    # Different tokens: a mixture of experts sends equal rows to the same experts, and a forward
    # of many rows would look as cheap as one of a few.
    ids = runner.input_ids.gpu
    before = ids.clone()
    ids.copy_(torch.arange(len(ids)) * 7919 % runner.model_config.get_vocab_size())
    # The target's dummy run includes one of the drafter; it must not count as verification.
    dummy_run, drafter.dummy_run = drafter.dummy_run, lambda *args, **kwargs: None
    try:
        with torch.inference_mode():
            yield Forwards(
                target,
                draft,
                catch_up,
                captured_sizes(runner.cudagraph_dispatcher),
                captured_sizes(drafter.cudagraph_dispatcher),
            )
    finally:
        drafter.dummy_run = dummy_run
        ids.copy_(before)


def _measure(forwards: Forwards, max_rows: int) -> StepCost:
    """Time forwards of up to `max_rows` rows."""
    # Not two sizes next to each other at the end, whose slope would be chance.
    sizes = sorted({rows for rows in ROWS if 6 * rows < 5 * max_rows} | {max_rows})
    timings = [
        _Timings(forwards.target, sizes, 0.6 * BUDGET_S),
        _Timings(forwards.draft, sizes, 0.2 * BUDGET_S),
        _Timings(forwards.catch_up, sizes, 0.2 * BUDGET_S),
    ]
    for timing in timings:
        timing.first_round()
    for _ in range(1, ROUNDS):
        for timing in timings:
            timing.again()
    paddings = (forwards.target_sizes, forwards.draft_sizes, forwards.draft_sizes)
    verify, draft_level, catch_up = (
        timing.curve(sizes) for timing, sizes in zip(timings, paddings, strict=True)
    )
    return StepCost(verify, draft_level, catch_up)


def _holds(cost: StepCost, forwards: Forwards, max_rows: int) -> bool:
    """Whether forwards of target and drafter still have the proportions of `cost`: the sizes of
    each to one another, and the two to one another."""
    sizes = sorted({min(rows, max_rows) for rows in CHECKED_ROWS})
    target = _ratios(forwards.target, cost.verify, sizes)
    draft = _ratios(forwards.draft, cost.draft_level, sizes)
    pairs = [target, draft, [median(target), median(draft)]]
    return bool(_of_first_rank(lambda: all(max(p) <= DISAGREES * min(p) for p in pairs)))


def _ratios(forward: Callable[[int], None], curve: CostCurve, sizes: Sequence[int]) -> list[float]:
    """The least time now over the curve's, of the first two of `sizes` and as many as fit in."""
    end = perf_counter() + CHECK_S

    def is_late() -> bool:
        return bool(_of_first_rank(lambda: perf_counter() > end))

    ratios: list[float] = []
    for rows in sizes:
        if len(ratios) > 1 and is_late():
            break
        least = _timed(forward, rows)
        for _ in range(1, CHECKS):
            if is_late():
                break
            least = min(least, _timed(forward, rows))
        ratios.append(least / curve(rows))
    return ratios


def _checkpoint(model: Any) -> str:
    """What tells one state of a model's files from another: a repository's commit, or sizes and
    times of the files that a forward depends on."""
    path = Path(model.model)
    if not path.exists():
        return f"{getattr(model.hf_config, '_commit_hash', None) or model.revision}"
    files = [path] if path.is_file() else sorted(path.iterdir())
    states = [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in files
        if file.suffix in WEIGHTS or file.name == "config.json"
    ]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()[:16]


def _engine(config: VllmConfig) -> str:
    """vLLM's own hashes of all that changes the forwards, and how they are run."""
    compilation, spec = config.compilation_config, config.speculative_config
    assert spec is not None
    return (
        f"{config.compute_hash()} {spec.draft_model_config.compute_hash()}, "
        f"compilation {compilation.mode}, graphs {compilation.cudagraph_mode} up to "
        f"{compilation.max_cudagraph_capture_size}"
        f"{', Model Runner V2' if config.use_v2_model_runner else ''}"
    )


def _kernels(device: torch.device, linear: str) -> str:
    """What was chosen of this package's kernels, and torch, which brings the others."""
    chosen = dispatch.forced_implementation() or "by table"
    if device.type == "cpu":
        isa = os.environ.get("ECHO_VLLM_CPU_ISA") or ops.supported_cpu_isas()[-1]
        chosen = f"{chosen}, {isa}"
    return f"linear {linear}, operators {chosen}, torch {torch.__version__}"


def _describe(device: torch.device) -> str:
    """The hardware that the forwards run on."""
    return describe_cpu() if device.type == "cpu" else torch.cuda.get_device_name(device)


def captured_sizes(dispatcher: Any) -> list[int]:
    """Rows that forwards are padded to, of vLLM's CudagraphDispatcher; none without graphs."""
    if dispatcher.cudagraph_mode is CUDAGraphMode.NONE:
        return []
    return sorted(dispatcher.compilation_config.cudagraph_capture_sizes or ())


def feature_size(runner: Any) -> int:
    """Width of the target's features that the drafter reads."""
    if runner.use_aux_hidden_state_outputs:
        return int(runner.drafter.model.model.fc_input_size)
    return int(runner.model_config.get_hidden_size())


def _of_first_rank(decide: Callable[[], Any]) -> Any:
    """What the first of all ranks decides, the data-parallel ones that share experts among them.
    Their forwards meet in collectives, so all must run the same ones, and clocks and files may
    differ."""
    group = get_world_group()
    if group.world_size == 1:
        return decide()
    return group.broadcast_object(decide() if group.rank_in_group == 0 else None, src=0)


def _timed(forward: Callable[[int], None], rows: int) -> float:
    """Seconds of one forward."""
    start = perf_counter()
    forward(rows)
    return perf_counter() - start


class _Timings:
    """The least time of each size of one forward.

    Whatever else a machine does only adds to a time, so the least of several is the forward's own;
    and rounds over all sizes, of all forwards in turn, let a busy second fall on one measurement of
    each, not on all those of one.
    """

    def __init__(self, forward: Callable[[int], None], sizes: Sequence[int], budget_s: float):
        self._forward = forward
        self._sizes = sizes
        self._budget_s = budget_s
        self._spent_s = 0.0
        self._least: dict[int, float] = {}

    def first_round(self) -> None:
        """From small to large sizes, until `FIRST_ROUND` of the time is spent."""
        most = FIRST_ROUND * self._budget_s
        for rows in self._sizes:
            first = self._time(rows)
            # The first forward of a size may allocate or choose a kernel.
            self._least[rows] = self._time(rows) if self._fits(4 * first, most) else first
            # The next size takes about twice as long, and twice.
            if len(self._least) > 2 and not self._fits(4 * self._least[rows], most):
                break

    def again(self) -> None:
        """What the first round reached once more, while there is time."""
        for rows, seconds in self._least.items():
            if self._fits(seconds, self._budget_s):
                self._least[rows] = min(seconds, self._time(rows))

    def curve(self, padded_to: Sequence[int]) -> CostCurve:
        return CostCurve.from_points(
            list(self._least), list(self._least.values()), padded_to=padded_to
        )

    def _time(self, rows: int) -> float:
        seconds = _timed(self._forward, rows)
        self._spent_s += seconds
        return seconds

    def _fits(self, seconds: float, budget_s: float) -> bool:
        return bool(_of_first_rank(lambda: self._spent_s + seconds < budget_s))
