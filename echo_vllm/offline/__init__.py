# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What runs outside a server: calibration, traces, benchmarks, training data, and the one engine in
this process that they share."""
