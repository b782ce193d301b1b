# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The fields that the series adds travel through vLLM's own messages."""

from __future__ import annotations

import pickle
import re
import types

import pytest

from echo_vllm.patching import find_installation


def test_scheduler_statistics_travel_from_the_core_to_the_front_end() -> None:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    assert SchedulerStats().echo_stats is None
    stats = {"verified_nodes": 7, "budget_use": 0.5, "depths": [3, 2, 0], "widths": {"1": 4}}
    for value in (stats, None):
        sent = EngineCoreOutputs(scheduler_stats=SchedulerStats(echo_stats=value))
        frames = MsgpackEncoder().encode(sent)
        received = MsgpackDecoder(EngineCoreOutputs).decode(frames)
        assert received.scheduler_stats.echo_stats == value


def test_runner_statistics_travel_from_the_worker_to_the_scheduler() -> None:
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

    assert EMPTY_MODEL_RUNNER_OUTPUT.echo_stats is None
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={}, echo_stats={"nodes": [1]})
    assert pickle.loads(pickle.dumps(output)).echo_stats == {"nodes": [1]}


def test_min_p_and_logit_bias_are_allowed_with_trees_only() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    trees = types.SimpleNamespace(echo=object())
    chains = types.SimpleNamespace(echo=None)
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={1: 2.0})):
        params._validate_spec_decode(trees)
        params._validate_spec_decode(None)
        with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
            params._validate_spec_decode(chains)


def test_nobody_asks_for_a_distribution_called_vllm() -> None:
    """On a CPU there is none: `vllm bench serve --dataset-name custom` ended in a traceback."""
    from vllm.utils.import_utils import PlaceholderModule, get_vllm_optional_dependencies
    from vllm.version import distribution_metadata

    found = find_installation()
    asking = re.compile(r"(?:metadata|version|distribution|requires)\(\s*\"vllm\"")
    folder = found.root / "vllm"
    files = [
        file for file in sorted(folder.rglob("*.py")) if asking.search(file.read_text("utf-8"))
    ]
    # Both try the other name, too.
    assert files == [folder / "platforms" / "__init__.py", folder / "version.py"]
    metadata = distribution_metadata()
    assert (metadata["Name"], metadata["Version"]) == (found.distribution, found.version)
    assert "pandas" in get_vllm_optional_dependencies()["bench"]
    with pytest.raises(ImportError, match="No module named 'nowhere'"):
        PlaceholderModule("nowhere").anything  # noqa: B018
