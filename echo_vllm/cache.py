# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The one folder in which the package keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ECHO_VLLM_CACHE`, or else `echo-vllm` in the user's XDG cache folder."""
    if own := os.environ.get("ECHO_VLLM_CACHE"):
        return Path(own)
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The standard says to ignore a relative one.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "echo-vllm"
