# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Measures configurations against each other: `echo-vllm bench` and `make bench-quick`.

    configurations              what is compared
    closed_loop                 what one run is and yields; the run in an engine of this process
    open_loop                   the run of requests that arrive at a rate, by `vllm bench serve`
    engine_process, server      the two kinds of worker, each a process that waits for such runs
    fleet                       which workers are alive
    sweep                       which run comes next: rounds, resuming, time left
    intervals, tables, plot     from runs to ratios with intervals, to Markdown and a picture
    results                     keeps the runs, writes JSON, Markdown and the picture

Only what runs inside a worker's process imports vLLM.
"""
