# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How much of what an oracle gains do the policies gain? `benchmarks/results/replay-oracle.md`.

    python -m benchmarks.replay_oracle

replays the recorded chats of `benchmarks/traces`, greedy and at temperature 1, under the costs of
the study with the oracle (arXiv 2601.11580). It is arithmetic on recorded drafts: the result does
not depend on the machine, and a busy one only takes longer.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import echo_vllm
from echo_vllm.forecast import StepCost
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.offline.calibrate.fit import fit
from echo_vllm.offline.calibrate.samples import collect
from echo_vllm.offline.trace.comparison import Comparison, Figures, compare, lines, markdown
from echo_vllm.offline.trace.contenders import Contender
from echo_vllm.offline.trace.published import specdecode_bench
from echo_vllm.offline.trace.recorded import RecordedDrafter, fully_verified
from echo_vllm.trace_format import TraceRequest, read_trace

ROOT = Path(__file__).resolve().parent.parent
TRACES = {
    "Greedy": ROOT / "benchmarks" / "traces" / "chats-greedy.jsonl.gz",
    "Temperature 1": ROOT / "benchmarks" / "traces" / "chats-t1.jsonl.gz",
}
PROFILE = ROOT / "models" / "smollm2-135m-eagle3" / "echo_profile.json"
RESULT = ROOT / "benchmarks" / "results" / "replay-oracle.md"
LOADS = (1, 8, 32, 64, 128, 256)
GOAL_LOADS, GOAL = (32, 64, 128, 256), 0.5
AUTO = "auto:16"
PASSES, STEPS, TINY = 6, 256, 1e-12


def verdict(comparison: Comparison, name: str = AUTO) -> list[str]:
    """Per load, the share of the gap from the best table to the oracle that is closed."""
    return [str(comparison[load][name].closed or "-") for load in GOAL_LOADS]


def missed(comparison: Comparison) -> list[int]:
    """The loads at which `auto` closes less than half of that gap."""
    closed = {load: comparison[load][AUTO].closed for load in GOAL_LOADS}
    return [load for load, each in closed.items() if each is None or each.middle < GOAL]


def hindsight(path: Path) -> DrafterProfile:
    """A profile that no user can have: fitted to the very trace that is replayed."""
    header, steps = read_trace(path)
    samples = collect(steps, header.num_speculative_tokens)
    return fit(
        samples,
        target=header.model,
        drafter=header.drafter,
        dtype=header.dtype,
        prompts=path.name,
    ).profile


def by_scores(
    requests: Sequence[TraceRequest], survival: SurvivalModel, load: int, cost: StepCost
) -> float:
    """Tokens per second of who knows the scores of all candidates before drafting, no more.

    The nodes of every step are those with the most expected tokens at the price of the run's own
    speed; drafting has its fixed time, and its rows cost nothing. No policy that sees scores alone
    does better, as far as `survival` says what they mean.
    """
    most = max(request.num_candidates for request in requests)
    chances = np.zeros((len(requests), most))
    path = np.zeros((len(requests), max(len(request.level_starts) for request in requests)))
    for i, request in enumerate(requests):
        depths = torch.from_numpy(request.depths())
        own = survival.probability(torch.tensor(request.logprobs), depths).tolist()
        for node, parent in enumerate(request.parents):
            if parent >= 0:
                own[node] = min(own[node], own[parent])
        chances[i, : len(own)] = own
        path[i, : len(request.accepted)] = [own[node] for node in request.accepted]
    plain = cost.plain_step(load)
    speed = load / plain
    for _ in range(PASSES):
        rng = np.random.default_rng([1, load])
        tokens = seconds = 0.0
        for _ in range(STEPS):
            drawn = rng.choice(len(requests), load, replace=load > len(requests))
            best = np.sort(chances[drawn], axis=None)[::-1]
            times = cost.step(load + np.arange(1, len(best) + 1), [], 1)
            values = np.cumsum(best) - speed * (times - plain)
            last = int(values.argmax())
            if values[last] > 0:
                tokens += load + int((path[drawn] >= max(best[last], TINY)).sum())
                seconds += float(times[last])
            else:
                tokens += load
                seconds += plain
        speed = tokens / seconds
    return speed


