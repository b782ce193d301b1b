# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm patch`: puts the patch series into the installed vLLM, and takes it out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echo_vllm.cli.console import fail, refusing, say
from echo_vllm.patching import (
    Condition,
    PatchError,
    PatchState,
    find_installation,
    load_series,
)

patch_app = typer.Typer(
    help="Put the patch series into the installed vLLM, or take it out again.",
    no_args_is_help=True,
)
Root = Annotated[
    Path | None,
    typer.Option(
        help="A folder with an unpacked vLLM wheel, instead of the vLLM of this Python.",
        exists=True,
        file_okay=False,
        show_default=False,
    ),
]


def _open(root: Path | None) -> PatchState:
    return PatchState(find_installation(root), load_series())


@patch_app.command()
def apply(root: Root = None) -> None:
    """Apply the series: all of it or nothing. Does nothing where it is applied already."""
    with refusing(PatchError, status=1):
        state = _open(root)
        before, replaced = state.apply()
    if before is Condition.APPLIED:
        say(f"Nothing to do: the {_count(state)} are applied to {_where(state)}.")
        return
    if before is not Condition.PRISTINE:
        say(f"Found the series {before.value}; started again from the published files.")
    for patch in state.series.patches:
        say(f"applied  {patch.name}: {patch.title}")
    for path in replaced:
        say(f"replaced {path}")
    say(f"The {_count(state)} are applied to {_where(state)}.")


@patch_app.command()
def revert(root: Root = None) -> None:
    """Restore every file as vLLM published it, byte for byte."""
    with refusing(PatchError, status=1):
        state = _open(root)
        before, replaced = state.revert()
    if before is Condition.PRISTINE:
        say(f"Nothing to do: no patch is applied to {_where(state)}.")
        return
    for path in replaced:
        say(f"restored {path}")
    say(f"{_where(state)} is as published again.")


@patch_app.command()
def status(root: Root = None) -> None:
    """Show the patches and the condition of the files; changes nothing."""
    with refusing(PatchError, status=1):
        state = _open(root)
        report = state.inspect()
    for patch in state.series.patches:
        say(f"{patch.name}: {patch.title}")
    for path, what in report.problems.items():
        say(f"{path} {what}")
    say(f"{_where(state)}: {report.condition.value}")


@patch_app.command()
def verify(root: Root = None) -> None:
    """Check that every file is what the series makes of the published one; status 1 if not."""
    with refusing(PatchError, status=1):
        state = _open(root)
        problems = state.verify()
    for problem in problems:
        say(problem)
    if problems:
        fail(
            f"the patches in {state.installation.root} are not in order; run `echo-vllm patch "
            "apply`, which says what to do where it cannot repair them.",
            status=1,
        )
    say(f"All {_count(state)} are in order in {_where(state)}.")


def _where(state: PatchState) -> str:
    there = state.installation
    return f"{there.distribution} {there.version} in {there.root}"


def _count(state: PatchState) -> str:
    return f"{len(state.series.patches)} patches"
