# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Measures configurations against each other: `echo-vllm bench` and `make bench-quick`.

    configurations, prompts     what is compared, on what
    closed_loop                 what one run is and yields; the run in an engine of this process
    engine_process, server      the two kinds of worker, each a process that waits for such runs
    fleet                       which workers are alive
    sweep                       which run comes next: rounds, resuming, time left
    results, report, plot       from runs to JSON, Markdown and a picture

Only what runs inside a worker's process imports vLLM.
"""
