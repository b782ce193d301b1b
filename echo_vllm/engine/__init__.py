# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Everything that imports vLLM: the worker, the model runner, the drafter, the scheduler."""
