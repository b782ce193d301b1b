# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Benchmarks; nothing of the product imports them.

`quick` is `make bench-quick`, `step_profile` shows where the time of a step goes, and
`cpu_tree_attention` times one kernel. `gpu` times the CUDA kernels against `attention_baselines`.
"""
