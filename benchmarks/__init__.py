# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Benchmarks; nothing of the product imports them.

`quick` is `make bench-quick`; `step_profile` shows where the time of a step goes (by `timers`),
`turns` compares whole engines in turns of a fraction of a second, `rest_cost` what a step takes
that drafts nothing, `context_cost` what a longer context adds to it (all three by `steps`),
`selection` what choosing nodes takes, `grammar_speed` what trees bring under a grammar.
`cpu_tree_attention` and `linear` time kernels on a CPU, `gpu` those of CUDA against
`attention_baselines`, `gpu_engine` a tree step of the engine there. `drafter_study` compares ways
to train a head (by `predicted_acceptance`). `command_line` is what they share.
"""
