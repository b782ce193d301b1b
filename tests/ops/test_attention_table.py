# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The table of measured attention times: what it prefers, and when it is not used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from echo_vllm.ops import attention_table
from echo_vllm.ops.attention_table import Measurement, Table, read_table, write_table


def measured(requests: int, rows: int, context: int, **times: float) -> Measurement:
    return Measurement(4, 128, requests, rows, context, times)


TABLE = Table(
    "a GPU",
    "7.5",
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


def test_the_nearest_shape_speaks_for_all_others_of_its_head_size() -> None:
    assert TABLE.best(4, 128, 100, 2) == "flash"
    assert TABLE.best(4, 128, 12, 25) == "extension"
    assert TABLE.best(4, 128, 8, 200) == "extension"
    assert TABLE.best(4, 128, 1024, 1) == "flash"
    assert TABLE.best(7, 128, 8, 33) == "extension"
    assert TABLE.best(4, 64, 8, 33) == ""
    assert Table("a GPU", "7.5", ()).best(4, 128, 8, 33) == ""


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", TABLE.device, TABLE.capability, TABLE.measurements)
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
    write_table(path, "a GPU", "7.5", [measured(8, 33, 512, extension=0.0)])
    with pytest.raises(ValueError, match="group, requests, rows and times must be positive"):
        read_table(path)
    assert json.loads(path.read_text())["device"] == "a GPU"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, tuple[int, int]], None]]:
    """`gpu(name, capability)`: torch sees this one, and nothing was asked before."""

    def forget() -> None:
        attention_table.table_of_this_gpu.cache_clear()
        attention_table.preferred.cache_clear()

    def see(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        forget()

    monkeypatch.delenv(attention_table.VARIABLE, raising=False)
    forget()
    yield see
    forget()


SeeGpu = Callable[[str, tuple[int, int]], None]
ORDER = "tree_attention in this order for every shape: "


def test_the_environment_names_the_table_of_this_kind_of_gpu(
    gpu: SeeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu("a GPU", (7, 5))
    assert attention_table.preferred(4, 128, 64, 64) == ""
    assert attention_table.describe() == f"{ORDER}no table was measured on this compute capability"
    path = tmp_path / "table.json"
    write_table(path, TABLE.device, TABLE.capability, TABLE.measurements)
    monkeypatch.setenv(attention_table.VARIABLE, str(path))
    for name in ("a GPU", "its sister"):
        gpu(name, (7, 5))
        assert attention_table.preferred(4, 128, 64, 64) == "flash"
        assert attention_table.preferred(4, 128, 8, 8 * 33) == "extension"
        assert attention_table.preferred(4, 128, 0, 0) == ""
    assert attention_table.describe() == (
        f"tree_attention by 4 measurements of a GPU in {path}, the nearest for its sister: compute "
        "capability 7.5 as well"
    )
    gpu("another GPU", (8, 0))
    with caplog.at_level(logging.WARNING, "echo_vllm.ops.attention_table"):
        assert attention_table.preferred(4, 128, 64, 64) == ""
    assert "was measured on a GPU and is not used on another GPU" in caplog.text
    assert attention_table.describe() == f"{ORDER}{path} was measured on another compute capability"


def test_a_table_that_is_none_is_found_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(attention_table.VARIABLE, raising=False)
    attention_table.check_file()
    assert attention_table.describe() == f"{ORDER}no GPU to choose a table for"
    monkeypatch.setenv(attention_table.VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match=r"missing\.json is no table of attention times"):
        attention_table.check_file()
    assert "missing.json is no table of attention times" in attention_table.describe()


def test_a_gpu_of_a_kind_that_the_package_knows_needs_no_table(gpu: SeeGpu) -> None:
    tables = [read_table(path) for path in attention_table.FOLDER.glob("*.json")]
    assert len({table.device for table in tables}) == len(tables) > 0
    assert all(table.capability for table in tables)
    h100 = "NVIDIA H100 80GB HBM3"
    for name, why in (
        (h100, "measured on this kind of GPU"),
        ("NVIDIA H200", "the nearest for NVIDIA H200: compute capability 9.0 as well"),
    ):
        gpu(name, (9, 0))
        # Measured: 209 us against 554 by the extension, and 521 against 619.
        assert attention_table.preferred(4, 128, 16, 16 * 33) == "flash"
        assert attention_table.preferred(4, 128, 64, 64 * 16) == "triton"
        # The nearest measurement: 64 requests of 16 rows.
        assert attention_table.preferred(4, 128, 256, 256 * 17) == "triton"
        assert attention_table.preferred(4, 64, 16, 16 * 33) == ""
        assert attention_table.describe() == f"tree_attention by 9 measurements of {h100}, {why}"
    gpu("NVIDIA L40S", (8, 9))
    assert attention_table.preferred(4, 128, 16, 16 * 33) == ""
