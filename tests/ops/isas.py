# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Instruction sets of this machine that operators beside attention have a kernel for."""

from echo_vllm import ops

ISAS = [isa for isa in ops.supported_cpu_isas() if isa not in ("avx512_bf16", "amx")]
