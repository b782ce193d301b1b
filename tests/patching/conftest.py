# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A pretended vLLM for the tests that change files, and the published files of the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from echo_vllm.patching import PatchState, find_installation, load_series
from tests.patching.pretended import (
    FIRST_EDITS,
    PUBLISHED,
    SECOND_EDITS,
    Pretended,
    write_installation,
    write_series,
)


@pytest.fixture
def pretended(tmp_path: Path) -> Pretended:
    return Pretended(
        write_installation(tmp_path / "site", PUBLISHED),
        load_series(write_series(tmp_path / "first", FIRST_EDITS)),
        load_series(write_series(tmp_path / "second", SECOND_EDITS)),
    )


@pytest.fixture(scope="session")
def published_files() -> dict[str, bytes]:
    """The files of the real series as the installed vLLM's wheel holds them."""
    return PatchState(find_installation(), load_series()).published_files()
