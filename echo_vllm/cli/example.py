# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm example`: a configuration to begin with, from those that travel with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from echo_vllm.cli.console import fail

EXAMPLES = Path(__file__).resolve().parents[1] / "_examples"
"""In a checkout a link to `examples/`."""


def example(
    name: Annotated[str, typer.Argument(help="One of the list.", show_default="the list")] = "",
    head: Annotated[
        str | None, typer.Option(help="EAGLE-3 head: a folder or a Hub id.", show_default="demo's")
    ] = None,
) -> None:
    """Print a file for `vllm serve --speculative-config`; without NAME, list what there is."""
    files = {path.stem: path for path in sorted(EXAMPLES.glob("*.json"))}
    configs = {stem: json.loads(path.read_text("utf-8")) for stem, path in files.items()}
    if not name:
        for stem, config in configs.items():
            nodes, policy = config["num_speculative_tokens"], config["echo"]["policy"]
            typer.echo(f"{stem:10} policy {policy}, up to {nodes} nodes a request")
        return
    if name not in configs:
        fail(f"NAME must be one of {', '.join(configs)}, got {name!r}; choose one of them")
    config = configs[name]
    typer.echo(json.dumps(config if head is None else {**config, "model": head}, indent=2))
