# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The two ways across the border between host and device.

Whoever needs values on the other side comes here, so that the places where the host waits for a
GPU are few and easy to find: `upload` never waits, `download` waits once for all that it brings.
On a CPU both hand back what they were given.
"""

from __future__ import annotations

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` of the host on `device`, through pinned memory, without waiting for the device."""
    if values.device == device or device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def download(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`values` on the host, whatever their shapes and dtypes, in one transfer."""
    if all(value.device.type == "cpu" for value in values):
        return values
    # Widest elements first, so that each part begins where its dtype may begin.
    order = sorted(range(len(values)), key=lambda i: -values[i].element_size())
    packed = torch.cat([values[i].contiguous().flatten().view(torch.uint8) for i in order]).cpu()
    found: list[torch.Tensor] = list(values)
    start = 0
    for i in order:
        stop = start + values[i].numel() * values[i].element_size()
        found[i] = packed[start:stop].view(values[i].dtype).view(values[i].shape)
        start = stop
    return tuple(found)
