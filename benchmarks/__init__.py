# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Benchmarks; nothing of the product imports them.

`quick` is `make bench-quick`; `step_profile` shows where the time of a step goes, `context_cost`
what a longer context adds to it, `selection` what choosing nodes takes. `cpu_tree_attention` and
`linear` time kernels on a CPU, `gpu` those of CUDA against `attention_baselines`, `gpu_engine` a
tree step of the engine there. `drafter_study` compares ways to train a head.
"""
