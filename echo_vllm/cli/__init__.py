# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The `echo-vllm` command. Every sub-command is a module of this package.

Exit status: 0 if all is well, 1 if something is wrong (the last line says what to do), 2 for
arguments that make no sense.
"""

from echo_vllm.cli.app import app


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="echo-vllm")


__all__ = ["app", "main"]
