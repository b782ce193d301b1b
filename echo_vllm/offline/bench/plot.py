# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The picture of a sweep: speed over plain decoding against the load."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from echo_vllm import atomic
from echo_vllm.offline.bench.tables import AT_ONCE, Sample, speed_ratio


def plot_speed(
    samples: Sequence[Sample],
    configurations: Sequence[str],
    base: str,
    path: Path,
    caption: str,
    unit: str = AT_ONCE,
) -> None:
    """Write a PNG: a panel a temperature, a line a configuration with the ratios' intervals."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    temperatures = sorted({s.temperature for s in samples})
    figure = Figure(figsize=(7.5 * len(temperatures), 5), layout="constrained")
    panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    colours = colormaps["tab10" if len(configurations) <= 10 else "tab20"]
    for panel, temperature in zip(panels, temperatures, strict=True):
        here = [s for s in samples if s.temperature == temperature]
        loads = sorted({s.load for s in here})
        for index, name in enumerate(configurations):
            found = {load: speed_ratio(here, name, base, load) for load in loads}
            ratios = {load: ratio for load, ratio in found.items() if ratio is not None}
            panel.errorbar(
                list(ratios),
                [r.middle for r in ratios.values()],
                [
                    [r.middle - r.low for r in ratios.values()],
                    [r.high - r.middle for r in ratios.values()],
                ],
                label=name,
                color="black" if name == base else colours(index % colours.N),
                linestyle="--" if name == base else "-",
                marker="o",
                markersize=4,
                capsize=2,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(loads, [f"{load:g}" for load in loads])
        panel.set_xlabel(f"requests {unit}")
        panel.set_title(f"temperature {temperature:g}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"tokens per second over {base}")
    panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(textwrap.fill(caption, 90), fontsize="medium")
    with atomic.replacing(path) as [fresh]:
        figure.savefig(fresh, dpi=150, format=path.suffix.removeprefix("."))
