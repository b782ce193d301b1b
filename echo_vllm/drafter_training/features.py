# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Hidden states of the target, as the served head will read them.

speculators gets hidden states from a vLLM server through a connector that writes files; that server
runs on GPUs only, and needs the target a second time. Here the target runs in the training's own
process, by transformers and in the dtype that will be served, and its states are kept in the files
that speculators' `FileTransfer` reads, so that later epochs do not run it again.

An auxiliary layer id i means the residual stream after i of the target's layers, as in vLLM; the
last state is the one before the target's final norm, which speculators applies itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hs_connectors import FileTransfer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from echo_vllm.drafter_training.work import TrainingError, unwritable

FREE_BYTES = 2 << 30
"""What is left free on a disk on which hidden states are kept, however many may be."""


class Target:
    """The target's layers, run on one sequence at a time."""

    def __init__(self, name: str, layers: Sequence[int], dtype: torch.dtype, device: str) -> None:
        """Load the target.

        Args:
            name: a folder or a name.
            layers: auxiliary layer ids, as in vLLM.
            dtype: to run in.
            device: to run on.

        Raises:
            TrainingError: the target does not load, or is not of a kind whose layers are known.
        """
        from transformers import AutoModelForCausalLM

        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except Exception as error:  # The library raises from many families.
            raise TrainingError(
                f"TARGET {name} does not load ({str(error).strip().splitlines()[0]}); give a "
                "folder or a name of a whole model"
            ) from None
        self._model.to(device).eval().requires_grad_(False)
        self.device = device
        body = self._model.get_decoder()
        blocks = getattr(body, "layers", None)
        if blocks is None or not hasattr(body, "norm"):
            raise TrainingError(
                f"TARGET {name} is a {type(self._model).__name__}, whose layers are not known "
                "here; Llama and Qwen3 are"
            )
        self._body = body
        self._states: dict[int, torch.Tensor] = {}
        self._order = [*layers, len(blocks)]
        for index in set(self._order):
            module = body.norm if index == len(blocks) else blocks[index]
            module.register_forward_pre_hook(self._keeper(index), with_kwargs=True)

    def _keeper(self, index: int) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            self._states[index] = states[0]

        return keep

    @torch.inference_mode()
    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Auxiliary and last hidden states of a sequence.

        Args:
            input_ids: [num_tokens].

        Returns:
            [num_tokens, num_aux + 1, hidden_size], in the target's dtype, on the CPU.
        """
        self._body(input_ids=input_ids[None].to(self.device), use_cache=False)
        return torch.stack([self._states[index] for index in self._order], dim=1).cpu()


class KeptStates(FileTransfer):  # type: ignore[misc]
    """Hidden states by number of the dataset's row: from their file, or from the target now.

    `FileTransfer` waits for files that a server writes; this makes what is missing. A file gets its
    name when it is whole, and one that was cut off is made again. States beyond the limit, or for
    which the disk has no room, are computed whenever they are needed.
    """

    def __init__(self, folder: Path, target: Target, dataset: Any, max_bytes: int) -> None:
        """
        Args:
            folder: for the files.
            target: to make them with.
            dataset: rows with `input_ids`, by number.
            max_bytes: of all files together.
        """
        super().__init__(folder)
        self._folder = folder
        self._target = target
        self._dataset = dataset
        self.computed_tokens = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._room = max_bytes - sum(file.stat().st_size for file in folder.iterdir())
        except OSError as error:
            raise TrainingError(unwritable(folder, error)) from None

    def get_cached(self, file_idx: int) -> dict[str, torch.Tensor]:
        """The states and token ids of a row.

        Returns:
            hidden_states: [num_tokens, num_aux + 1, hidden_size]; token_ids: [num_tokens].
        """
        path = self._folder / f"hs_{file_idx}.safetensors"
        ids = self._dataset[file_idx]["input_ids"]
        if path.exists():
            try:
                found: dict[str, torch.Tensor] = load_file(path)
            except (OSError, SafetensorError):
                path.unlink()
            else:
                if torch.equal(found["token_ids"], ids):
                    return found
        self.computed_tokens += len(ids)
        made = {"hidden_states": self._target.hidden_states(ids).contiguous(), "token_ids": ids}
        size = made["hidden_states"].nbytes + made["token_ids"].nbytes
        if size <= self._room and shutil.disk_usage(self._folder).free > FREE_BYTES + size:
            self._room -= size
            writing = path.with_suffix(".writing")
            try:
                save_file(made, writing)
                writing.replace(path)
            except (OSError, SafetensorError):
                writing.unlink(missing_ok=True)
        return made
