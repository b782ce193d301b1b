# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm train-drafter`: makes an EAGLE-3 head for a target, in three stages.

`train-drafter TARGET -o HEAD` runs `data`, `train` and `eval` one after another, each in a process
of its own, because an engine and a training want the whole machine; each is also a sub-command.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from echo_vllm import VLLM_VERSION
from echo_vllm.cli.console import (
    Target,
    counting,
    fail,
    last_line,
    located,
    note,
    numbers,
    refusing,
    say,
)
from echo_vllm.conversations import Chat, PromptError, read_conversations
from echo_vllm.offline.engine import LocalEngine
from echo_vllm.training.work import TrainingError, Work, read_json, write_json

EVERYTHING = "all"
SPECULATORS = "0.9.0"
_refusing = functools.partial(refusing, TrainingError, PromptError, status=1)


class _StagesOrAll(TyperGroup):
    """`train-drafter TARGET ...` means `train-drafter all TARGET ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [EVERYTHING, *args]
        return super().parse_args(ctx, args)


train_drafter_app = typer.Typer(
    cls=_StagesOrAll,
    no_args_is_help=True,
    help="Make an EAGLE-3 head for a target: TARGET -o HEAD runs data, train and eval.",
)

Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Folder of the head; HEAD.work beside it is kept for resuming."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")]
Prompts = Annotated[
    list[Path] | None,
    typer.Option(help="JSON lines with 'prompt' or 'turns'; may be given several times."),
]
SelfPrompts = Annotated[
    int, typer.Option(min=0, help="Prompts that the target writes itself.", show_default=True)
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
PromptTokens = Annotated[int, typer.Option(min=4, help="Tokens of a self-written prompt at most.")]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(help="A file with a Jinja template.", show_default="the tokenizer's own"),
]
Dtype = Annotated[str, typer.Option(help="Of the target, as it will be served.")]
MaxModelLen = Annotated[
    int | None, typer.Option(min=16, help="As in vLLM.", show_default="the target's own")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at once.")]
EngineArgs = Annotated[
    str | None,
    typer.Option(
        help="""More of vLLM's engine arguments, a JSON object like {"tensor_parallel_size": 2}.""",
        show_default="none",
    ),
]
Seed = Annotated[int, typer.Option(help="Of sampling, first weights and order.")]
Hours = Annotated[
    float | None, typer.Option(min=0.001, help="Hours of training.", show_default="no limit")
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the data at most.")]
MaxSteps = Annotated[
    int | None, typer.Option(min=1, help="Updates at most.", show_default="no limit")
]
Init = Annotated[Path | None, typer.Option(help="A head to begin from.", show_default="none")]
AuxLayers = Annotated[
    str | None,
    typer.Option(
        help="Layers of the target that the head reads, like 2,15,27.",
        show_default="2, n/2, n-3 of n layers, as vLLM",
    ),
]
DraftVocab = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens that the head can draft; more than --init's are added to its own.",
        show_default="32000, or --init's",
    ),
]
TttSteps = Annotated[int, typer.Option(min=1, max=16, help="Depth of the training-time test.")]
StepDecay = Annotated[float, typer.Option(min=0, max=1, help="Step k of it weighs this to the k.")]
Loss = Annotated[str, typer.Option(help="One of speculators' losses, or a JSON object of weights.")]
LmHead = Annotated[str, typer.Option(help="The output layer: trained, or frozen at the target's.")]
Intermediate = Annotated[
    int | None,
    typer.Option(min=1, help="Width of its feed-forward layer.", show_default="the target's"),
]
BatchTokens = Annotated[int, typer.Option(min=16, help="Tokens of a batch, and the longest row.")]
LearningRate = Annotated[float, typer.Option(min=0, help="Highest learning rate.")]
HeldOut = Annotated[
    float, typer.Option(min=0.001, max=0.5, help="Share of conversations that choose the best.")
]
CheckpointMinutes = Annotated[float, typer.Option(min=0, help="Between checkpoints.")]
KeepGb = Annotated[
    float, typer.Option(min=0, help="Gigabytes of hidden states kept for later epochs.")
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="On a GPU: compile the head's model first, which takes minutes. Not proven yet.",
    ),
]
EvalPrompts = Annotated[
    list[str] | None,
    typer.Option(help="NAME=FILE of prompts that training never saw; may be given several times."),
]
NumPrompts = Annotated[
    int | None, typer.Option(min=1, help="Prompts of each set.", show_default="all")
]
Chains = Annotated[str, typer.Option(help="Lengths of chains.")]
Trees = Annotated[str, typer.Option(help="Nodes of trees; empty for none.")]
Temperatures = Annotated[str, typer.Option(help="Sampling temperatures.")]


