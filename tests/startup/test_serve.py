# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`vllm serve` with a configuration that cannot work: one sentence, at once, nothing left over."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echo_vllm.policies.registry import field_names
from tests.startup.models import write_head, write_target
from tests.startup.starts import Starts

# Until it gives up, the server is one busy process, so its CPU time is the time that a user waits
# on a machine of his own; the wall clock is for hanging only, because other tests may be running.
LIMIT_CPU_S = 60
HANGING_S = 300
METHOD = "speculative_config.method echo does not work with"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_target(folder / "target")
    write_head(folder / "head")
    write_head(folder / "other-head", hidden_size=128)
    return folder


def serve(models: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and the last line of the output; fails if the process takes too long."""
    before = cpu_seconds()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(models / "target")),
            *("--port", "0", *arguments),
        ],
        cwd=models,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=HANGING_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {HANGING_S} s; its output:\n{output}", pytrace=False)
    assert_group_ends(process.pid)
    assert cpu_seconds() - before < LIMIT_CPU_S
    assert "Traceback" not in output, output
    return process.returncode, output.strip().splitlines()[-1]


def cpu_seconds() -> float:
    """CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def assert_group_ends(group: int) -> None:
    """No process of the server's group is left a moment after it ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("the server left a process behind", pytrace=False)


def speculative(models: Path, **changes: Any) -> str:
    config = {
        "method": "echo",
        "model": str(models / "head"),
        "num_speculative_tokens": 16,
        "echo": {},
    }
    return json.dumps(config | changes)


@pytest.mark.full
def test_a_wrong_configuration_ends_at_once_with_one_sentence(models: Path) -> None:
    """The last thing that is checked, in a process of its own as a user starts it."""
    inline = speculative(models, model="other-head")
    status, last_line = serve(models, "--speculative-config", inline)
    assert (status, last_line) == (
        1,
        'error: speculative_config.model "other-head" was made for a target with hidden size 128 '
        "(hidden_size in its config.json), but the target's is 64; choose a head that was trained "
        "for this target.",
    )


@pytest.fixture(scope="module")
def starts(models: Path) -> Iterator[Starts]:
    with Starts(models) as starts:
        yield starts


WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "range": (
        {"echo": {"top_k": 0}},
        [],
        "speculative_config.echo.top_k must be between 1 and 16, got 0; set it in that range, or "
        "remove it for the default of 4.",
    ),
    "unknown-field": (
        {"echo": {"depth": 3}},
        [],
        "speculative_config.echo.depth is not a known field, got 3; did you mean max_depth?; the "
        f"fields are {', '.join(field_names())}.",
    ),
    "unknown-field-of-vllm": (
        {"num_speculative_token": 4},
        [],
        "speculative_config.num_speculative_token is not a known field, got 4; did you mean "
        "num_speculative_tokens?; remove it.",
    ),
    "beside-the-section": (
        {"policy": "topn"},
        [],
        'speculative_config.policy is a field of speculative_config.echo, got "topn"; move it '
        "there.",
    ),
    "bool-for-int": (
        {"num_speculative_tokens": True},
        [],
        "speculative_config.num_speculative_tokens is required with method echo and must be an "
        "integer between 1 and 256, got true; set it to the nodes that one request's tree may "
        "have.",
    ),
    "missing-head": (
        {"model": "no/such-head"},
        [],
        'speculative_config.model "no/such-head" is neither a folder nor a Hugging Face repository '
        "that can be read (it is not in the local cache, and there is no connection or "
        "HF_HUB_OFFLINE is set); set it to the folder or the Hugging Face id of an EAGLE-3 head.",
    ),
    "option-beside": (
        {},
        ["--speculative-config.echo.top_k", "0"],
        "speculative_config.echo.top_k must be between 1 and 16, got 0; set it in that range, or "
        "remove it for the default of 4.",
    ),
    "engine-option": ({}, ["--async-scheduling"], f"{METHOD} --async-scheduling; remove it."),
    "pipeline": (
        {},
        ["--pipeline-parallel-size", "2"],
        f"{METHOD} --pipeline-parallel-size 2; remove it and use --tensor-parallel-size.",
    ),
    "lora": ({}, ["--enable-lora"], f"{METHOD} --enable-lora; remove it."),
    "kv-connector": (
        {},
        [
            "--kv-transfer-config",
            '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}',
        ],
        f"{METHOD} --kv-transfer-config; remove it.",
    ),
    "quantised-cache": (
        {},
        ["--kv-cache-dtype", "fp8_e5m2"],
        f"{METHOD} --kv-cache-dtype fp8_e5m2 and --dtype bfloat16; remove --kv-cache-dtype, the "
        "cache then has the type of the model.",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", WRONG)
def test_every_wrong_configuration_is_one_sentence(models: Path, starts: Starts, kind: str) -> None:
    changes, arguments, sentence = WRONG[kind]
    inline = speculative(models, **changes)
    ended = starts.run("serve", "target", "--speculative-config", inline, *arguments)
    assert ended.status == 1, ended.output
    assert "Traceback" not in ended.output, ended.output
    assert ended.last_line.startswith(f"error: {sentence}")
    assert ended.last_line.endswith(".")


@pytest.mark.full
def test_a_file_that_cannot_be_used_ends_at_once_with_one_sentence(
    models: Path, starts: Starts
) -> None:
    (models / "empty.json").touch()
    (models / "twice.json").write_text('{"echo": {"policy": "topn", "policy": "echo"}}')
    for name, what in (
        ("nowhere.json", "is neither inline JSON ({...}) nor a readable file: No such file or"),
        ("head", "is neither inline JSON ({...}) nor a readable file: Is a directory"),
        ("empty.json", "is not valid JSON: Expecting value"),
        ("twice.json", "is not valid JSON: field 'policy' stands twice in one object"),
    ):
        ended = starts.run("serve", "target", "--speculative-config", name)
        assert ended.status == 2, ended.output
        line = f"error: argument --speculative-config/-sc: {name!r} {what}"
        assert line in ended.last_line


@pytest.mark.full
def test_a_right_configuration_goes_on_to_the_engine(models: Path, starts: Starts) -> None:
    """So the refusals above are those of what was changed."""
    # The model of these tests has no tokenizer, which is asked for before the engine starts.
    ended = starts.run(
        "serve", "target", "--skip-tokenizer-init", "--speculative-config", speculative(models)
    )
    assert ended.status is None, ended.output
    assert "error" not in ended.last_line
