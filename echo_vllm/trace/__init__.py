# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Traces: what a policy could have known in each step, and what became of its choice.

`format` is the file, written by the engine and read by calibration; `replay` decides again,
offline, with any policy and any step cost. Nothing here knows vLLM.
"""

from echo_vllm.trace.format import (
    TraceError,
    TraceHeader,
    TraceRequest,
    TraceStep,
    TraceWriter,
    read_trace,
)

__all__ = [
    "TraceError",
    "TraceHeader",
    "TraceRequest",
    "TraceStep",
    "TraceWriter",
    "read_trace",
]
