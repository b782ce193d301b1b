# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The `echo` section: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from echo_vllm.config import MAX_DEPTH, MAX_TOP_K, EchoConfig, EchoConfigError
from echo_vllm.policies.registry import (
    field_names,
    parse_section,
    policy_names,
    section_models,
    section_type,
)

TREE = [[0], [1], [0, 0]]


def parse(section: object, num_nodes: int = 16) -> EchoConfig:
    return parse_section(section, num_speculative_tokens=num_nodes)


@pytest.mark.parametrize(
    ("section", "num_nodes", "expected"),
    [
        ({}, 16, ("auto", 6, 4, None)),
        ({}, 3, ("auto", 3, 4, None)),
        ({"policy": "topn"}, 16, ("topn", 6, 4, None)),
        ({"policy": "topn"}, 3, ("topn", 3, 4, None)),
        ({"policy": "topn"}, 84, ("topn", 6, 4, None)),
        ({"policy": "topn", "max_depth": 1, "top_k": 16}, 16, ("topn", 1, 16, None)),
        ({"policy": "topn", "max-depth": 2, "top-k": 3}, 4, ("topn", 2, 3, None)),
        ({"policy": "topn", "max_depth": 2}, 20, ("topn", 2, 4, None)),
        ({"policy": "chain"}, 1, ("chain", 1, 1, None)),
        ({"policy": "chain"}, 32, ("chain", 32, 1, None)),
        ({"policy": "chain", "max_depth": 5, "top_k": 1}, 5, ("chain", 5, 1, None)),
        ({"policy": "static", "tree": TREE}, 3, ("static", 2, 2, ((0,), (1,), (0, 0)))),
        (
            {"policy": "static", "tree": [[3, 0], [3]], "max_depth": 2, "top_k": 4},
            256,
            ("static", 2, 4, ((3,), (3, 0))),
        ),
    ],
)
def test_accepted_sections_get_every_default_filled_in(
    section: dict[str, Any], num_nodes: int, expected: tuple[Any, ...]
) -> None:
    config = parse(section, num_nodes)
    tree = getattr(config, "tree", None)
    assert (config.policy, config.max_depth, config.top_k, tree) == expected


FIELD = "speculative_config.echo"
NODES = "speculative_config.num_speculative_tokens"
POLICIES = "chain, static, topn, echo, auto, evict, graft"
FIELDS = f"the fields are {', '.join(field_names())}."
SHAPE = "give the nodes as paths of child ranks, such as [[0], [1], [0, 0]]."


