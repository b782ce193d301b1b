# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The tests' tiny model, for the engines on Model Runner V2."""

from tests.engine.conftest import tiny

__all__ = ["tiny"]
