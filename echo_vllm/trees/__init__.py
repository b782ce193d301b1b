# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The forest of a batch, the pool of candidates it is chosen from, the walk that accepts a path.

Knows neither policies nor vLLM.
"""
