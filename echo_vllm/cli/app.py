# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The command tree; a new sub-command is added here and implemented in its own module."""

from __future__ import annotations

from typing import Annotated

import typer

from echo_vllm import VLLM_VERSION, __version__
from echo_vllm.cli.bench import bench
from echo_vllm.cli.calibrate import calibrate
from echo_vllm.cli.doctor import doctor
from echo_vllm.cli.example import example
from echo_vllm.cli.patch import patch_app
from echo_vllm.cli.show import show
from echo_vllm.cli.trace import trace_app
from echo_vllm.cli.train_drafter import train_drafter_app
from echo_vllm.cli.watch import watch

app = typer.Typer(
    help=f"ECHO: tree speculation for vLLM {VLLM_VERSION}.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(patch_app, name="patch")
app.command()(doctor)
app.command()(example)
app.command()(show)
app.command()(watch)
app.command()(calibrate)
app.add_typer(trace_app, name="trace")
app.command()(bench)
app.add_typer(train_drafter_app, name="train-drafter")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"echo-vllm {__version__} for vLLM {VLLM_VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Carries the options of the command itself."""
