# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The operators in Triton, for GPUs without a compiler: the same arguments and results.

Chosen by `echo_vllm.ops.dispatch`; importing this package imports triton. Nothing here waits for
the device, so what only the device knows is not checked: the values of parents, bounds, lengths
and slots. On CPU tensors the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is
how the tests run them. There is no `select_budget`. `paths` is no operator of the table: it has
Triton kernels alone.
"""

from echo_vllm.ops.triton_kernels.attention import suffix_attention, tree_attention
from echo_vllm.ops.triton_kernels.commit import commit_kv
from echo_vllm.ops.triton_kernels.forest import accept_path, build_super_tree
from echo_vllm.ops.triton_kernels.sampling import sample_path

__all__ = [
    "accept_path",
    "build_super_tree",
    "commit_kv",
    "sample_path",
    "suffix_attention",
    "tree_attention",
]
