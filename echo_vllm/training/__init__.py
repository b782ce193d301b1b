# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trains an EAGLE-3 head for a target: what `echo-vllm train-drafter` is made of.

`data` has the target answer prompts, its own (`self_prompts`) among them, and `rows` keeps the
answers; `features` reads the target's hidden states, `trainer` is glue around the library
speculators, `head_files` converts between its checkpoints and the layout that vLLM loads, and
`card` writes what a head's folder says about it. Nothing here imports vLLM; the engine of the
stages that need one is `offline.engine`.
"""
