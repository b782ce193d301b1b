# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`CostCache`: measured step costs on disk, so that a second start need not measure.

One JSON file a key; the key names everything that a step's time depends on. A cache is a help and
never an obstacle: what cannot be read or written is said in the log, and the engine measures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from echo_vllm import atomic
from echo_vllm.forecast.curve import CostError
from echo_vllm.forecast.step_cost import StepCost
from echo_vllm.machine import cache_folder

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class CostKey:
    """What a measured cost belongs to; any difference makes it another one.

    Attributes:
        target, drafter: names or paths of the models, with a revision or date where there is one.
        dtype: of the target.
        hardware: processor or GPU, see `describe_cpu`.
        threads: compute threads of the engine.
        vllm_version, echo_vllm_version: of the installed packages.
        max_rows: the largest forward that was measured.
    """

    target: str
    drafter: str
    dtype: str
    hardware: str
    threads: int
    vllm_version: str
    echo_vllm_version: str
    max_rows: int

    def digest(self) -> str:
        """24 hexadecimal digits, the name of the file."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class CostCache:
    """A folder of measured costs."""

    def __init__(self, folder: Path | None = None) -> None:
        """Args: folder: `cache_folder() / "costs"` without one; made when something is saved."""
        self.folder = cache_folder() / "costs" if folder is None else folder

    def path(self, key: CostKey) -> Path:
        """The file of `key`, whether it exists or not."""
        return self.folder / f"{key.digest()}.json"

    def load(self, key: CostKey) -> StepCost | None:
        """What was saved under `key`, or None. A damaged file is ignored with a warning."""
        path = self.path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("Ignoring the measured step cost %s (%s).", path, error)
            return None
        try:
            data = json.loads(text)
            if data["schema_version"] != SCHEMA_VERSION or data["key"] != asdict(key):
                raise CostError("it belongs to another version or key")
            return StepCost.from_dict(data["cost"])
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("Ignoring the damaged file of a step cost %s (%s).", path, error)
            return None

    def save(self, key: CostKey, cost: StepCost) -> Path | None:
        """Keep `cost` under `key`: the whole file or nothing, for readers at the same time.

        Returns the file, or None where it cannot be written, which is logged.
        """
        path = self.path(key)
        data = {"schema_version": SCHEMA_VERSION, "key": asdict(key), "cost": cost.to_dict()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json(path, data)
        except OSError as error:
            logger.warning("The measured step cost is not kept: %s (%s).", path, error)
            return None
        return path


def describe_cpu() -> str:
    """Model and number of logical processors of this machine, for `CostKey.hardware`."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the architecture must do
    return f"{model} x{os.cpu_count()}"
