# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One engine in a process of its own, which waits for tasks.

All engines of a benchmark are loaded before the first measurement and take turns, so that a
machine that gets slower or faster meanwhile does so for each of them. A waiting engine sleeps in a
read from its socket and takes no CPU time. A process ends when its socket closes, so none outlives
the benchmark whatever ends that.

The engine core lives in the process of the engine (`offline.engine`): no configuration spends time
between processes, and the cores serve the model alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from echo_vllm.offline.bench.closed_loop import Job, Run, run_closed_loop
from echo_vllm.offline.bench.configurations import Configuration
from echo_vllm.offline.engine import LocalEngine

START_TIMEOUT_S = 300.0
TASK_TIMEOUT_S = 1800.0
KV_CACHE_BYTES = 1 << 30
MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class EngineOptions:
    """What all workers of a benchmark have in common; `model` is a folder or a model's name, `more`
    are options of `vllm.LLM`."""

    model: str
    dtype: str
    max_num_seqs: int
    threads: int
    compile: bool = False
    max_model_len: int = MAX_MODEL_LEN
    kv_cache_bytes: int = KV_CACHE_BYTES
    more: dict[str, Any] = field(default_factory=dict)


T_co = TypeVar("T_co", covariant=True)


class Task(Protocol[T_co]):
    """What an engine is sent: anything that can be pickled by a module's name and runs on it."""

    def run(self, local: LocalEngine) -> T_co: ...


@dataclass(frozen=True)
class ClosedLoop:
    """The task of a `Job`."""

    job: Job

    def run(self, local: LocalEngine) -> Run:
        return run_closed_loop(local, self.job)


class EngineError(RuntimeError):
    """An engine did not start or did not finish a task; the text says why, in one line."""


class EngineProcess:
    """The parent's end of an engine process."""

    def __init__(self, configuration: Configuration, options: EngineOptions, log: Path) -> None:
        """Start the process; `wait_ready` waits for its engine."""
        self.name = configuration.name
        self.log = log
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **engine_environment(options)},
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the parent, which then stops its children one by one.
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._connection.send((configuration, options))

    def wait_ready(self) -> None:
        """Wait until the engine is loaded.

        Raises:
            EngineError: it is not and will not be.
        """
        self._receive(START_TIMEOUT_S)

    def run(self, job: Job) -> Run:
        """Run a job to its end; see `do`."""
        return self.do(ClosedLoop(job))

    def do(self, task: Task[T_co]) -> T_co:
        """Have the engine do something.

        Raises:
            EngineError: it failed; the engine is not to be used again.
        """
        self._connection.send(task)
        result: T_co = self._receive(TASK_TIMEOUT_S)
        return result

    def hang_up(self) -> None:
        """Ask the process to end; does not wait for it."""
        self._connection.close()

    def stop(self) -> None:
        """End the process; politely if it is waiting, else without asking."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        # Its own session, so that helpers of a compiler go too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                raise EngineError(f"no answer in {timeout_s:.0f} s; see {self.log}")
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise EngineError(f"the process ended with {code}; see {self.log}") from None
        if isinstance(answer, EngineError):
            raise answer
        return answer


def common_environment(options: EngineOptions) -> dict[str, str]:
    """Environment variables of every worker, of either kind and for each configuration."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if Path(options.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def engine_environment(options: EngineOptions) -> dict[str, str]:
    """Environment variables of every engine process.

    OpenMP as vLLM sets it for its own worker processes, which the engines here do not use: Intel's
    runtime if vLLM's package brought it, threads bound to cores, asleep soon after the last loop.
    """
    environment = {
        **common_environment(options),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(options.threads),
    }
    intel_openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if intel_openmp.is_file():
        cores = sorted(os.sched_getaffinity(0))[: options.threads]
        environment |= {
            "LD_PRELOAD": " ".join(filter(None, [str(intel_openmp), os.environ.get("LD_PRELOAD")])),
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
            "KMP_BLOCKTIME": "5",
            "KMP_TPAUSE": "0",
        }
    return environment


def _one_line(error: BaseException) -> str:
    """The last line that says something: vLLM's validation errors put their reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def serve(connection: Connection) -> None:
    """The child: load an engine, then do tasks until the parent hangs up."""
    import traceback

    configuration, options = connection.recv()
    try:
        local = LocalEngine(
            options.model,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            enforce_eager=not options.compile,
            disable_log_stats=False,  # As in a server; the counters come from there.
            speculative_config=configuration.speculation,
            **options.more,
        )
        answer: Any = None
        while True:
            connection.send(answer)
            task = connection.recv()
            answer = task.run(local)
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        traceback.print_exc()
        connection.send(EngineError(_one_line(error)))


if __name__ == "__main__":
    # Under its real name, because what crosses the socket is pickled by module name.
    from echo_vllm.offline.bench import engine_process

    engine_process.serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # Nothing is left to save, and tearing an engine down takes seconds.
