# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Times the CUDA kernels at the shapes of real models, beside their physical floors.

    python -m benchmarks.gpu [--out FILE.json] [--table FILE.json] [--seconds 110] [--quick]

A time is the median of CUDA events around one call, with the L2 cache flushed before each. The
floor of a call is the larger of its bytes over the measured copy bandwidth and its multiply-adds
over the measured rate of a matrix product; both are measured first. What tree attention is compared
with is in `attention_baselines.py`; each is checked against the fused kernel before it is timed.

The most telling shapes come first, and no new one starts when the time is up. JSON is written after
every shape: a run that is cut off leaves what it had. `--table` writes the times of our own
implementations for `ECHO_VLLM_ATTENTION_TABLE` (`echo_vllm/ops/attention_table.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_baselines import (
    BASELINES,
    GATHERED,
    MODELS,
    SLOW_TO_PREPARE,
    AttentionInputs,
    Case,
    Model,
    by_implementation,
    causal_backend,
    trees,
)
from echo_vllm import atomic, ops
from echo_vllm.ops import attention_table

BLOCK_SIZE = 16
DTYPE = torch.bfloat16

BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (512, 4096, 16384, 32768)
ROWS = (1, 8, 16, 33, 64)

# The largest difference that two orders of adding up bfloat16 products may make here.
MOST_DIFFERENCE = 3e-2
WRONG = "WRONG"

# Parameters of Llama-3.1-8B: a step reads them all once, in 16 bits.
PARAMETERS_8B = 8.03e9


@dataclass(frozen=True)
class Rates:
    bytes_per_second: float
    flops: float


@dataclass(frozen=True)
class Result:
    """One shape of one operator; times in microseconds."""

    op: str
    model: str
    requests: int
    context: int
    rows: int
    microseconds: float
    floor_microseconds: float
    others: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)  # baseline -> why


class Timer:
    """Medians, the L2 cache flushed before every call. On a CPU, for the tests, by its clock."""

    def __init__(self, device: torch.device, runs: int, flush_bytes: int = 256 << 20) -> None:
        self.device, self.runs = device, runs
        self.flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def microseconds(self, run: Callable[[], Any], cold: bool = True) -> float:
        for _ in range(3):
            run()
        times = []
        for _ in range(self.runs):
            if cold:
                self.flush.zero_()
            times.append(self._once(run))
        return statistics.median(times)

    def _once(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - start)
        event: Any = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1000 * float(begin.elapsed_time(end))


def measure_rates(timer: Timer, size: int = 8192) -> Rates:
    """Copies of 16 bytes an element of a `size` x `size` matrix, and its square in bfloat16."""
    source = torch.empty(16 * size**2, dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    copy = timer.microseconds(lambda: target.copy_(source), cold=False)
    a, b = (torch.randn(size, size, dtype=DTYPE, device=timer.device) for _ in range(2))
    product = timer.microseconds(lambda: a @ b, cold=False)
    return Rates(2 * source.numel() / copy * 1e6, 2 * size**3 / product * 1e6)


def attention_cases(models: Sequence[Model]) -> list[Case]:
    """The grid, the most telling shapes first.

    First what `docs/kernels.md` promises something of, 16 and 64 requests with 4096 tokens, for
    every model; then a single request and a full batch; then the rest, outwards from there.
    """
    telling = [(16, 4096, 33), (64, 4096, 16), (1, 4096, 64), (256, 512, 8), (16, 16384, 33)]
    grid = [(r, c, n) for r in BATCHES for c in CONTEXTS for n in ROWS]
    rest = sorted(
        set(grid) - set(telling),
        key=lambda s: (sum(abs(a - b) for a, b in zip(places(s), places((16, 4096, 33)),
                                                       strict=True)), s),
    )  # fmt: skip
    return [Case(model, *shape) for shape in (*telling, *rest) for model in models]


def places(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Where a shape lies in the grid."""
    return BATCHES.index(shape[0]), CONTEXTS.index(shape[1]), ROWS.index(shape[2])


@dataclass
class Budget:
    """Time and memory that the run may take."""

    until: float  # time.monotonic()
    cache_bytes: int

    def is_spent(self) -> bool:
        return time.monotonic() >= self.until


def time_attention(
    timer: Timer, rates: Rates, cases: Sequence[Case], budget: Budget, fp8_cache: bool = False
) -> Iterator[Result]:
    """Tree attention by the fused kernel and by everything else, until the budget is spent.

    Raises AssertionError if a baseline and the kernel differ.
    """
    prepared: set[tuple[str, str]] = set()  # (slow baseline, model): once each
    for case in cases:
        if budget.is_spent():
            print(f"time is up: {case.model.name} {case.requests} x {case.context} and on left out")
            return
        if case.cache_bytes() > budget.cache_bytes:
            continue
        inputs = AttentionInputs(case, timer.device, DTYPE, BLOCK_SIZE, fp8_cache)
        run = by_implementation("extension")(inputs)
        expected = run().float().clone()
        others: dict[str, float] = {}
        unavailable: dict[str, str] = {}
        for name, prepare in BASELINES.items():
            if fp8_cache and name in GATHERED:
                continue
            if name in SLOW_TO_PREPARE:
                if (name, case.model.name) in prepared or budget.is_spent():
                    continue
                prepared.add((name, case.model.name))
            if name in GATHERED and 3 * case.cache_bytes() > budget.cache_bytes:
                continue
            try:
                other = prepare(inputs)
                difference = float((other().float() - expected).abs().max())
            except Exception as error:  # A compiler's or a driver's; one of many baselines.
                unavailable[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
                continue
            if name != "causal" and not difference < MOST_DIFFERENCE:
                print(f"{WRONG}: {case}: {name} and the kernel differ by {difference:.1e}")
                unavailable[name] = f"{WRONG}: it and the kernel differ by {difference:.1e}"
                continue
            others[name] = timer.microseconds(other)
        element = 1 if fp8_cache else 2
        floor = max(case.moved_bytes(element) / rates.bytes_per_second, case.flops() / rates.flops)
        yield Result(
            "tree_attention fp8" if fp8_cache else "tree_attention",
            case.model.name, case.requests, case.context, case.rows, timer.microseconds(run),
            1e6 * floor, others, unavailable,
        )  # fmt: skip


def time_forest(timer: Timer, rates: Rates, shapes: Sequence[tuple[int, int]]) -> Iterator[Result]:
    """`shapes`: (requests, rows)."""
    device = timer.device
    for requests, rows in shapes:
        parents, tokens, bounds = trees(requests, rows, device)
        sampled = torch.arange(rows, device=device).repeat(requests)  # down the first branch
        words = -(-rows // 64)
        written = requests * rows * (8 * words + 4)
        floor = 1e6 * written / rates.bytes_per_second
        build = partial(ops.build_super_tree, parents, bounds, words)
        accept = partial(ops.accept_path, sampled, tokens, parents, bounds, 16)
        for name, run in (("build_super_tree", build), ("accept_path", accept)):
            yield Result(name, "-", requests, 0, rows, timer.microseconds(run), floor)
        scores = -torch.rand(requests, 64, device=device)
        tiers = torch.zeros(requests, 64, dtype=torch.int32, device=device)
        roots = torch.full((requests, 64), -1, device=device)
        budget = requests * 8
        select = partial(ops.select_budget, scores, tiers, roots, budget, 32)
        floor = 1e6 * scores.numel() * 8 / rates.bytes_per_second
        others = {"topk": timer.microseconds(partial(scores.flatten().topk, budget))}
        time_of_select = timer.microseconds(select)
        yield Result("select_budget", "-", requests, 0, 64, time_of_select, floor, others)


def time_commit(
    timer: Timer, rates: Rates, models: Sequence[Model], batches: Sequence[int]
) -> Iterator[Result]:
    for model in models:
        shape = (2 * max(batches), BLOCK_SIZE, model.num_kv_heads, 2 * model.head_size)
        caches = [
            torch.zeros(shape, dtype=DTYPE, device=timer.device).transpose(1, 2)
            for _ in range(model.layers)
        ]
        for requests in batches:
            # Each request keeps four nodes out of its sixteen slots.
            first = torch.arange(requests, device=timer.device)[:, None] * 16
            src = (first + torch.tensor([1, 5, 9, 12], device=timer.device)).flatten()
            dst = (first + torch.arange(1, 5, device=timer.device)).flatten()
            commit = partial(ops.commit_kv, caches, src, dst, BLOCK_SIZE, "nhd")
            row = model.num_kv_heads * 2 * model.head_size * 2
            floor = 1e6 * 2 * len(src) * row * model.layers / rates.bytes_per_second
            yield Result("commit_kv", model.name, requests, 0, 4, timer.microseconds(commit), floor)


def claims(results: Sequence[Result], rates: Rates) -> list[dict[str, Any]]:
    """What the kernels are meant to reach, and what these results say of it.

    A claim: `what`, `target`, `worst` and `median` of its numbers, `count`, and `met` (by the
    worst). Claims of which nothing was measured are left out.
    """
    telling = [
        r for r in results if r.op == "tree_attention" and r.context >= 4096 and r.requests >= 16
    ]
    price = [r.microseconds / r.others["causal"] for r in telling if "causal" in r.others]
    # What the memory allows: shapes that the arithmetic bounds have another floor.
    share = [r.floor_microseconds / r.microseconds for r in telling]
    step = 1e6 * 2 * PARAMETERS_8B / rates.bytes_per_second
    of_step = []
    for requests in sorted({r.requests for r in results if r.op == "commit_kv"}):
        times = {
            r.op: r.microseconds
            for r in results
            if r.requests == requests and r.model in ("-", MODELS[0].name)
            and r.op in ("build_super_tree", "accept_path", "select_budget", "commit_kv")
        }  # fmt: skip
        if len(times) == 4:
            of_step.append(sum(times.values()) / step)
    wanted: list[tuple[str, float, list[float], bool]] = [
        ("tree_attention over causal FlashAttention, context >= 4096, requests >= 16", 1.15, price,
         True),
        ("floor over tree_attention, context >= 4096, requests >= 16", 0.70, share, False),
        ("select + build + accept + commit over the weights of 8B at copy speed", 0.03, of_step,
         True),
    ]  # fmt: skip
    found = []
    for what, target, numbers, low_is_good in wanted:
        if not numbers:
            continue
        worst = max(numbers) if low_is_good else min(numbers)
        found.append(
            {
                "what": what,
                "target": target,
                "worst": worst,
                "median": statistics.median(numbers),
                "count": len(numbers),
                "met": worst <= target if low_is_good else worst >= target,
            }
        )
    return found


def measurements(
    results: Sequence[Result], models: Sequence[Model]
) -> list[attention_table.Measurement]:
    """The times of our own implementations, for the table of `echo_vllm.ops.attention_table`."""
    by_name = {model.name: model for model in models}
    return [
        attention_table.Measurement(
            group=by_name[r.model].num_heads // by_name[r.model].num_kv_heads,
            head_size=by_name[r.model].head_size,
            requests=r.requests,
            rows=r.rows,
            context=r.context,
            microseconds={
                "extension": r.microseconds,
                **{name: r.others[name] for name in ("flash", "triton") if name in r.others},
            },
        )
        for r in results
        if r.op == "tree_attention"
    ]


@dataclass
class Report:
    """Prints results as they come, and writes all of them after each."""

    device: str
    rates: Rates
    models: Sequence[Model]
    out: Path | None = None
    table: Path | None = None
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        if not self.results:
            print(f"{'op':18} {'model':20} {'reqs':>4} {'ctx':>6} {'rows':>4} {'time':>9} "
                  f"{'floor':>9}  others")  # fmt: skip
        self.results.append(result)
        others = ", ".join(f"{name} {time:.1f}" for name, time in result.others.items())
        print(
            f"{result.op:18} {result.model:20} {result.requests:4} {result.context:6} "
            f"{result.rows:4} {result.microseconds:9.1f} {result.floor_microseconds:9.1f}  "
            f"{others}",
            flush=True,
        )
        self.write()

    def write(self) -> None:
        if self.out is not None:
            record = {
                "device": self.device,
                "torch": torch.__version__,
                "causal": causal_backend()[0],
                "rates": asdict(self.rates),
                "claims": claims(self.results, self.rates),
                "results": [asdict(result) for result in self.results],
            }
            atomic.write_json(self.out, record)
        found = measurements(self.results, self.models)
        if self.table is not None and found:
            attention_table.write_table(self.table, self.device, found)

    def conclude(self) -> None:
        for name, reason in {
            name: reason for r in self.results for name, reason in r.unavailable.items()
        }.items():
            print(f"left out somewhere: {name}: {reason}")
        for claim in claims(self.results, self.rates):
            print(
                f"{'met' if claim['met'] else 'MISSED'}: {claim['what']}: worst "
                f"{claim['worst']:.3f}, median {claim['median']:.3f} of {claim['count']}, target "
                f"{claim['target']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON with all results")
    parser.add_argument("--table", type=Path, help="JSON for ECHO_VLLM_ATTENTION_TABLE")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=110, help="start no shape after these")
    parser.add_argument("--quick", action="store_true", help="one shape a model")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no CUDA GPU")
    timer = Timer(torch.device("cuda"), options.runs)
    rates = measure_rates(timer)
    properties = torch.cuda.get_device_properties(timer.device)
    budget = Budget(until, properties.total_memory // 8)
    print(
        f"{properties.name}: copies {rates.bytes_per_second / 1e12:.2f} TB/s, "
        f"multiplies {rates.flops / 1e12:.0f} Tflop/s; times in microseconds; causal: "
        f"{causal_backend()[0]}"
    )
    report = Report(properties.name, rates, MODELS, options.out, options.table)
    cases = attention_cases(MODELS)
    first, rest = cases[: len(MODELS)], cases[len(MODELS) :]
    stages = [
        time_attention(timer, rates, first, budget),
        time_forest(timer, rates, [(64, 33), (1, 65), (512, 9)]),
        time_commit(timer, rates, MODELS, (64, 1, 512)),
    ]
    if not options.quick:
        stages += [
            time_attention(timer, rates, first, budget, fp8_cache=True),
            time_attention(timer, rates, rest, budget),
        ]
    for stage in stages:
        for result in stage:
            report.add(result)
    report.conclude()
    if any(why.startswith(WRONG) for r in report.results for why in r.unavailable.values()):
        raise SystemExit("benchmarks.gpu: a baseline and the kernel differ, see above")


if __name__ == "__main__":
    main()
