# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Makes a drafter's profile out of a trace: gates, thresholds, survival curves, a report.

For `echo-vllm calibrate` alone; needs matplotlib.
"""