@train_drafter_app.command(EVERYTHING, hidden=True)
def everything(
    context: typer.Context,
    target: Target,
    output: Output,
    prompts: Prompts = None,
    self_prompts: SelfPrompts = 0,
    hours: Hours = None,
    epochs: Epochs = 10,
    init: Init = None,
    aux_layers: AuxLayers = None,
    draft_vocab: DraftVocab = None,
    ttt_steps: TttSteps = 3,
    max_tokens: MaxTokens = 512,
    max_model_len: MaxModelLen = None,
    dtype: Dtype = "auto",
    chat_template: ChatTemplate = None,
    eval_prompts: EvalPrompts = None,
    resume: Resume = False,
) -> None:
    """Data, train and eval. What else they take is set by running them one by one."""

    def words(*names: str) -> list[str]:
        """The options of these names as they were given."""
        found = []
        for name in names:
            value = context.params[name]
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    found += [f"--{name.replace('_', '-')}", str(one)]
        return found

    common = [target, "-o", str(output), *words("dtype")]
    engine = words("max_model_len", "chat_template")
    begin = words("hours", "init", "aux_layers", "draft_vocab", "epochs", "ttt_steps")
    stages = [
        ["data", *common, *engine, *words("prompts", "self_prompts", "max_tokens")],
        ["train", *common, *begin],
    ]
    if eval_prompts:
        stages.append(["eval", *common, *engine, *words("eval_prompts")])
    else:
        note("note: without --eval-prompts NAME=FILE the head is not evaluated")
    for stage in stages:
        note(f"--- {stage[0]}")
        more = ["--resume"] if resume and stage[0] != "eval" else []
        code = subprocess.call(
            [sys.executable, "-m", "echo_vllm.cli", "train-drafter", *stage, *more]
        )
        if code:
            raise typer.Exit(code)


