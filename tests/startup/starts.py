# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Starts the `vllm` command again and again, from one process that has imported it.

Importing vLLM is nearly all that a refused start takes. `python -m tests.startup.starts` imports it
once; each command then runs in a process forked from that one, with its own session, arguments,
environment and output, as a shell would have started it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE_STARTS = "Initializing a V1 LLM engine"
"""In the log of a start that nothing refused."""


@dataclass(frozen=True)
class Ended:
    """How a command ended; `status` is None where it had to be killed."""

    status: int | None
    output: str

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else ""


class Starts:
    """The process that has imported vLLM. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the working directory of all commands."""
        self.folder = folder

    def __enter__(self) -> Starts:
        # As for a user, whatever the tests have set for engines of their own.
        usual = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | usual | {"PYTHONPATH": root},
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> Ended:
        """Run `vllm *arguments` to its end, or until it begins to start an engine."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = self.folder / "output.txt"
        order = {
            "arguments": arguments,
            "env": dict(env or {}),
            "output": str(output),
            "timeout_s": timeout_s,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        return Ended(status, output.read_text(errors="replace"))


def _run_vllm(order: dict[str, Any]) -> None:
    """In the forked process: become the command. Does not return."""
    from vllm.entrypoints.cli.main import main

    status: Any = 70
    try:
        os.setsid()
        output = os.open(order["output"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, output), (2, output)):
            os.dup2(source, target)
        os.environ.update(order["env"])
        sys.argv = ["vllm", *order["arguments"]]
        main()
        status = 0
    except SystemExit as ending:
        # As the interpreter does: a text is printed, and the status is 1.
        status = ending.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, order: dict[str, Any]) -> int | None:
    """Status of the forked process, or None once it had to be killed."""
    deadline = time.monotonic() + order["timeout_s"]
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if ENGINE_STARTS in Path(order["output"]).read_text(errors="replace"):
            break
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    """Take orders from stdin, one JSON object a line; write a status a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What imports print is no answer.
    import vllm.entrypoints.cli.serve
    import vllm.entrypoints.openai.api_server  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        Path(order["output"]).write_text("")
        pid = os.fork()
        if pid == 0:
            _run_vllm(order)
        answers.write(json.dumps(_wait(pid, order)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