@pytest.mark.parametrize(
    ("section", "num_nodes", "sentence"),
    [
        (
            [],
            16,
            f"{FIELD} must be a JSON object, got []; leave it out, or write {{}}, for the "
            "defaults.",
        ),
        (
            {"topk": 3},
            16,
            f"{FIELD}.topk is not a known field, got 3; did you mean top_k?; {FIELDS}",
        ),
        (
            {"top_k": 3, "top-k": 4},
            16,
            f'{FIELD} must not name a field twice, got ["top_k", "top-k"]; remove one of the two '
            "spellings.",
        ),
        (
            {"policy": "echo", "gates": {"1": 0.2}, "profile": "p.json"},
            16,
            f"{FIELD}.profile has nothing to say to policy echo where {FIELD}.gates names the "
            'gates, got "p.json"; remove one of the two.',
        ),
        (
            {"policy": "echo", "gates": {"0": 0.2}},
            16,
            f"{FIELD}.gates must be an object of depths (1 to {MAX_DEPTH}) and thresholds (at "
            'least 0, below 1), got {"0": 0.2}; write it as {"1": 0.2, "3": 0.2}, or remove it '
            "for the gates of the profile.",
        ),
        (
            {"policy": "echo", "gates": {"7": 0.2}},
            16,
            f"{FIELD}.gates must be at depths up to max_depth (6), got a gate at 7; remove it, or "
            "raise max_depth.",
        ),
        (
            {"policy": "topn", "k_max": 64},
            16,
            f"{FIELD}.k_max belongs to policy echo, auto, evict or graft, got policy topn; remove "
            f"{FIELD}.k_max, or set {FIELD}.policy to echo.",
        ),
        (
            {"policy": "evict", "floor": 1},
            16,
            f"{FIELD}.floor belongs to policy echo or auto, got policy evict; remove "
            f"{FIELD}.floor, or set {FIELD}.policy to echo.",
        ),
        (
            {"policy": "graft", "gamma": 0.1, "k_max": 9},
            16,
            f"{FIELD}.gamma belongs to policy auto or evict, got policy graft; remove "
            f"{FIELD}.gamma, or set {FIELD}.policy to auto.",
        ),
        (
            {"policy": "graft", "trace": "t.jsonl"},
            16,
            f"{FIELD}.trace does not work with policy graft, because retrieved nodes are not the "
            'draft head\'s, got "t.jsonl"; remove it, or choose another policy.',
        ),
        (
            {"policy": "auto", "gamma": 0.1},
            16,
            f"{FIELD}.gamma needs {FIELD}.k_max, the rows at which the hinge begins, got gamma 0.1 "
            "alone; set k_max too, or remove gamma.",
        ),
        (
            {"policy": "auto", "width": 2},
            16,
            f"{FIELD}.width must be at least {FIELD}.top_k (4), got 2; raise it, or lower top_k.",
        ),
        (
            {"policy": "echo", "floor": 9, "k_max": 8},
            16,
            f"{FIELD}.floor must be at most {FIELD}.k_max (8), which is all that the batch may "
            "have, got 9; lower it, or raise k_max.",
        ),
        (
            {"policy": "echo", "floor": 17},
            16,
            f"{FIELD}.floor must be at most speculative_config.num_speculative_tokens (16), got "
            "17; lower it.",
        ),
        (
            {"policy": "echo", "share": "fair"},
            16,
            f'{FIELD}.share must be "batch" or "equal", got "fair"; set it to one of them.',
        ),
        (
            {"linear": "onednn"},
            16,
            f'{FIELD}.linear must be "auto" or "stock", got "onednn"; set it to one of them.',
        ),
        (
            {"candidates": "drawn", "policy": "evict"},
            16,
            f"{FIELD}.candidates drawn needs a policy that gives out nodes before their tokens are "
            f'drawn, got policy evict; set it to "auto" or "best", or {FIELD}.policy to chain, '
            "static, topn, echo or auto.",
        ),
        (
            {"policy": "auto", "online": 1},
            16,
            f"{FIELD}.online must be true or false, got 1; set it to one of them.",
        ),
        ({"zzz": None}, 16, f"{FIELD}.zzz is not a known field, got null; {FIELDS}"),
        ({"\n": None}, 16, f'{FIELD}."\\n" is not a known field, got null; {FIELDS}'),
        (
            {"policy": "best"},
            16,
            f'{FIELD}.policy must be one of {POLICIES}, got "best"; set it to one of them.',
        ),
        (
            {"policy": "top-n"},
            16,
            f'{FIELD}.policy must be one of {POLICIES}, got "top-n"; did you mean topn?; set it to '
            "one of them.",
        ),
        (
            {"policy": 1},
            16,
            f"{FIELD}.policy must be one of {POLICIES}, got 1; set it to one of them.",
        ),
        *[
            (
                {name: value},
                16,
                f"{FIELD}.{name} must be {kind} 1 and {limit}, got {shown}; set it in that range, "
                f"or remove it for the default of {default}.",
            )
            for name, limit, default in (("max_depth", MAX_DEPTH, 6), ("top_k", MAX_TOP_K, 4))
            for value, shown, kind in (
                (0, "0", "between"),
                (-1, "-1", "between"),
                (limit + 1, f"{limit + 1}", "between"),
                (2.0, "2.0", "an integer between"),
                (True, "true", "an integer between"),
                ("2", '"2"', "an integer between"),
                (None, "null", "an integer between"),
            )
        ],
        (
            {"policy": "chain"},
            33,
            f"{NODES} must be at most 32 for policy chain, which drafts one node a level, got 33; "
            f"lower it, or choose another {FIELD}.policy.",
        ),
        (
            {"policy": "chain", "max_depth": 3},
            4,
            f"{FIELD}.max_depth must equal {NODES} (4) for policy chain, got 3; remove it, or "
            "make the two equal.",
        ),
        (
            {"policy": "chain", "top_k": 2},
            4,
            f"{FIELD}.top_k must be 1 for policy chain, got 2; remove it, or set {FIELD}.policy "
            "to topn for a tree.",
        ),
        (
            {"max_depth": 6},
            5,
            f"{FIELD}.max_depth must be at most {NODES} (5), because a path of 6 levels has 6 "
            "nodes, got 6; lower it, or raise num_speculative_tokens.",
        ),
        (
            {"policy": "topn", "max_depth": 2},
            21,
            f"{NODES} must be at most 20 with {FIELD}.top_k 4 and {FIELD}.max_depth 2 (top_k + "
            "(max_depth - 1) * top_k^2 = 4 + 1 * 16 = 20 nodes can be drafted), got 21; lower it, "
            "or raise top_k or max_depth.",
        ),
        (
            {"tree": TREE},
            16,
            f"{FIELD}.tree belongs to policy static, got policy auto; remove {FIELD}.tree, or set "
            f"{FIELD}.policy to static.",
        ),
        *[
            (
                section,
                16,
                f"{FIELD}.tree is required for policy static and must list at least one path, got "
                f"{shown}; {SHAPE}",
            )
            for section, shown in (
                ({"policy": "static"}, "null"),
                ({"policy": "static", "tree": []}, "[]"),
            )
        ],
        ({"policy": "static", "tree": 3}, 16, f"{FIELD}.tree must be a list, got 3; {SHAPE}"),
        (
            {"policy": "static", "tree": [[0], 1]},
            16,
            f"{FIELD}.tree[1] must be a list, got 1; {SHAPE}",
        ),
        (
            {"policy": "static", "tree": [[0], [0, 1.5]]},
            16,
            f"{FIELD}.tree[1][1] must be a rank, an integer, got 1.5; {SHAPE}",
        ),
        (
            {"policy": "static", "tree": [[0], []]},
            16,
            f"{FIELD}.tree[1] must have 1 to 32 ranks, got [] with 0; the root is not listed.",
        ),
        (
            {"policy": "static", "tree": [[0], [16]]},
            16,
            f"{FIELD}.tree[1] must hold child ranks between 0 and 15, got [16]; rank 0 is the "
            "draft's best token.",
        ),
        (
            {"policy": "static", "tree": [[0], [-1]]},
            16,
            f"{FIELD}.tree[1] must hold child ranks between 0 and 15, got [-1]; rank 0 is the "
            "draft's best token.",
        ),
        (
            {"policy": "static", "tree": [[0], [1], [0]]},
            16,
            f"{FIELD}.tree[2] repeats the path [0]; list every path once.",
        ),
        (
            {"policy": "static", "tree": [[0], [1, 0]]},
            16,
            f"{FIELD}.tree[1] is [1, 0] but its parent [1] is not in the list; add the parent, or "
            "remove the path.",
        ),
        (
            {"policy": "static", "tree": TREE},
            2,
            f"{FIELD}.tree must have at most {NODES} (2) paths, got 3; shorten it, or raise "
            "num_speculative_tokens.",
        ),
        (
            {"policy": "static", "tree": TREE, "top_k": 3},
            16,
            f"{FIELD}.top_k follows from {FIELD}.tree for policy static and would have to be 2, "
            "got 3; remove it.",
        ),
        (
            {"policy": "static", "tree": TREE, "max_depth": 3},
            16,
            f"{FIELD}.max_depth follows from {FIELD}.tree for policy static and would have to be "
            "2, got 3; remove it.",
        ),
    ],
)
def test_one_sentence_says_what_is_wrong(section: object, num_nodes: int, sentence: str) -> None:
    with pytest.raises(EchoConfigError) as error:
        parse(section, num_nodes)
    assert str(error.value) == sentence


