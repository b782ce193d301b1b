# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the tests share: tiers, the demo models, free ports and servers.

Tiers: a test without a marker is in the fast tier (`make test-fast`, under three minutes in all);
`full` marks the long tier and `gpu` what needs a CUDA GPU. `make test` runs everything.

A test that makes an engine in its own process gets the environment below; one that needs a server
uses the `server` fixture, whose processes are stopped at the end even when a test fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# A shared machine can take any time over an example. The examples of a commit are always the same,
# so that its tests pass always or never; `pytest --hypothesis-profile=explore` looks at new ones.
hypothesis.settings.register_profile(
    "explore",
    deadline=None,
    max_examples=2000,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "same-every-time",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("same-every-time")

ROOT = Path(__file__).resolve().parent.parent
DEMO_TARGET = ROOT / "models" / "smollm2-135m-instruct"
DEMO_HEAD = ROOT / "models" / "smollm2-135m-eagle3"

# Before anything imports vLLM or torch. setdefault, so that a developer can override each.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Measured costs stay in the checkout.
    "ECHO_VLLM_CACHE": str(ROOT / ".build" / "cache"),
}
IN_PROCESS_ENGINE = {
    # The engine core lives in the test's process, where a test can look at it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    # One thread an engine, wherever the system puts it: test files run side by side, and two
    # engines that spin on the same cores make each other many times slower.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ONE_THREAD = {name: IN_PROCESS_ENGINE[name] for name in list(IN_PROCESS_ENGINE)[-2:]}
for name, value in {**OFFLINE, **IN_PROCESS_ENGINE}.items():
    os.environ.setdefault(name, value)


# The files that take longest, in that order. They come first: `make test` hands out whole files to
# two workers, and a long one at the end would leave one of them without work.
LONGEST = (
    "engine/test_exactness.py",
    "server/test_http.py",
    "engine/test_distribution.py",
    "training/test_train_drafter.py",
    "cuda/test_cuda_check.py",
    "engine/test_architectures.py",
    "engine/test_elastic_engine.py",
    "engine/test_drawn.py",
    "engine/test_grammar.py",
    "engine/test_demo_exactness.py",
    "offline/bench/test_results.py",
    "v2/test_v2.py",
    "packaging/test_distributions.py",
    "engine/test_rest.py",
    "engine/test_requests.py",
    "server/test_data_parallel.py",
    "server/test_ray.py",
    "startup/test_heads_table.py",
    "triton/test_triton.py",
    "cuda/test_emulated_kernels.py",
    "engine/test_tensor_parallel.py",
    "startup/test_examples.py",
    "startup/test_serve.py",
)


def _turn(item: pytest.Item) -> int:
    file = item.nodeid.partition("::")[0].removeprefix("tests/")
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; skip tests of the `gpu` marker, with the reason, where torch sees no CUDA
    GPU."""
    items.sort(key=_turn)  # Stable: all else stays as it was.
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none on this machine")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def demo_target() -> Path:
    """Folder of the demo target, SmolLM2-135M-Instruct, which `make setup` makes."""
    if not (DEMO_TARGET / "config.json").is_file():
        pytest.fail(f"{DEMO_TARGET} is missing: run `make setup` first", pytrace=False)
    return DEMO_TARGET


@pytest.fixture(scope="session")
def demo_head() -> Path:
    """Folder of the demo drafter, which the repository holds."""
    if not (DEMO_HEAD / "model.safetensors").is_file():
        pytest.fail(f"{DEMO_HEAD} is incomplete: check the repository out again", pytrace=False)
    return DEMO_HEAD


def find_free_port() -> int:
    """A TCP port that was free on the loopback interface a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def free_port() -> int:
    return find_free_port()


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`. `url` is its root, without a slash or `/v1` at the end."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, timeout: float = 10) -> str:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            body: bytes = response.read()
            return body.decode()

    def is_healthy(self) -> bool:
        try:
            self.get("/health", timeout=2)
        except (urllib.error.URLError, OSError):
            return False
        return True

    def stop(self, grace_s: float = 20) -> None:
        """End the server and all its processes: politely at first, then without asking."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        # The group outlives its leader when a worker hangs, so it is always signalled.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start_server(
    model: Path,
    arguments: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    timeout_s: float,
) -> Server:
    """Start `vllm serve model *arguments` in its own process group and wait for /health."""
    port = find_free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    inherited = {k: v for k, v in os.environ.items() if k not in IN_PROCESS_ENGINE}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, "VLLM_CPU_KVCACHE_SPACE": "1", **ONE_THREAD, **OFFLINE, **env},
            cwd=ROOT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if server.is_healthy():
            return server
        time.sleep(0.5)
    exit_code = process.poll()
    server.stop()
    what = f"exited with {exit_code}" if exit_code is not None else f"not up in {timeout_s:.0f} s"
    pytest.fail(f"{' '.join(command)}\n{what}; its log:\n{_tail(log)}", pytrace=False)


def _tail(log: Path, lines: int = 80) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


ServerFactory = Callable[..., Server]
LAST_LOG = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerFactory]:
    """`server(model, *arguments, env={...}, timeout_s=180)` gives a running Server.

    The same arguments give the same server again, so that tests can share it; another one stops
    the previous one first, because two servers on a small machine starve each other.
    """
    running: dict[tuple[object, ...], Server] = {}

    def stop_all() -> None:
        while running:
            running.popitem()[1].stop()

    def factory(
        model: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 180,
    ) -> Server:
        env = env or {}
        key = (model, arguments, tuple(sorted(env.items())))
        known = running.get(key)
        if known is not None and known.process.poll() is None:
            return known
        stop_all()
        log = tmp_path_factory.mktemp("server") / "server.log"
        request.config.stash[LAST_LOG] = log
        running[key] = start_server(model, arguments, env, log, timeout_s)
        return running[key]

    yield factory
    stop_all()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the server's log to the report of a failed test that uses one."""
    report = yield
    log = item.config.stash.get(LAST_LOG, None)
    if report.failed and log and "server" in getattr(item, "fixturenames", ()):
        report.sections.append((f"the server's log ({log})", _tail(log)))
    return report
