# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Hidden states of the target, as the served head will read them.

speculators gets hidden states from a vLLM server through a connector that writes files; that server
runs on GPUs only, and needs the target a second time. Here the target runs in the training's own
process, by transformers and in the dtype that will be served. On a CPU, where that takes as long as
the training, its states are kept in files, so that later epochs do not run it again; on a GPU they
are kept in its memory as far as they fit.

An auxiliary layer id i means the residual stream after i of the target's layers, as in vLLM; the
last state is the one before the target's final norm, which speculators applies itself.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from echo_vllm import atomic
from echo_vllm.training.work import TrainingError, writing

FREE_BYTES = 2 << 30
"""What is left free on a disk on which hidden states are kept, however many may be."""

GPU_SHARE = 0.6
"""Of a GPU's memory that is free beside the target, for hidden states at most."""


class Target:
    """The target's layers, run on whole sequences."""

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
        self.hidden_size = int(body.config.hidden_size)
        self._body = body
        self._states: dict[int, torch.Tensor] = {}
        self._order = [*layers, len(blocks)]
        for index in set(self._order):
            module = body.norm if index == len(blocks) else blocks[index]
            module.register_forward_pre_hook(self._keeper(index), with_kwargs=True)

    def _keeper(self, index: int) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            self._states[index] = states

        return keep

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Auxiliary and last hidden states of one sequence.

        Args:
            input_ids: [num_tokens].

        Returns:
            [num_tokens, num_aux + 1, hidden_size], in the target's dtype, on the CPU.
        """
        return self.hidden_states_of([input_ids])[0].cpu()

    @torch.no_grad()
    def hidden_states_of(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Auxiliary and last hidden states of sequences that run together.

        Shorter ones are padded at their ends, which no position before sees.

        Args:
            sequences: token ids, [num_tokens] each.

        Returns:
            [num_tokens, num_aux + 1, hidden_size] each, in the target's dtype, on its device.
        """
        padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        self._body(input_ids=padded.to(self.device), use_cache=False)
        states = torch.stack([self._states[index] for index in self._order], dim=2)
        return [one[: len(ids)] for one, ids in zip(states, sequences, strict=True)]


class StatesInFiles:
    """Hidden states in a folder, which a later process finds again.

    A file gets its name when it is whole, and one that was cut off counts as missing.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """
        Args:
            folder: for the files.
            max_bytes: of all files together.

        Raises:
            TrainingError: the folder cannot be made.
        """
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._room = max_bytes - sum(file.stat().st_size for file in folder.iterdir())

    def load(self, number: int, ids: torch.Tensor) -> torch.Tensor | None:
        """The states of a row, if they are there and of these token ids."""
        path = self._path(number)
        try:
            found = load_file(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):
            path.unlink(missing_ok=True)
            return None
        return found["hidden_states"] if torch.equal(found["token_ids"], ids) else None

    def keep(self, number: int, ids: torch.Tensor, states: torch.Tensor) -> None:
        """Write them, if there is room."""
        size = states.nbytes + ids.nbytes
        if size > self._room or shutil.disk_usage(self._folder).free < FREE_BYTES + size:
            return
        self._room -= size
        kept = {"hidden_states": states.contiguous(), "token_ids": ids}
        with (
            contextlib.suppress(OSError, SafetensorError),
            atomic.replacing(self._path(number)) as [fresh],
        ):
            save_file(kept, fresh)

    def _path(self, number: int) -> Path:
        return self._folder / f"hs_{number}.safetensors"


class StatesInMemory:
    """Hidden states in a device's memory, for as long as the process runs."""

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._states: dict[int, torch.Tensor] = {}

    def load(self, number: int, ids: torch.Tensor) -> torch.Tensor | None:
        """The states of a row, if they are there."""
        return self._states.get(number)

    def keep(self, number: int, ids: torch.Tensor, states: torch.Tensor) -> None:
        """Copy them, if there is room."""
        if states.nbytes <= self._room:
            self._room -= states.nbytes
            self._states[number] = states.clone()


class KeptStates:
    """Hidden states by number of the row: kept from before, or from the target now.

    On a CPU they are kept in files, on a GPU in its memory. Those beyond the limit, or for which
    there is no room, are computed whenever they are needed.
    """

    def __init__(
        self, folder: Path, target: Target, rows: Sequence[torch.Tensor], max_bytes: int
    ) -> None:
        """
        Args:
            folder: for the files.
            target: to make them with.
            rows: token ids by number, [num_tokens] each.
            max_bytes: of all that are kept.

        Raises:
            TrainingError: the folder cannot be made.
        """
        self._target = target
        self._rows = rows
        self.computed_tokens = 0
        self._kept: StatesInFiles | StatesInMemory
        if target.device == "cpu":
            self._kept = StatesInFiles(folder, max_bytes)
        else:
            if target.device == "cuda":
                free, _ = torch.cuda.mem_get_info()
                max_bytes = min(max_bytes, int(GPU_SHARE * free))
            self._kept = StatesInMemory(max_bytes)

    def of(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """The states of rows, those that the target runs on now in one go on a GPU.

        Returns:
            [num_tokens, num_aux + 1, hidden_size] each, on the target's device.
        """
        found = {}
        for number in numbers:
            states = self._kept.load(number, self._rows[number])
            if states is not None:
                found[number] = states
        missing = [number for number in numbers if number not in found]
        # A CPU gains nothing from running sequences together, and would compute the padding.
        together = len(missing) if self._target.device != "cpu" else 1
        for begin in range(0, len(missing), max(1, together)):
            group = missing[begin : begin + together]
            ids = [self._rows[number] for number in group]
            self.computed_tokens += sum(map(len, ids))
            made = self._target.hidden_states_of(ids)
            for number, tokens, states in zip(group, ids, made, strict=True):
                found[number] = states
                self._kept.keep(number, tokens, states)
        return [found[number] for number in numbers]