def bound(
    comparison: Comparison, requests: Sequence[TraceRequest], fitted: DrafterProfile
) -> list[str]:
    """The share of the gap that scores alone could close."""
    context = float(np.mean([request.context for request in requests]))
    said = []
    for load in GOAL_LOADS:
        cost = specdecode_bench().with_context(load * context)
        table, oracle = (
            comparison[load][name].result.tokens_per_second for name in ("best table", "oracle")
        )
        speed = by_scores(requests, fitted.survival(), load, cost)
        said.append(f"{(speed - table) / (oracle - table):.2f}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay the recorded chats against the oracle.")
    parser.add_argument("--output", type=Path, default=RESULT, help="Markdown; JSON goes beside it")
    parser.add_argument("--request-steps", type=int, default=2048, help="drawn for each figure")
    arguments = parser.parse_args()

    profile = DrafterProfile.load(PROFILE)
    published = specdecode_bench()
    parts, figures = [], {}

    def on_load(load: int, at_load: Mapping[str, Figures]) -> None:
        speeds = (f"{name} {each.over_plain.middle:.3f}" for name, each in at_load.items())
        print(f"{load} requests: {', '.join(speeds)}", flush=True)

    for title, path in TRACES.items():
        if not path.is_file():
            print(f"{title}: {path.name} is not recorded", flush=True)
            parts += [f"## {title}", "", "Not recorded yet; the command is above.", ""]
            continue
        header, steps = read_trace(path)
        requests = fully_verified(steps)
        drafter = RecordedDrafter(requests)
        print(title, flush=True)
        comparison = compare(
            drafter,
            None,
            LOADS,
            published.with_context,
            profile=profile,
            request_steps=arguments.request_steps,
            on_load=on_load,
        )
        fitted = hindsight(path)
        shape = {"policy": "auto", "max_depth": drafter.max_depth, "width": 4}
        others = {
            "with a profile fitted to this very trace, which no user can have": Contender.of(
                "fitted", {**shape, "top_k": 4}, 16, fitted
            ),
            **{
                f"with `top_k` {k}: the drafter expands so many nodes of a request": Contender.of(
                    f"top_k {k}", {**shape, "top_k": k}, 16, profile
                )
                for k in (2, 1)
            },
        }
        tried = compare(
            drafter,
            list(others.values()),
            GOAL_LOADS,
            published.with_context,
            request_steps=arguments.request_steps,
        )
        loads = missed(comparison)
        why = [
            ["`auto`", *verdict(comparison)],
            *(
                [f"`auto` {what}", *verdict(tried, contender.name)]
                for what, contender in others.items()
            ),
            [
                "the best selection by scores alone, fitted to this very trace; drafting has its "
                "fixed time and its rows are free",
                *bound(comparison, requests, fitted),
            ],
        ]
        parts += [
            f"## {title}",
            "",
            f"{drafter.num_samples} request-steps of {drafter.answers.max() + 1} answers of "
            f"{header.model} with {header.drafter}, contexts of {drafter.contexts.min()} to "
            f"{drafter.contexts.max()} tokens; {drafter.in_tree.mean():.2f} nodes of a tree of "
            f"{drafter.num_candidates} accepted, {drafter.in_chain.mean():.2f} of a chain of "
            f"{drafter.max_depth}.",
            "",
            f"Goal: `auto` closes at least half of the gap from the best table to the oracle at 32 "
            f"to 256 requests. {'Missed at ' + ', '.join(map(str, loads)) if loads else 'Met'}. "
            "What it closes, and what it would close otherwise:",
            "",
            *lines(["", *(f"{load} requests" for load in GOAL_LOADS)], why),
            "",
            markdown(comparison),
        ]
        figures[title] = {
            load: {name: each.to_dict() for name, each in at_load.items()}
            for load, at_load in comparison.items()
        }
    said = [*(f"published: {s}" for s in published.sources)]
    said += [f"assumed: {s}" for s in published.assumptions]
    intro = INTRO.format(
        date=datetime.date.today().isoformat(),
        version=echo_vllm.__version__,
        said="\n".join(f"- {sentence}" for sentence in said),
        steps=arguments.request_steps,
    )
    arguments.output.write_text("\n".join([intro, *parts]).rstrip() + "\n", encoding="utf-8")
    content = {"loads": LOADS, "request_steps": arguments.request_steps, "results": figures}
    arguments.output.with_suffix(".json").write_text(
        json.dumps(content, indent=1) + "\n", encoding="utf-8"
    )


INTRO = """# How much of the oracle's gain, by replay, {date}

Not a measurement of speed: recorded drafts of the demo's head decided again under the published
cost model of the study with the oracle (echo-vllm {version}), by

```bash
echo-vllm trace record models/smollm2-135m-instruct --drafter models/smollm2-135m-eagle3 \\
    --prompts benchmarks/traces/chats.jsonl --min-context 256 --tokens 64 --concurrency 10 \\
    --max-model-len 1024 -o benchmarks/traces/chats-greedy.jsonl.gz
echo-vllm trace record ... --temperature 1 -o benchmarks/traces/chats-t1.jsonl.gz
python -m benchmarks.replay_oracle --request-steps {steps}
```

The chats are of no other file: nothing was calibrated or trained on them. What a replay assumes,
and what `oracle`, `oracle tree` and `best table` are, is in [docs/traces.md](../../docs/traces.md).
In short: the oracle knows what is accepted and takes for each request the chain length, none as
well, with which the whole run makes the most tokens a second; `oracle tree` verifies exactly the
accepted path of the recorded tree; the best table is the fastest fixed chain at each load in
hindsight, plain decoding among them. Trees may have more than the whole of the oracle's gain, which
is a chain's. Intervals (95 %) are a bootstrap over request-steps by whole answers.

The drafts are those of a small head, so the share that a policy reaches here is not that of a head
for LLaMA-3.1-8B on the same machine.

{said}
"""

if __name__ == "__main__":
    main()
