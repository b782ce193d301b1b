# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the installed package does to a vLLM that does not use it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from echo_vllm.startup import plugin
from tests.conftest import ROOT, ServerFactory
from tests.engine.tiny import make_head, make_target
from tests.startup.other_methods import METHODS
from tests.startup.unpatched import write_unpatched_vllm


@pytest.mark.parametrize("patched", [True, False])
def test_it_warns_if_and_only_if_vllm_is_not_patched(
    monkeypatch: pytest.MonkeyPatch, patched: bool
) -> None:
    from vllm.config.speculative import SpeculativeConfig

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    logger = logging.getLogger("vllm.echo_vllm")
    logger.addHandler(handler)
    if not patched:
        fields = dict(SpeculativeConfig.__dataclass_fields__)
        del fields["echo"]
        monkeypatch.setattr(SpeculativeConfig, "__dataclass_fields__", fields)
    try:
        plugin.register()
    finally:
        logger.removeHandler(handler)
    messages = [record.getMessage() for record in records]
    expected = "echo-vllm is installed but vLLM is not patched; run: echo-vllm patch apply"
    assert messages == ([] if patched else [expected])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_target(folder / "target")
    make_head(folder / "head")
    return folder


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unpatched_vllm(tmp_path_factory.mktemp("unpatched"))


@pytest.mark.full
@pytest.mark.parametrize("patched", [True, False])
def test_an_engine_without_echo_does_not_notice_the_package(
    models: Path, unpatched: Path, patched: bool
) -> None:
    paths = [str(ROOT)] if patched else [str(unpatched), str(ROOT)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.startup.other_methods", models / "target", models / "head"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [line["method"] for line in lines] == list(METHODS)
    for line in lines:
        assert line["patched"] == patched
        assert line["plugins"] == []
        assert line["tokens"] == 8
        assert not [name for name in line["metrics"] if "echo" in name]
    speculating = ["vllm:spec_decode_num_drafts" in line["metrics"] for line in lines]
    assert speculating == [False, True, True]
    warnings = run.stderr.count("run: echo-vllm patch apply")
    assert warnings == (0 if patched else 1)


@pytest.mark.full
def test_a_server_starts_after_the_patches_were_reverted(
    models: Path, unpatched: Path, server: ServerFactory
) -> None:
    served = server(
        models / "target",
        *("--speculative-config", json.dumps(METHODS["ngram"])),
        *("--skip-tokenizer-init", "--max-num-seqs", "2", "--enforce-eager", "--disable-log-stats"),
        env={"PYTHONPATH": f"{unpatched}{os.pathsep}{ROOT}"},
    )
    assert served.is_healthy()
    # Without ECHO the package does not switch statistics on again.
    log = served.log.read_text()
    assert "custom stat loggers were found" not in log
    assert "vLLM is not patched; run: echo-vllm patch apply" in log
