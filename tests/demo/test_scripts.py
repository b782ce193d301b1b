# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What goes wrong before a server or a set-up starts is said in one sentence with the remedy."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / script],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("port", ["http", "", "0", "-1", "65536", "8000x", "0x50"])
def test_serve_refuses_a_port_that_is_none(port: str) -> None:
    result = run("serve.sh", PORT=port or " ")
    assert result.returncode != 0
    assert f"PORT must be a number from 1 to 65535, got '{port or ' '}'" in result.stderr


def test_serve_refuses_an_unknown_openmp() -> None:
    result = run("serve.sh", PORT="1", OPENMP="llvm")
    assert result.returncode != 0
    assert "OPENMP must be gnu or intel, got 'llvm'" in result.stderr


@pytest.mark.parametrize("value", ["true", "2"])
def test_serve_refuses_another_way_to_say_compile(value: str) -> None:
    result = run("serve.sh", PORT="1", COMPILE=value)
    assert result.returncode != 0
    assert f"COMPILE must be 0 or 1, got '{value}'" in result.stderr


def test_setup_refuses_another_python_than_it_has(tmp_path: Path) -> None:
    result = run("setup.sh", PYTHON="/usr/bin/false")
    assert result.returncode != 0
    assert "PYTHON must be an interpreter of Python 3.11, 3.12 or 3.13, got" in result.stderr
    other = tmp_path / "python"
    other.write_text(
        "#!/bin/sh\ncase $2 in *%d.%d*) echo 3.12;; *exit*) exit 0;; *) echo $0;; esac\n"
    )
    other.chmod(0o755)
    if sys.version_info[:2] == (3, 12):
        other.write_text(other.read_text().replace("3.12", "3.13"))
    result = run("setup.sh", PYTHON=str(other))
    assert result.returncode != 0
    assert "run make clean first, or leave PYTHON out" in result.stderr


def test_serve_refuses_a_port_in_use_and_names_another() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        result = run("serve.sh", PORT=str(listener.getsockname()[1]))
    assert result.returncode != 0
    assert "choose another with PORT=" in result.stderr


def test_serve_refuses_a_port_on_which_another_server_is_starting(free_port: int) -> None:
    """It does not listen yet, and vLLM lets two servers have one port."""
    (ROOT / ".build").mkdir(exist_ok=True)
    port = free_port
    lock = ROOT / ".build" / f"port-{port}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run("serve.sh", PORT=str(port))
    lock.unlink()
    assert result.returncode != 0
    assert f"another server of this checkout is starting on port {port}" in result.stderr


def test_serve_asks_for_the_setup_when_there_is_none(tmp_path: Path) -> None:
    result = run("serve.sh", PREFIX=str(tmp_path))
    assert result.returncode != 0
    assert "run make setup first" in result.stderr


def test_setup_refuses_an_unknown_variant() -> None:
    result = run("setup.sh", VARIANT="rocm")
    assert result.returncode != 0
    assert "VARIANT must be cpu or cuda, got 'rocm'" in result.stderr


def copy_of_the_setup(folder: Path) -> Path:
    """A checkout that holds what the first steps of the set-up read, and no .venv."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "scripts" / "setup.sh"


def test_setup_without_a_supported_python_names_the_remedy(tmp_path: Path) -> None:
    script = copy_of_the_setup(tmp_path)
    result = subprocess.run(
        [script],
        env={**os.environ, "PYTHON": "python-that-does-not-exist"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert (
        "PYTHON must be an interpreter of Python 3.11, 3.12 or 3.13, got "
        "'python-that-does-not-exist': name one, or leave it out"
    ) in result.stderr
    nothing = {**os.environ, "PATH": f"{without_python(tmp_path / 'bin')}"}
    result = subprocess.run([script], env=nothing, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 was found" in result.stderr
    assert "PYTHON=/path/to/python3.11" in result.stderr


def without_python(folder: Path) -> Path:
    """A folder with the programs that the scripts use, but no Python."""
    folder.mkdir()
    for name in ("bash", "env", "mkdir", "flock", "dirname", "grep", "find", "sort", "cat"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


@pytest.mark.full
def test_setup_without_a_network_names_the_remedy(tmp_path: Path) -> None:
    script = copy_of_the_setup(tmp_path)
    # Every index is a closed port, and nothing is in any cache.
    nowhere = "http://127.0.0.1:9/simple"
    result = subprocess.run(
        [script],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))},
            "PYTHON": sys.executable,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": nowhere,
            "PIP_RETRIES": "0",
            "UV_HTTP_RETRIES": "0",
            "UV_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert "the packages could not be installed (see above): check the free" in result.stderr


def test_the_prompts_of_the_demos_training_are_the_same_each_time_and_none_twice() -> None:
    def prompts(seed: str) -> list[list[str]]:
        script = ROOT / "scripts" / "demo_prompts.py"
        command = [sys.executable, str(script), "--count", "200", "--seed", seed]
        output = subprocess.check_output(command, text=True)
        return [json.loads(line)["turns"] for line in output.splitlines()]

    first = prompts("0")
    assert first == prompts("0") != prompts("1")
    assert len({turns[0] for turns in first}) == 200
    assert not any("{" in turns[0] and "}" in turns[0] for turns in first if "def " not in turns[0])
