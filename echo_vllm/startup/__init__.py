# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What happens before the first step: the plug-in, what is read, checked, refused and measured."""
