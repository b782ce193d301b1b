# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trains an EAGLE-3 head for a target: what `echo-vllm train-drafter` is made of.

`prompts` and `rows` hold the data stage's files, `features` reads the target's hidden states,
`trainer` is glue around the library speculators, `head` converts between its checkpoints and the
layout that vLLM loads, `acceptance` predicts offline what an engine will count, and `card` writes
what a head's folder says about it. Nothing here imports vLLM; the stages that need an engine are in
`echo_vllm.step`.
"""
