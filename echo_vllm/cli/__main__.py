# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`python -m echo_vllm.cli` is the `echo-vllm` command."""

from echo_vllm.cli import main

if __name__ == "__main__":
    main()