def test_a_long_value_is_cut() -> None:
    with pytest.raises(EchoConfigError) as error:
        parse({"policy": "x" * 1000})
    assert len(str(error.value)) < 250


def test_the_config_is_frozen_and_hashable_and_travels() -> None:
    config = parse({"policy": "static", "tree": TREE})
    with pytest.raises(ValueError, match="frozen"):
        config.top_k = 3
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert hash(copy) == hash(config)
    assert repr(copy) == repr(config)


@pytest.mark.parametrize("model", section_models().values())
def test_every_field_says_its_range_and_default(model: type[EchoConfig]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        if name == "policy":
            assert field.description.endswith(".")
        elif name != "tree":
            assert f"efault {json.dumps(field.default)}" in field.description, name


def test_a_reference_of_all_fields_follows_from_the_models() -> None:
    schema = TypeAdapter(section_type()).json_schema()
    names = schema["discriminator"]["mapping"].keys()
    assert sorted(names) == sorted(policy_names())
    for reference in schema["discriminator"]["mapping"].values():
        fields = schema["$defs"][reference.rpartition("/")[2]]["properties"]
        assert fields.keys() <= set(field_names())
        assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize("policy", policy_names())
def test_a_foreign_field_with_its_default_changes_nothing(policy: str) -> None:
    """Traces of earlier releases name all fields."""
    section: dict[str, Any] = {"policy": policy}
    if policy == "static":
        section["tree"] = TREE
    others = {"width": None, "k_max": None, "share": "batch", "online": True, "profile": None}
    assert parse({**others, **section}) == parse(section)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children)
    ),
    max_leaves=8,
)
TREES = st.lists(st.lists(st.integers(-1, 17), max_size=4), max_size=8)
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from(policy_names()) | JSON_VALUES,
        "width": st.integers(0, 18) | JSON_VALUES,
        "k_max": st.integers(-1, 300) | JSON_VALUES,
        "gamma": st.floats(-1, 5) | JSON_VALUES,
        "gates": st.dictionaries(st.sampled_from(["1", "2", "40", "x"]), st.floats(-0.5, 1.5))
        | JSON_VALUES,
        "floor": st.integers(-1, 300) | JSON_VALUES,
        "share": st.sampled_from(["batch", "equal"]) | JSON_VALUES,
        "linear": st.sampled_from(["auto", "stock"]) | JSON_VALUES,
        "candidates": st.sampled_from(["best", "drawn", "auto"]) | JSON_VALUES,
        "max_depth": st.integers(0, 34) | JSON_VALUES,
        "top_k": st.integers(0, 18) | JSON_VALUES,
        "tree": TREES | JSON_VALUES,
        "other": JSON_VALUES,
    },
)


@given(section=SECTIONS | JSON_VALUES, num_nodes=st.integers(1, 256))
def test_any_section_is_either_valid_or_one_sentence(section: Any, num_nodes: int) -> None:
    try:
        config = parse(section, num_nodes)
    except EchoConfigError as error:
        sentence = str(error)
        assert sentence.startswith("speculative_config.")
        assert sentence.endswith(".")
        assert "\n" not in sentence
        return
    assert 1 <= config.max_depth <= min(MAX_DEPTH, num_nodes)
    assert 1 <= config.top_k <= MAX_TOP_K
    assert hasattr(config, "tree") == (config.policy == "static")
    # A filled-in config means the same when it is read again.
    again = config.model_dump(mode="json", exclude_none=True)
    assert parse(again, num_nodes) == config
