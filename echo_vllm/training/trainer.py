# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The train stage: speculators' dataset, draft vocabulary, model, losses and trainer together.

Four things of speculators 0.9.0 are not enough here, and are subclassed:

- `Trainer` runs on an accelerator only: it moves the model to device 0 and synchronises a device
  for its timers. `HeadTrainer` also runs on a CPU. It ends after a number of hours, which
  speculators cannot, and therefore decays the learning rate by the share of the time (or of the
  steps) that is spent instead of by a schedule of steps fixed in advance.
- `SingleGPUCheckpointer` writes a checkpoint file by file into its final place, in bfloat16,
  optimizer included. A process killed meanwhile leaves one that cannot be resumed, and AdamW's step
  counter loses its low bits. `WholeCheckpointer` writes float32 into another folder and renames it.
- `ArrowDataset` waits for one row after another from a server's files, and reads each row four
  times from the disk. `RowsWithStates` holds token ids in memory and asks for the hidden states of
  a whole batch at once, which on a GPU never leave it.
- `Eagle3DraftModel` freezes the output layer at the target's rows. A head for a small target gains
  from training it, as EAGLE-3's authors do, so that `--lm-head frozen` is the exception here.

Without `--compile`, and on a CPU always, attention runs document by document (`packing`) instead of
by `flex_attention`, which would be compiled for each length, and losses by speculators' reference
implementation instead of its Triton kernels.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from safetensors import SafetensorError
from safetensors.torch import load_file
from speculators.data_generation.preprocessing import build_speculator_training_dataset
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.checkpointer import SingleGPUCheckpointer
from speculators.train.cli import create_transformer_layer_config
from speculators.train.data import BaseDataset, CollateFn
from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2
from speculators.train.trainer import Trainer, TrainerConfig
from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution
from torch.utils.data import DataLoader

from echo_vllm.training import head_files, packing
from echo_vllm.training.features import KeptStates, Target
from echo_vllm.training.rows import Row
from echo_vllm.training.targets import resolve_dtype, target_config
from echo_vllm.training.work import TrainingError, write_json, writing

WARM_UP = 0.02
FINAL_RATE = 0.05
"""Share of the time over which the learning rate rises, and what share of it is left at the end."""

FLEX_BLOCK = 128
"""Tokens of a block of `flex_attention`; speculators works in whole ones."""


@dataclass(frozen=True)
class TrainSettings:
    """What a training depends on; the same again is needed to resume it.

    Attributes:
        target: a folder or a name.
        dtype: the target's, as it will be served.
        aux_layers: auxiliary layer ids, as in vLLM.
        draft_vocab: tokens that the head can draft; all of the target's if not less. One that is
            larger than that of `init` has its tokens and more.
        ttt_steps: depth of the training-time test.
        step_decay: weight of step k of it is step_decay**k.
        loss: one of speculators' losses, or a JSON object of losses with weights.
        lm_head: whether the output layer is trained or stays the target's.
        intermediate_size: of the head's feed-forward layer; None for the target's.
        batch_tokens: tokens packed into one batch, and the longest sequence.
        learning_rate: highest.
        held_out: share of the conversations that only choose the best checkpoint.
        seed: of the head's first weights and of the order of the batches.
        init: folder of a head to begin from, or None.
    """

    target: str
    dtype: str
    aux_layers: list[int]
    draft_vocab: int
    ttt_steps: int
    step_decay: float
    loss: str
    lm_head: Literal["trained", "frozen"]
    intermediate_size: int | None
    batch_tokens: int
    learning_rate: float
    held_out: float
    seed: int
    init: str | None


