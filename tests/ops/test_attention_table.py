# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The table of measured attention times: what it prefers, and when it is not used."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from echo_vllm.ops import attention_table
from echo_vllm.ops.attention_table import Measurement, Table, read_table, write_table


def measured(requests: int, rows: int, context: int, **times: float) -> Measurement:
    return Measurement(4, 128, requests, rows, context, times)


TABLE = Table(
    "a GPU",
    (
        measured(8, 33, 512, extension=10.0, flash=15.0),
        measured(8, 33, 16384, extension=90.0, flash=70.0),
        measured(64, 1, 4096, extension=50.0, flash=20.0, xformers=1.0),
        measured(64, 1, 512, extension=9.0, flash=8.0),
    ),
)


def test_the_fastest_over_all_contexts_wins() -> None:
    # 10 * 90 < 15 * 70, though the sum of the times says otherwise.
    assert TABLE.best(4, 128, 8, 33) == "extension"
    # xformers was not measured at both contexts.
    assert TABLE.best(4, 128, 64, 1) == "flash"


def test_the_nearest_shape_speaks_for_its_neighbourhood_only() -> None:
    assert TABLE.best(4, 128, 100, 2) == "flash"
    assert TABLE.best(4, 128, 12, 25) == "extension"
    assert TABLE.best(4, 128, 8, 200) == ""
    assert TABLE.best(4, 64, 8, 33) == ""
    assert TABLE.best(8, 128, 8, 33) == ""
    assert Table("a GPU", ()).best(4, 128, 8, 33) == ""


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", TABLE.device, TABLE.measurements)
    assert read_table(tmp_path / "table.json") == TABLE


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"device": "a GPU", "measurements": [{"rows": 3}]}'],
    ids=["empty", "list", "fields"],
)
def test_another_file_is_refused_with_a_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(ValueError, match=r"no table of attention times .*benchmarks.gpu --table"):
        read_table(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"no table of attention times .*benchmarks.gpu --table"):
        read_table(path)
    write_table(path, "a GPU", [measured(8, 33, 512, extension=0.0)])
    with pytest.raises(ValueError, match="requests, rows and times must be positive"):
        read_table(path)
    assert json.loads(path.read_text())["device"] == "a GPU"


def test_the_doctor_says_where_the_choice_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(attention_table.VARIABLE, raising=False)
    assert attention_table.describe().endswith(
        "for every shape (ECHO_VLLM_ATTENTION_TABLE is unset)"
    )
    path = tmp_path / "table.json"
    monkeypatch.setenv(attention_table.VARIABLE, str(path))
    assert "is no table of attention times" in attention_table.describe()
    write_table(path, TABLE.device, TABLE.measurements)
    assert attention_table.describe() == f"tree_attention by 4 measurements of a GPU in {path}"


@pytest.fixture
def fresh() -> Iterator[None]:
    attention_table.table_of_this_gpu.cache_clear()
    attention_table.preferred.cache_clear()
    yield
    attention_table.table_of_this_gpu.cache_clear()
    attention_table.preferred.cache_clear()


def test_the_environment_names_the_table_of_this_gpu(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(attention_table.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert attention_table.preferred(4, 128, 64, 64) == ""
    path = tmp_path / "table.json"
    write_table(path, TABLE.device, TABLE.measurements)
    monkeypatch.setenv(attention_table.VARIABLE, str(path))
    attention_table.table_of_this_gpu.cache_clear()
    attention_table.preferred.cache_clear()
    assert attention_table.preferred(4, 128, 64, 64) == "flash"
    assert attention_table.preferred(4, 128, 8, 8 * 33) == "extension"
    assert attention_table.preferred(4, 128, 0, 0) == ""

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    attention_table.table_of_this_gpu.cache_clear()
    attention_table.preferred.cache_clear()
    with caplog.at_level(logging.WARNING, "echo_vllm.ops.attention_table"):
        assert attention_table.preferred(4, 128, 64, 64) == ""
    assert "was measured on a GPU and is not used on another GPU" in caplog.text


def test_a_gpu_that_the_package_knows_needs_no_table(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(attention_table.VARIABLE, raising=False)
    files = list(attention_table.FOLDER.glob("*.json"))
    assert files
    devices = [read_table(path).device for path in files]
    assert len(set(devices)) == len(devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    # Measured: 209 us against 554 by the extension, and 521 against 619.
    assert attention_table.preferred(4, 128, 16, 16 * 33) == "flash"
    assert attention_table.preferred(4, 128, 64, 64 * 16) == "triton"
    assert attention_table.preferred(4, 64, 16, 16 * 33) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_table.describe() == "tree_attention by 9 measurements of NVIDIA H100 80GB HBM3"
