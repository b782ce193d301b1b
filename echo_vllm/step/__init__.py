# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One step of decoding, its files in the order of the step: `scheduler`, the runner (`v1/runner`),
`verification`, commit and drafter (`v1/drafter`), `stats`. With `startup` and `offline` the only
packages that import vLLM."""