@dataclass(frozen=True)
class Limits:
    """What may differ when a training is resumed.

    Attributes:
        hours: of training, after which it ends; None for no limit.
        epochs: after which it ends.
        max_steps: updates after which it ends; None for no limit.
        checkpoint_minutes: between checkpoints.
        keep_bytes: of hidden states, on the disk or in a GPU's memory.
    """

    hours: float | None
    epochs: int
    max_steps: int | None
    checkpoint_minutes: float
    keep_bytes: int = 20 << 30


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        step: updates done.
        share: of the whole that is done, 0 to 1.
        seconds: of training so far, those before an interruption included.
        tokens: of training rows seen.
        accepted: share of the held-out positions at which the target's best token was drafted at
            this and all earlier steps of the training-time test, when last measured; else empty.
        loss: held-out loss then.
    """

    step: int
    share: float
    seconds: float
    tokens: int
    accepted: list[float]
    loss: float


def split(rows: Sequence[Row], held_out: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, by whole conversations, at least one of each.

    Raises:
        TrainingError: there is only one conversation.
    """
    numbers = sorted({row.conversation for row in rows})
    if len(numbers) < 2:
        raise TrainingError(
            "the data hold one conversation, but one must be held out; give more prompts"
        )
    # Spread over the file, which may be sorted.
    count = min(len(numbers) - 1, max(1, round(held_out * len(numbers))))
    chosen = {numbers[i * len(numbers) // count] for i in range(count)}
    return (
        [row for row in rows if row.conversation not in chosen],
        [row for row in rows if row.conversation in chosen],
    )


def make_dataset(rows: Sequence[Row], settings: TrainSettings, folder: Path) -> int:
    """Write speculators' dataset and its token counts; returns how many rows are to train on.

    Raises:
        TrainingError: the folder cannot be written, or no row is left.
    """
    parts = split(rows, settings.held_out)
    with writing(folder):
        made = [
            build_speculator_training_dataset(
                Dataset.from_list(
                    [{"input_ids": r.input_ids, "loss_mask": r.loss_mask} for r in part]
                ),
                None,
                max_length=settings.batch_tokens,
                num_proc=None,
            )
            for part in parts
        ]
        if not all(len(part) for part in made):
            raise TrainingError(
                f"no answer begins within {settings.batch_tokens} tokens; raise --batch-tokens"
            )
        fresh = folder.with_name(folder.name + ".writing")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        concatenate_datasets(made).save_to_disk(fresh)
        torch.save(count_answer_tokens(parts[0], settings.batch_tokens), fresh / "token_freq.pt")
        write_json(fresh / "split.json", {"train": len(made[0]), "held_out": len(made[1])})
        fresh.replace(folder)
    return len(made[0])


def count_answer_tokens(rows: Sequence[Row], longest: int) -> dict[int, int]:
    """How often answers have each token, as speculators counts it, which takes a minute for 20 M.

    Args:
        rows: of which only the first `longest` tokens are trained on.
        longest: tokens of a row.
    """
    found = [
        np.array(row.input_ids[:longest])[np.array(row.loss_mask[:longest], dtype=bool)]
        for row in rows
    ]
    counts = np.bincount(np.concatenate(found))
    return {int(token): int(counts[token]) for token in counts.nonzero()[0]}


def make_model(settings: TrainSettings, token_counts: dict[int, int] | None) -> Eagle3DraftModel:
    """speculators' model of the head, with its first weights.

    Args:
        settings: of the training.
        token_counts: of the answers' tokens, for the draft vocabulary; not needed with `init`, if
            that of `init` is kept.

    Raises:
        TrainingError: the target's config does not do, or `init` does not fit it.
    """
    torch.manual_seed(settings.seed)
    # A file of its own names the output layer "lm_head.weight" in tied targets too; a warning says
    # so for each of them.
    logging.getLogger("speculators").setLevel(logging.ERROR)
    _quiet_loguru()
    try:
        layer = create_transformer_layer_config(
            settings.target,
            num_layers=1,
            draft_arch="llama",
            hidden_act=None,
            sliding_window=0,
            full_attention_indices=[0],
        )
    except Exception as error:
        raise TrainingError(
            f"TARGET {settings.target} has no config that a head can be made for "
            f"({str(error).strip().splitlines()[0]}); Llama and Qwen3 are known to work"
        ) from None
    tensors: dict[str, torch.Tensor] = {}
    draft_vocab = min(settings.draft_vocab, layer.vocab_size)
    if settings.init is not None:
        tensors = head_files.read_weights(Path(settings.init))
        config = head_files.read_config(Path(settings.init))
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            setattr(layer, name, config[name])
        known_vocab = head_files.draft_vocab_of(config)
        if draft_vocab < known_vocab:
            raise TrainingError(
                f"--draft-vocab {draft_vocab} is smaller than that of --init {settings.init}; give "
                f"{known_vocab} to keep it, or more"
            )
        width = settings.intermediate_size or layer.intermediate_size
        if width != layer.intermediate_size:
            raise TrainingError(
                f"--intermediate-size {width} is not that of --init {settings.init}; give "
                f"{layer.intermediate_size}, or train without --init"
            )
    elif settings.intermediate_size is not None:
        layer.intermediate_size = settings.intermediate_size
    maps = {}
    grows = "t2d" in tensors and known_vocab < draft_vocab
    if draft_vocab < layer.vocab_size:
        if grows:
            d2t, t2d = head_files.larger_vocabulary(tensors["t2d"], token_counts or {}, draft_vocab)
        elif "d2t" in tensors:
            d2t, t2d = tensors["d2t"], tensors["t2d"]
        else:
            d2t, t2d = build_vocab_mappings_from_distribution(
                token_counts or {}, draft_vocab, layer.vocab_size
            )
        maps = {"d2t": d2t, "t2d": t2d}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Eagle3DraftModel.from_training_args(
            layer,
            **maps,
            draft_vocab_size=draft_vocab,
            norm_before_residual=False,
            ttt_steps=settings.ttt_steps,
            verifier_name_or_path=settings.target,
            target_layer_ids=settings.aux_layers,
            draft_attn_impl="simple_flex_attention" if compiles() else packing.NAME,
        ).float()
    # Otherwise speculators makes its mask over all pairs of positions.
    model.uses_full_attn = compiles()
    if tensors:
        if grows:
            known = tensors["t2d"][maps["t2d"]] if maps else tensors["t2d"]
            tensors["lm_head.weight"] = head_files.larger_output_layer(
                tensors["lm_head.weight"], model.verifier_lm_head.weight.detach(), known
            )
        tensors |= maps
        head_files.load_weights(model, tensors, f"--init {settings.init}")
    model.lm_head.weight.requires_grad_(settings.lm_head == "trained")
    return model


def compiles() -> bool:
    """Whether speculators compiles the model of the head: on a GPU, unless PyTorch may not."""
    return torch.cuda.is_available() and os.environ.get("TORCHDYNAMO_DISABLE", "0") != "1"


def _quiet_loguru() -> None:
    from loguru import logger

    logger.disable("speculators")


class WholeCheckpointer(SingleGPUCheckpointer):  # type: ignore[misc]
    """Checkpoints that are there whole or not at all, in float32, the last one only."""

    WRITING = "writing"
    OLD = "old"

    def __init__(self, path: Path) -> None:
        # A process killed between the two renames of `publish`.
        old = path / self.OLD
        if old.is_dir() and not any(child.name.isdigit() for child in path.iterdir()):
            state = json.loads((old / "training_state.json").read_text(encoding="utf-8"))
            old.replace(path / str(state["epoch"]))
        super().__init__(path)

    def publish(self, epoch: int) -> None:
        """Put the folder `writing` in the place of all checkpoints."""
        shutil.rmtree(self.path / self.OLD, ignore_errors=True)
        for child in self.path.iterdir():
            if child.name.isdigit():
                child.replace(self.path / self.OLD)
        (self.path / self.WRITING).replace(self.path / str(epoch))
        shutil.rmtree(self.path / self.OLD, ignore_errors=True)

    def load_model_state_dict(self, model: Any, float_dtype: torch.dtype | None = None) -> None:
        tensors = load_file(self.model_path(self.previous_epoch))
        model.load_state_dict(tensors, strict=False)

    def load_optimizer_state_dict(
        self, model: Any, optimizer: Any, float_dtype: torch.dtype | None = None
    ) -> None:
        states = torch.load(
            self.optimizer_path(self.previous_epoch), weights_only=True, map_location="cpu"
        )
        for one, state in zip(optimizer, [states], strict=True):
            one.load_state_dict(state)


class RowsWithStates(BaseDataset):  # type: ignore[misc]
    """Some of the rows, each with its hidden states, which are asked for by the batch."""

    def __init__(
        self,
        rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
        first: int,
        states: KeptStates,
        max_len: int,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            rows: input_ids and loss_mask, [num_tokens] each.
            first: number of the first of them, by which `states` knows it.
            states: of all rows.
            max_len: tokens of a batch.
            dtype: of the hidden states that the model reads.
        """
        self._rows = rows
        self._first = first
        self._states = states
        self._batch: dict[int, torch.Tensor] = {}
        self.tokens_given = 0
        super().__init__(max_len, dtype)

    def __len__(self) -> int:
        return len(self._rows)

    def _compute_approx_lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self._rows]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """PyTorch's loader prefers this to `__getitem__`."""
        places = [int(index) for index in indices]
        states = self._states.of([self._first + place for place in places])
        self._batch = dict(zip(places, states, strict=True))
        items = [self[place] for place in places]
        self._batch.clear()
        # `shift_batch` drops one position of each.
        self.tokens_given += sum(len(states) - 1 for states in states)
        return items

    def _get_raw_data(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self._rows[index]
        states = self._batch[index]
        return {
            "hidden_states": states[:, :-1].flatten(1),
            "input_ids": ids,
            "verifier_last_hidden_states": states[:, -1],
            "loss_mask": mask,
        }


class CollateWithPacking(CollateFn):  # type: ignore[misc]
    """speculators' batches, each with the packing that attention by document reads."""

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__call__(items)
        documents = batch["document_ids"][0]
        lengths = torch.bincount(documents[documents >= 0]).tolist()
        device = batch["hidden_states"].device
        batch["packing"] = packing.Packing.of(lengths, device) if lengths else None
        return batch


def make_loaders(
    folder: Path, target: Target, settings: TrainSettings, keep_bytes: int, dtype: torch.dtype
) -> tuple[tuple[Any, Any], KeptStates]:
    """Loaders of the training rows and of those held out, and the hidden states behind both.

    Args:
        folder: with the dataset of `make_dataset`, for the files of hidden states.
        target: to make them with.
        settings: of the training.
        keep_bytes: of hidden states, on the disk or in a GPU's memory.
        dtype: of those that the model reads.
    """
    parts = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    columns = load_from_disk(folder).with_format("torch")[:]
    rows = list(zip(columns["input_ids"], columns["loss_mask"], strict=True))
    states = KeptStates(folder / "hidden_states", target, [ids for ids, _ in rows], keep_bytes)
    limit = settings.batch_tokens

    def loader(begin: int, end: int, seed: int) -> Any:
        dataset = RowsWithStates(rows[begin:end], begin, states, limit, dtype)
        return DataLoader(
            dataset,
            batch_sampler=MultipackDistributedBatchSamplerV2(
                batch_max_length=limit,
                lengths=dataset.approx_lengths,
                num_replicas=1,
                rank=0,
                seed=seed,
            ),
            collate_fn=(CollateFn if compiles() else CollateWithPacking)(
                limit,
                target.hidden_size,
                num_target_layers=len(settings.aux_layers),
                dtype=dtype,
                preprocess=shift_batch,
            ),
        )

    train = loader(0, parts["train"], settings.seed)
    # In one order, so that checkpoints are judged by the same batches.
    held_out = loader(parts["train"], len(rows), 0)
    return (train, held_out), states


class TimeIsUp(Exception):
    """Ends speculators' loop over the batches."""


class HeadTrainer(Trainer):  # type: ignore[misc]
    """speculators' trainer, also on a CPU, with an end in time and whole checkpoints."""

    def __init__(
        self,
        model: Eagle3DraftModel,
        config: TrainerConfig,
        loaders: Sequence[Any],
        limits: Limits,
        on_progress: Callable[[Progress], None],
        on_best: Callable[[Progress], None],
        *,
        judge_first: bool,
    ) -> None:
        """
        Args:
            model: of the head.
            config: of speculators' trainer.
            loaders: of the training rows and of those held out.
            limits: when it ends.
            on_progress: called after each update.
            on_best: called when the held-out loss is the lowest so far, with the weights in place.
            judge_first: whether the weights to begin with may be the best.
        """
        self.limits = limits
        self._judge_first = judge_first
        self._on_progress = on_progress
        self._on_best = on_best
        self.seconds = 0.0
        self._tokens_before = 0
        self.accepted: list[float] = []
        self.loss = math.nan
        self._epoch = self._local_step = 0
        super().__init__(model, config, *loaders)
        self._total_steps = config.num_epochs * len(self.train_loader)
        if limits.max_steps is not None:
            self._total_steps = min(self._total_steps, limits.max_steps)
        self.interrupted = False
        self._compiled = not compiles()
        self._set_rate()

    # --- what speculators calls ---

    def setup_trainer(self) -> None:
        self.rank = -1  # Rank 0 draws bars; the command has a progress line of its own.
        # A CUDA build of torch names one even where there is none.
        if not torch.accelerator.is_available():
            self.local_rank = torch.device("cpu")
            self.device_type = "cpu"
        self.checkpointer: Any = WholeCheckpointer(Path(self.config.save_path))
        super().setup_trainer()
        state = self._load_training_state() if self.resume_from_checkpoint else {}
        self.seconds = state.get("seconds", 0.0)
        self._tokens_before = state.get("tokens", 0)
        self.accepted = state.get("accepted", [])
        self.loss = state.get("loss", math.nan)
        self.best = Progress(**state["best"]) if state.get("best") else None
        if self.best is not None:
            self.best_val_loss = self.best.loss

    def train_epoch(self, epoch: int, *, step_callback: Callable[[], None] | None = None) -> None:
        self._epoch = epoch
        self._local_step = self._resume_local_step if epoch == self.current_epoch else 0
        self._lap = self._last_checkpoint = time.monotonic()
        super().train_epoch(epoch, step_callback=self._after_step)

    def maybe_save_checkpoint(self, epoch: int | str, local_step: int = 0) -> None:
        # From speculators' handler of Ctrl-C; the batch that it broke is done again. At the end of
        # an epoch `maybe_update_best` saves.
        if epoch == "interrupted":
            self.interrupted = True
            self._save(self._local_step)

    def maybe_update_best(self, epoch: int, val_metrics: dict[str, float] | None) -> None:
        self._judge(val_metrics)
        self._save(0)

    # --- our own ---

    @property
    def tokens(self) -> int:
        """Of training rows seen."""
        return int(self._tokens_before + self.train_loader.dataset.tokens_given)

    def progress(self) -> Progress:
        """Where the training stands."""
        return Progress(
            step=self.global_step,
            share=self._share(),
            seconds=self.seconds,
            tokens=self.tokens,
            accepted=self.accepted,
            loss=self.loss,
        )

    def run(self) -> None:
        """Train to the end; the best weights have gone to `on_best` when this returns."""
        if self._share() >= 1:
            return
        try:
            if self.best is None and self._judge_first:
                self._judge(self.val_epoch(0))
            self.run_training()
        except TimeIsUp:
            self._judge(self.val_epoch(self._epoch))
            self._save(self._local_step)

    def _share(self) -> float:
        share = float(self.global_step / self._total_steps)
        if self.limits.hours is not None:
            share = max(share, self.seconds / (3600 * self.limits.hours))
        return min(share, 1.0)

    def _set_rate(self) -> None:
        share = self._share()
        if share < WARM_UP:
            factor = max(share, 1 / self._total_steps) / WARM_UP
        else:
            cosine = (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2
            factor = FINAL_RATE + (1 - FINAL_RATE) * cosine
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * min(factor, 1.0)

    def _after_step(self) -> None:
        now = time.monotonic()
        if self._compiled:  # The first update takes as long as a minute of others.
            self.seconds += now - self._lap
        self._compiled = True
        self._lap = now
        self._local_step += 1
        self._set_rate()
        self._on_progress(self.progress())
        if self._share() >= 1:
            raise TimeIsUp
        if now - self._last_checkpoint >= 60 * self.limits.checkpoint_minutes:
            self._judge(self.val_epoch(self._epoch))
            self.model.train()
            self._save(self._local_step)
            self._lap = self._last_checkpoint = time.monotonic()

    def _judge(self, metrics: dict[str, float] | None) -> None:
        assert metrics is not None
        self.loss = metrics["loss_epoch"]
        steps = self.config.val_call_kwargs["ttt_steps"]
        self.accepted = [metrics[f"full_acc_{step}_epoch"] for step in range(steps)]
        if self.loss < self.best_val_loss:
            self.best_val_loss = self.loss
            self.best = self.progress()
            self._on_best(self.best)

    def _save(self, local_step: int) -> None:
        """A whole checkpoint; `local_step` 0 means that the epoch is done."""
        fresh = self.checkpointer.path / WholeCheckpointer.WRITING
        # The last two are how safetensors and torch report a full disk.
        with writing(fresh, SafetensorError, RuntimeError):
            shutil.rmtree(fresh, ignore_errors=True)
            self.checkpointer.save_checkpoint(
                self.model, self.optimizers, WholeCheckpointer.WRITING, torch.float32
            )
            write_json(
                fresh / "training_state.json",
                {
                    "epoch": self._epoch,
                    "local_step": local_step,
                    "global_step": self.global_step,
                    "seconds": self.seconds,
                    "tokens": self.tokens,
                    "accepted": self.accepted,
                    "loss": self.loss,
                    "best": None if self.best is None else asdict(self.best),
                },
            )
            self.checkpointer.publish(self._epoch)


@dataclass(frozen=True)
class Trained:
    """What a training came to: where it stands, and facts about its data."""

    progress: Progress
    best: Progress | None
    interrupted: bool
    train_rows: int
    held_out_rows: int
    computed_tokens: int


def train(
    settings: TrainSettings,
    limits: Limits,
    rows: Sequence[Row],
    folders: tuple[Path, Path],
    head_folder: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train a head, from the last checkpoint if there is one; the best goes to its folder.

    Args:
        settings: as in an interrupted training, if this is to continue one.
        limits: when it ends.
        rows: of the data stage.
        folders: for the dataset with the hidden states, and for checkpoints.
        head_folder: for the head; written whenever the held-out loss is the lowest so far.
        on_progress: called after every update.

    Raises:
        TrainingError: the target, the data or the folders do not do.
    """
    # Of torch.autocast, which has nothing to do in float32, and of pinning memory for no GPU.
    warnings.filterwarnings("ignore", message=".*(autocast|pin_memory|layer IDs|target_layer).*")
    if compiles() and settings.batch_tokens % FLEX_BLOCK:
        more = (settings.batch_tokens // FLEX_BLOCK + 1) * FLEX_BLOCK
        raise TrainingError(
            f"--batch-tokens {settings.batch_tokens} is not a multiple of {FLEX_BLOCK}, which it "
            f"must be on a GPU; give {more}"
        )
    dataset_folder, checkpoints = folders
    if not (dataset_folder / "split.json").is_file():
        make_dataset(rows, settings, dataset_folder)
    on_gpu = torch.cuda.is_available()
    dtype = getattr(torch, settings.dtype)
    target = Target(settings.target, settings.aux_layers, dtype, "cuda" if on_gpu else "cpu")
    reads = torch.bfloat16 if on_gpu else torch.float32
    loaders, states = make_loaders(dataset_folder, target, settings, limits.keep_bytes, reads)
    counts = torch.load(dataset_folder / "token_freq.pt", weights_only=True)
    model = make_model(settings, counts)
    config = target_config(settings.target)
    try:
        train_kwargs, val_kwargs = Eagle3DraftModel.get_trainer_kwargs(
            loss_fn=settings.loss,
            loss_implementation="fused" if compiles() else "eager",
            ttt_steps=settings.ttt_steps,
            ttt_step_loss_decay=settings.step_decay,
        )
    except ValueError as error:
        raise TrainingError(f"--loss {settings.loss}: {error}") from None
    trainer_config = TrainerConfig(
        lr=settings.learning_rate,
        num_epochs=limits.epochs,
        save_path=str(checkpoints),
        resume_from_checkpoint=True,
        train_call_kwargs=train_kwargs,
        val_call_kwargs=val_kwargs,
        scheduler_type="none",
        # Weights and their gradients are float32 on every device.
        hidden_states_dtype=reads,
        log_freq=math.nan,  # No step is a multiple: its timers need an accelerator.
    )
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")}

    def keep(progress: Progress) -> None:
        head_files.export_head(
            model,
            head_folder,
            dtype=getattr(torch, resolve_dtype(settings.target, "auto")),
            bos_and_eos={name: value for name, value in ids.items() if isinstance(value, int)},
        )

    trainer = HeadTrainer(
        model,
        trainer_config,
        loaders,
        limits,
        on_progress,
        keep,
        judge_first=settings.init is not None,
    )
    trainer.run()
    return Trained(
        progress=trainer.progress(),
        best=trainer.best,
        interrupted=trainer.interrupted,
        train_rows=len(loaders[0].dataset),
        held_out_rows=len(loaders[1].dataset),
        computed_tokens=states.computed_tokens,
    )
