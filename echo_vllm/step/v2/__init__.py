# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Draft trees on vLLM's Model Runner V2: no list of tokens or parents ever comes to the host."""
