# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Engines of these tests live in the test's process, on one thread, so that they are
deterministic and do not fight with each other over cores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before torch starts its thread pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from tests.engine.tiny import Shape, make_head, make_target


@dataclass(frozen=True)
class TinyModel:
    """A tiny random target and a random head for it."""

    target: Path
    head: Path
    shape: Shape


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("tiny")
    shape = Shape()
    return TinyModel(
        make_target(folder / "target", shape), make_head(folder / "head", shape), shape
    )
