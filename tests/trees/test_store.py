# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees that wait for their verification come back as they were drafted, or a prefix of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.store import TreeStore
from tests.trees.test_forest import forests

FIELDS = ("token_ids", "parents", "depths", "path_logprobs", "cu_nodes")


@given(forests(), st.data())
def test_any_prefix_in_any_order_comes_back(forest: DraftForest, data: st.DataObject) -> None:
    count = forest.num_requests
    store = TreeStore(count + 2, 16)
    slots = np.array(data.draw(st.permutations(range(count + 2)))[:count], np.int64)
    store.put(slots, forest)
    sizes = [data.draw(st.integers(0, int(size))) for size in forest.cu_nodes.diff()]
    expected = forest.prefix(torch.tensor(sizes))
    taken = store.take(slots, np.array(sizes, np.int64))
    for field in FIELDS:
        assert torch.equal(getattr(taken, field), getattr(expected, field)), field
    chains = [parents == list(range(-1, len(parents) - 1)) for _, parents in expected.trees()]
    assert store.are_chains(slots, np.array(sizes, np.int64)).tolist() == chains
    order = np.array(data.draw(st.permutations(range(count))), np.int64)
    again = store.take(slots[order], np.array(sizes, np.int64)[order])
    assert again.trees() == [expected.trees()[i] for i in order]


def test_more_nodes_than_were_drafted_are_refused() -> None:
    store = TreeStore(2, 4)
    store.put(np.array([1]), DraftForest.from_parents([[5, 6]], [[-1, 0]]))
    with pytest.raises(ValueError, match="more nodes"):
        store.take(np.array([1]), np.array([3]))


def test_a_tree_may_be_replaced_by_nodes_of_its_own_and_new_ones() -> None:
    store = TreeStore(2, 6)
    drafted = DraftForest.from_parents([[5, 6, 7]], [[-1, 0, -1]], [[-1.0, -2.0, -3.0]])
    store.put(np.array([1]), drafted)
    store.replace(1, [0, -1, -1, 2], [5, 8, 9, 7], [-1, 0, 1, -1])
    found = store.take(np.array([1]), np.array([4]))
    assert found.trees() == [([5, 8, 9, 7], [-1, 0, 1, -1])]
    assert found.depths.tolist() == [1, 2, 3, 1]
    assert found.path_logprobs.tolist() == [-1.0, -1.0, -1.0, -3.0]
    assert store.are_chains(np.array([1, 1]), np.array([3, 4])).tolist() == [True, False]
