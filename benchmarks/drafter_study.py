# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a head's settings are worth: trainings of equal length that differ in one setting each.

    echo-vllm train-drafter data models/smollm2-135m-instruct -o study/head --prompts FILE
    python -m benchmarks.drafter_study --rows study/head.work/rows.jsonl --work study \
        --init HEAD --output benchmarks/results/drafter-study

All see the same rows in the same order. The figure is the acceptance length of a greedy chain,
predicted on held-out greedy answers by walking over them as the engine does
(`benchmarks.predicted_acceptance`), with its difference to the base on the same answers.
OUTPUT.jsonl keeps each variant as soon as it is done; the next run goes on. Needs
`make train-setup`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from benchmarks.command_line import names
from echo_vllm import atomic
from echo_vllm.offline.bench.configurations import DEMO_TARGET
from echo_vllm.offline.bench.intervals import bootstrapped
from echo_vllm.offline.bench.tables import markdown

if TYPE_CHECKING:
    from benchmarks.predicted_acceptance import Acceptance
    from echo_vllm.training.rows import Row
    from echo_vllm.training.trainer import TrainSettings

CHAIN = 5
CONTINUED = "continued"
ANEW = "new weights"
BASES = (CONTINUED, ANEW)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    CONTINUED: (CONTINUED, {}),
    "loss ce": (CONTINUED, {"loss": "ce"}),
    "loss tv": (CONTINUED, {"loss": "tv"}),
    "loss lk_hybrid": (CONTINUED, {"loss": "lk_hybrid"}),
    "training-time test of 1": (CONTINUED, {"ttt_steps": 1}),
    "training-time test of 5": (CONTINUED, {"ttt_steps": 5}),
    "output layer frozen": (CONTINUED, {"lm_head": "frozen"}),
    ANEW: (ANEW, {}),
    "layers 2 15 29": (ANEW, {"aux_layers": [2, 15, 29]}),
    "layers 15 22 29": (ANEW, {"aux_layers": [15, 22, 29]}),
    "draft vocabulary 32000": (ANEW, {"draft_vocab": 32_000}),
    "feed-forward twice as wide": (ANEW, {"intermediate_size": 3_072}),
}
"""Name -> what it is compared with, and what differs from `base_settings`. Those that change a
tensor's shape or meaning cannot continue a head."""


def base_settings(batch_tokens: int, learning_rate: float, init: Path | None) -> TrainSettings:
    """The study's settings, from the weights of `init` or from new ones."""
    from echo_vllm.training.head_files import draft_vocab_of, read_config
    from echo_vllm.training.trainer import TrainSettings

    return TrainSettings(
        target=str(DEMO_TARGET),
        dtype="float32",
        aux_layers=[2, 15, 27],
        draft_vocab=8_192 if init is None else draft_vocab_of(read_config(init)),
        ttt_steps=3,
        step_decay=0.8,
        loss="kl_div",
        lm_head="trained",
        intermediate_size=None,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        held_out=0.03,
        seed=0,
        init=None if init is None else str(init.absolute()),
    )


def held_out_acceptance(
    settings: TrainSettings, rows: list[Row], head_folder: Path
) -> list[Acceptance]:
    """The chain's acceptance on each held-out greedy answer."""
    import torch

    from benchmarks.predicted_acceptance import predicted_acceptance
    from echo_vllm.training.features import Target
    from echo_vllm.training.trainer import make_model, split

    _, held_out = split(rows, settings.held_out)
    greedy = [row for row in held_out if row.temperature == 0]
    target = Target(settings.target, settings.aux_layers, torch.float32, "cpu")
    model = make_model(dataclasses.replace(settings, init=str(head_folder)), None)
    found = []
    for row in greedy:
        ids = row.input_ids[: settings.batch_tokens]
        states = target.hidden_states(torch.tensor(ids))[:, :-1]
        row = dataclasses.replace(row, input_ids=ids, loss_mask=row.loss_mask[: len(ids)])
        found.append(predicted_acceptance(model, states, row, CHAIN, len(ids)))
    return found


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one variant, and what came of it."""
    from echo_vllm.training.rows import read_rows
    from echo_vllm.training.trainer import Limits, Progress, train

    base, changes = VARIANTS[name]
    settings = base_settings(
        args.batch_tokens, args.learning_rate, args.init if base == CONTINUED else None
    )
    settings = dataclasses.replace(settings, **changes)
    place = args.work / name.replace(" ", "-")
    # Hidden states are the same for all variants that read the same layers.
    states = args.work / ("states-" + "-".join(str(layer) for layer in settings.aux_layers))

    def show(progress: Progress) -> None:
        if progress.step % 10 == 0:
            print(f"{name}: update {progress.step} of {args.updates}", flush=True)

    rows = read_rows(args.rows)
    begin = time.process_time()  # Of this process, so that others may run beside it.
    trained = train(
        settings,
        Limits(hours=None, epochs=100, max_steps=args.updates, checkpoint_minutes=1e9),
        rows,
        (states, place / "checkpoints"),
        place / "head",
        show,
    )
    cpu_seconds = time.process_time() - begin
    accepted = held_out_acceptance(settings, rows, place / "head")
    return {
        "variant": name,
        "settings": dataclasses.asdict(settings)
        | {"target": DEMO_TARGET.name, "init": settings.init and Path(settings.init).name},
        "updates": trained.progress.step,
        "tokens": trained.progress.tokens,
        "computed_tokens": trained.computed_tokens,
        "cpu_seconds": round(cpu_seconds, 1),
        "drafts": [a.drafts for a in accepted],
        "accepted": [a.accepted for a in accepted],
    }


def counts(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """[num_answers] accepted tokens, and drafts."""
    return np.array(row["accepted"]).sum(1), np.array(row["drafts"])


def gained(
    accepted: np.ndarray,
    drafts: np.ndarray,
    others: np.ndarray,
    other_drafts: np.ndarray,
    axis: int,
) -> np.ndarray:
    """How much longer a step is than another's, over answers."""
    ours = accepted.sum(axis) / drafts.sum(axis)
    difference: np.ndarray = ours - others.sum(axis) / other_drafts.sum(axis)
    return difference


