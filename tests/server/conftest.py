# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One server with tree speculation for all tests of this folder, and clients to talk to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import openai
import pytest

from echo_vllm.machine import fast_dtype
from tests.conftest import Server, ServerFactory
from tests.engine.prompts import project_prompts
from tests.server.metrics import Metrics, wait_until_idle

# Eight nodes a request: verifying sixteen takes two slow cores twice as long.
CONFIG = Path(__file__).with_name("echo.json")
MAX_MODEL_LEN = 1024
MODEL = "demo"
# The log has a line of statistics every second. The server must not close an idle connection just
# when the client sends on it: the client gives it up after five seconds, the server's default.
ENV = {"VLLM_LOG_STATS_INTERVAL": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60"}


@pytest.fixture
def served(server: ServerFactory, demo_target: Path, demo_head: Path) -> Server:
    """The demo target, in bfloat16 where the CPU has it, with trees, as MODEL."""
    return server(
        demo_target,
        *("--speculative-config", str(CONFIG)),
        *("--served-model-name", MODEL),
        *("--dtype", fast_dtype()),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        # As many as the tests have in flight, so that `n` of 2 makes some wait.
        *("--max-num-seqs", "16"),
        "--enforce-eager",
        env=ENV,
    )


@pytest.fixture(scope="session")
def num_nodes() -> int:
    """`num_speculative_tokens` of the served configuration."""
    value: int = json.loads(CONFIG.read_text())["num_speculative_tokens"]
    return value


@pytest.fixture(scope="session")
def max_depth(num_nodes: int) -> int:
    """`max_depth` of the served configuration."""
    value: int = json.loads(CONFIG.read_text())["echo"].get("max_depth", min(6, num_nodes))
    return value


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return project_prompts()


@pytest.fixture
def client(served: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        yield client


AsyncClient = Callable[[], AbstractAsyncContextManager[openai.AsyncOpenAI]]


@pytest.fixture
def async_client(served: Server) -> AsyncClient:
    """Makes a client inside the event loop that uses it."""

    @asynccontextmanager
    async def connect() -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600
        ) as client:
            yield client

    return connect


@pytest.fixture
def settled(served: Server) -> Callable[[], Metrics]:
    """Waits until the server is idle and has published everything; returns its metrics then."""
    return lambda: wait_until_idle(served)
