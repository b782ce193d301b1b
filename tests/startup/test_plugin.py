# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The plug-in that vLLM loads in every process."""

from __future__ import annotations

import logging

import pytest

from echo_vllm.startup import plugin


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