@train_drafter_app.command()
def data(
    target: Target,
    output: Output,
    prompts: Prompts = None,
    self_prompts: SelfPrompts = 0,
    rows: Annotated[
        Path | None,
        typer.Option(help="Answers that exist: JSON lines with input_ids and loss_mask."),
    ] = None,
    prompt_tokens: PromptTokens = 128,
    max_tokens: MaxTokens = 512,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    concurrency: Concurrency = 32,
    engine_args: EngineArgs = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Let the target answer prompts; the answers are what a head is trained on."""
    from echo_vllm.training.data import DataSettings, check_plan, make_data

    if rows is None and not prompts and not self_prompts:
        fail("there is nothing to answer: give --prompts FILE, or --self-prompts N")
    if rows is not None and (prompts or self_prompts):
        fail("--rows takes the place of answering; leave out --prompts and --self-prompts")
    target, work = located(target), Work(output.absolute())
    more = _engine_args(engine_args)
    if work.data.is_file():
        if not resume:
            fail(f"{work.folder} holds data already; go on with --resume, or remove that folder")
        note(f"note: {work.rows} is whole")
        return
    with _refusing():
        if rows is not None:
            _take_rows(rows, target, work)
            return
        read_conversations(*prompts or [])  # Before a minute goes into loading the target.
        chat = Chat(target, chat_template)
        settings = DataSettings(
            target=target,
            dtype=dtype,
            prompts=[str(path.absolute()) for path in prompts or []],
            self_prompts=self_prompts,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            chat_template=None if chat_template is None else str(chat_template.absolute()),
            max_model_len=max_model_len,
            seed=seed,
        )
        work.make()
        check_plan(work.data_plan, asdict(settings), resume=resume)
        with counting("answers") as progress, ExitStack() as engines:
            task = progress.add_task("starting the engine", total=None)

            def show(what: str, done: int, total: int) -> None:
                progress.update(task, description=what, completed=done, total=total)

            facts = make_data(
                settings,
                work,
                chat,
                lambda: engines.enter_context(
                    _engine(target, dtype, max_model_len, concurrency, more)
                ),
                show,
            )
    note(
        f"Wrote {work.rows}: {facts['rows']} answers, {facts['answer_tokens']} tokens; "
        f"{facts['repeated_prompts']} repeated prompts left out, "
        f"{facts['too_long_prompts']} too long"
    )


def _engine_args(text: str | None) -> dict[str, Any]:
    """What `--engine-args` says; the names are vLLM's to check."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        fail(f"--engine-args is not JSON ({error.msg}): {text}")
    if not isinstance(found, dict):
        fail(f'--engine-args must be a JSON object like {{"tensor_parallel_size": 2}}, got {text}')
    return found


def _engine(
    target: str, dtype: str, max_model_len: int | None, concurrency: int, more: dict[str, Any]
) -> LocalEngine:
    options = {"dtype": dtype, "max_model_len": max_model_len, "max_num_seqs": concurrency}
    try:
        return LocalEngine(target, **options | more)
    except TypeError as error:
        raise TrainingError(f"--engine-args: {last_line(error)}") from None
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise TrainingError(
            f"TARGET {target} does not load in vLLM ({last_line(error)}); give a folder or a name "
            "of a whole model, and a --max-model-len for which its KV cache has room"
        ) from None


def _take_rows(source: Path, target: str, work: Work) -> None:
    """Rows that were answered elsewhere, checked and copied."""
    from echo_vllm.training.rows import RowWriter, read_rows

    found = read_rows(source)
    work.make()
    work.rows.with_name(work.rows.name + ".partial").unlink(missing_ok=True)
    writer = RowWriter(work.rows)
    for row in found:
        writer.append(row)
    writer.finish()
    write_json(
        work.data,
        {
            "target": target,
            "source": source.name,
            "rows": len(found),
            "conversations": len({row.conversation for row in found}),
            "tokens": sum(len(row.input_ids) for row in found),
            "answer_tokens": sum(sum(row.loss_mask) for row in found),
        },
    )
    note(f"Wrote {work.rows}: {len(found)} answers")


@train_drafter_app.command()
def train(
    target: Target,
    output: Output,
    hours: Hours = None,
    epochs: Epochs = 10,
    max_steps: MaxSteps = None,
    init: Init = None,
    aux_layers: AuxLayers = None,
    draft_vocab: DraftVocab = None,
    ttt_steps: TttSteps = 3,
    step_decay: StepDecay = 0.8,
    loss: Loss = "kl_div",
    lm_head: LmHead = "trained",
    intermediate_size: Intermediate = None,
    batch_tokens: BatchTokens = 2048,
    learning_rate: LearningRate = 3e-4,
    held_out: HeldOut = 0.05,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    keep_gb: KeepGb = 20.0,
    compile_model: Compile = False,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train a head on the answers; the best of the checkpoints becomes HEAD."""
    _need_speculators()
    if lm_head not in ("trained", "frozen"):
        fail(f"--lm-head must be trained or frozen, got {lm_head}")
    # The command has a progress line of its own.
    os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    if not compile_model:  # What speculators would do by itself on a GPU; torch reads it once.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if Path(target).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from echo_vllm.training.card import add_facts
    from echo_vllm.training.data import check_plan
    from echo_vllm.training.rows import read_rows
    from echo_vllm.training.targets import resolve_dtype, resolve_layers

    target, work = located(target), Work(output.absolute())
    with _refusing():
        layers = _layers(target, aux_layers, init, resolve_layers)
        data = read_json(work.data)
        if data is None:
            fail(f"{work.folder} holds no whole data; run echo-vllm train-drafter data first")
        if data.get("target") != target:
            fail(f"TARGET is {target}, but the data in {work.folder} are from {data.get('target')}")
        dtype = resolve_dtype(target, dtype)
        from echo_vllm.training.trainer import Limits, TrainSettings, train

        settings = TrainSettings(
            target=target,
            dtype=dtype,
            aux_layers=layers,
            draft_vocab=_draft_vocab(draft_vocab, init),
            ttt_steps=ttt_steps,
            step_decay=step_decay,
            loss=loss,
            lm_head="trained" if lm_head == "trained" else "frozen",
            intermediate_size=intermediate_size,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            held_out=held_out,
            seed=seed,
            init=None if init is None else str(init.absolute()),
        )
        check_plan(work.train_plan, asdict(settings), resume=resume)
        limits = Limits(hours, epochs, max_steps, checkpoint_minutes, int(keep_gb * 1e9))
        begin = time.monotonic()
        trained = train(
            settings,
            limits,
            read_rows(work.rows),
            (work.dataset, work.checkpoints),
            output,
            _progress_line(),
        )
        if trained.interrupted:
            fail(f"interrupted after update {trained.progress.step}; go on with --resume", 130)
        progress = trained.progress
        facts: dict[str, Any] = {
            "target": Path(target).name,
            "command": _command(),
            "library": f"speculators {SPECULATORS}",
            "trained_at": time.strftime("%Y-%m-%d"),
            "updates": progress.step,
            "train_seconds": round(progress.seconds, 1),
            "train_tokens": progress.tokens,
            "train_rows": trained.train_rows,
            "held_out_rows": trained.held_out_rows,
            "data": data,
            "settings": asdict(settings),
        }
        if trained.best is not None:
            facts |= {
                "best_update": trained.best.step,
                "held_out_loss": trained.best.loss,
                "held_out_accepted_per_step": trained.best.accepted,
            }
        add_facts(output, **facts)
    rate = progress.tokens / max(progress.seconds, 1e-9)
    note(
        f"Wrote {output}: {progress.step} updates, {progress.tokens} tokens in "
        f"{progress.seconds:.0f} s of training ({rate:.0f} tokens/s), "
        f"{time.monotonic() - begin:.0f} s in all"
    )


def _layers(
    target: str, wanted: str | None, init: Path | None, resolve: Callable[..., list[int]]
) -> list[int]:
    if wanted is None and init is not None:
        from echo_vllm.training.head_files import read_config

        return resolve(target, read_config(init).get("eagle_aux_hidden_state_layer_ids"))
    return resolve(target, None if wanted is None else numbers("--aux-layers", wanted, int, 0))


def _draft_vocab(wanted: int | None, init: Path | None) -> int:
    if wanted is None and init is not None:
        from echo_vllm.training.head_files import draft_vocab_of, read_config

        return draft_vocab_of(read_config(init))
    return 32000 if wanted is None else wanted


def _progress_line() -> Callable[[Any], None]:
    """Prints at most every few seconds where the training stands, with the time left."""
    last = 0.0
    begun: tuple[float, float] | None = None

    def show(progress: Any) -> None:
        nonlocal last, begun
        now = time.monotonic()
        if begun is None:
            begun = (now, progress.share)
        if now - last < 5 and progress.share < 1:
            return
        last = now
        gone, done = now - begun[0], progress.share - begun[1]
        left = f"{(1 - progress.share) * gone / done / 60:.1f} min left" if done > 0 else "..."
        length = 1 + sum(progress.accepted)
        held_out = f"{length:.3f}" if progress.accepted else "not measured yet"
        note(
            f"update {progress.step}, {100 * progress.share:.1f} %, {left}; "
            f"held-out acceptance length {held_out}"
        )

    return show


@train_drafter_app.command("eval")
def evaluate(
    target: Target,
    output: Output,
    eval_prompts: EvalPrompts = None,
    num_prompts: NumPrompts = None,
    max_tokens: MaxTokens = 128,
    chains: Chains = "1,2,3,4,5",
    trees: Trees = "16,32",
    temperatures: Temperatures = "0,1",
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    concurrency: Concurrency = 8,
    engine_args: EngineArgs = None,
    append: Annotated[
        bool, typer.Option("--append", help="Keep the runs that are there, and add to them.")
    ] = False,
) -> None:
    """Count in the real engine how many draft tokens are accepted."""
    from echo_vllm.offline.acceptance_run import chain_of, measure, tree_of
    from echo_vllm.training.card import FILE_NAME, add_facts, evaluation_rows
    from echo_vllm.training.head_files import draft_vocabulary

    if not eval_prompts:
        fail("--eval-prompts is missing; give NAME=FILE, such as mt-bench=mt_bench.jsonl")
    target, head = located(target), str(output.absolute())
    vocabulary = draft_vocabulary(output)
    more = _engine_args(engine_args)
    lengths = numbers("--chains", chains, int, 1)
    ways = {f"chain of {k}, vLLM's eagle3": chain_of(head, k, "eagle3") for k in lengths}
    ways |= {f"chain of {k}": chain_of(head, k, "echo") for k in lengths[-1:]}
    sizes = numbers("--trees", trees, int, 1) if trees else ()
    ways |= {f"tree of {n}": tree_of(head, n) for n in sizes}
    with _refusing():
        chat = Chat(target, chat_template)
        sets = {}
        for text in eval_prompts:
            name, equals, file = text.partition("=")
            if not equals:
                fail(f"--eval-prompts must be NAME=FILE, got {text}")
            conversations = _spread(read_conversations(Path(file)), num_prompts)
            sets[name] = [chat.encode(turns[:1]) for turns in conversations]
        values = numbers("--temperatures", temperatures, float, 0)
        total = len(ways) * len(sets) * len(values)
        before = (read_json(output / FILE_NAME) or {}).get("evaluation") if append else None
        runs: list[dict[str, Any]] = list(before["runs"]) if before else []
        with counting("runs") as progress:
            task = progress.add_task("", total=total)
            for way, speculation in ways.items():
                progress.update(task, description=way)
                try:
                    counted = measure(
                        target,
                        speculation,
                        sets,
                        values,
                        max_tokens=max_tokens,
                        dtype=dtype,
                        max_model_len=max_model_len,
                        concurrency=concurrency,
                        engine_args=more,
                        on_set=lambda: progress.advance(task),
                    )
                except (ValueError, OSError, RuntimeError, TypeError) as error:
                    raise TrainingError(
                        f"the engine does not run {way} with head {output}: {last_line(error)}"
                    ) from None
                runs += [
                    {
                        "drafts": way,
                        "prompts": name,
                        "num_prompts": len(sets[name]),
                        "temperature": temperature,
                        "steps": found.drafts,
                        "tokens": found.tokens,
                        "in_draft_vocabulary": None
                        if vocabulary is None
                        else found.share_of(vocabulary),
                        "acceptance_length": found.length,
                        "accepted_per_position": found.per_position,
                    }
                    for (name, temperature), found in counted.items()
                ]
                evaluation = {
                    "engine": f"vLLM {VLLM_VERSION}, eager mode",
                    "dtype": f"dtype {dtype}",
                    "max_tokens": max_tokens,
                    "evaluated_at": time.strftime("%Y-%m-%d"),
                    "command": _command(),
                    "runs": runs,
                }
                add_facts(output, evaluation=evaluation)
    for row in evaluation_rows(runs):
        say("  ".join(row))
    note(f"Wrote {output / FILE_NAME}, and the card beside it if it is this command's own")


def _spread(conversations: list[list[str]], count: int | None) -> list[list[str]]:
    """So many, evenly from the whole file, which may be sorted."""
    if count is None or count >= len(conversations):
        return conversations
    return [conversations[i * len(conversations) // count] for i in range(count)]


def _command() -> str:
    return shlex.join(["echo-vllm", *sys.argv[1:]])


def _need_speculators() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("speculators")
    except PackageNotFoundError:
        fail(
            f"speculators {SPECULATORS} is not installed, which trains the head; run `make "
            "train-setup` (docs/drafter.md has the command without make)"
        )
    if found != SPECULATORS:
        fail(
            f"speculators {found} is installed, but {SPECULATORS} is needed; run `make train-setup`"
        )
