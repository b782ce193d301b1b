# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Replays recorded or published traces with any policy and any step cost, without vLLM."""