@dataclasses.dataclass(frozen=True)
class Line:
    """One variant beside its base: `difference` with `low` and `high`, its 95 % interval."""

    name: str
    base: str
    length: float
    difference: float
    low: float
    high: float
    accepted: list[float]
    time: float | None  # None where the target's hidden states were computed in it


def compare(rows: dict[str, dict[str, Any]]) -> list[Line]:
    """What has run so far, in the order of VARIANTS; intervals by resampling answers."""
    lines = []
    for name, (base, _) in VARIANTS.items():
        if name not in rows or base not in rows:
            continue
        row, other = rows[name], rows[base]
        difference = bootstrapped([*counts(row), *counts(other)], gained, paired=True)
        accepted, drafts = counts(row)
        lines.append(
            Line(
                name,
                base,
                1 + float(accepted.sum() / drafts.sum()),
                difference.middle,
                difference.low,
                difference.high,
                list(np.array(row["accepted"]).sum(0) / sum(row["drafts"])),
                None
                if row["computed_tokens"] or other["computed_tokens"]
                else row["cpu_seconds"] / other["cpu_seconds"],
            )
        )
    return lines


def table(lines: list[Line]) -> str:
    rows = [
        [
            line.name,
            f"{line.length:.3f}",
            "-"
            if line.name == line.base
            else f"{line.difference:+.3f} ({line.low:+.3f} to {line.high:+.3f}) of {line.base}",
            ", ".join(f"{100 * share:.0f}" for share in line.accepted),
            "-" if line.time is None else f"{line.time:.2f}",
        ]
        for line in lines
    ]
    head = ["variant", "acceptance length", "difference (95 %)", "accepted at 1-5, %", "CPU time"]
    return markdown(head, rows)


def plot(lines: list[Line], path: Path) -> None:
    """Differences to the base, one panel a base."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.35 * len(lines) + 1.6), layout="constrained")
    shown = {base: [x for x in lines if x.base == base and x.name != base] for base in BASES}
    shown = {base: variants for base, variants in shown.items() if variants}
    panels = figure.subplots(
        len(shown),
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[len(variants) for variants in shown.values()],
    )[:, 0]
    for panel, (base, variants) in zip(panels, shown.items(), strict=True):
        of_base = next(line.length for line in lines if line.name == base)
        reach = [
            [max(0.0, x.difference - x.low) for x in variants],
            [max(0.0, x.high - x.difference) for x in variants],
        ]
        places = range(len(variants))
        panel.errorbar([x.difference for x in variants], places, xerr=reach, fmt="o", capsize=3)
        panel.axvline(0, color="black", linewidth=1)
        panel.set_yticks(places, [x.name for x in variants])
        panel.set_ylim(len(variants) - 0.5, -0.5)
        panel.set_title(f"against '{base}': {of_base:.3f}", fontsize="medium")
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel(f"difference in acceptance length, greedy chain of {CHAIN}")
    with atomic.replacing(path) as [fresh]:
        figure.savefig(fresh, dpi=150, format=path.suffix.removeprefix("."))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, required=True, help="of train-drafter data")
    parser.add_argument("--work", type=Path, required=True, help="hidden states and heads")
    parser.add_argument("--output", type=Path, required=True, help="without a suffix")
    parser.add_argument("--init", type=Path, required=True, help="head that is continued")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--only", type=names, default=list(VARIANTS), metavar="NAME,NAME")
    args = parser.parse_args()
    kept = args.output.with_suffix(".jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)

    def done() -> dict[str, dict[str, Any]]:
        lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
        return {row["variant"]: row for row in map(json.loads, lines)}

    for name in args.only:
        if name not in done():
            row = run(name, args)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    lines = compare(done())
    if lines:
        print(table(lines))
        atomic.write_text(args.output.with_suffix(".md"), table(lines) + "\n")
        plot(lines, args.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
