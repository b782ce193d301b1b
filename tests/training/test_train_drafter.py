# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A head from nothing to serving: trained by the command, and the same in training and in engines.

Everything is tiny and random: targets with 64 words and 4 layers, and heads for them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_vllm.offline.acceptance_run import chain_of, measure
from echo_vllm.training.head_files import draft_vocabulary
from tests.conftest import ROOT
from tests.engine.engines import counters, echo, engine, generate, runner
from tests.training.targets import SHAPE, make_llama, make_qwen3, train_settings, write_prompts

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        find_spec("speculators") is None, reason="speculators is not installed: make train-setup"
    ),
]

AUX = [1, 2, 3]
MAX_LEN = 192
ANSWER = 48
CHAIN = 4
LOGIT_TOLERANCE = 2e-4
"""Between logits of the order of ten that two programs computed in float32."""
STATE_TOLERANCE = 1e-4
"""Between hidden states, absolute and relative."""
COUNT_TOLERANCE = 0.02
MARGIN = {0: 0.5, 1: 0.1}
"""How much longer the acceptance of a trained head must be than an untrained one's, by the
temperature: at 1 the random target itself says what nobody can foresee."""
TRAIN = [
    *("--aux-layers", "1,2,3", "--dtype", "float32", "--batch-tokens", "512"),
    *("--learning-rate", "3e-3", "--ttt-steps", "3", "--draft-vocab", "48", "--held-out", "0.1"),
]
STEPS = 120


def train_drafter(*words: object) -> list[str]:
    return [sys.executable, "-m", "echo_vllm.cli", "train-drafter", *map(str, words)]


def run(*words: object) -> str:
    """Run the command; gives what it says."""
    result = subprocess.run(
        train_drafter(*words), cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


@dataclass(frozen=True)
class Made:
    target: Path
    head: Path
    prompts: Path
    log: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A head trained by the command, killed in the middle and resumed."""
    folder = tmp_path_factory.mktemp("trained")
    target, head = make_llama(folder / "target"), folder / "head"
    prompts = write_prompts(folder / "prompts.jsonl", 100, seed=1, turns=2)
    unseen = write_prompts(folder / "unseen.jsonl", 16, seed=2)
    common = (target, "-o", head)
    run("data", *common, "--prompts", prompts, "--max-tokens", ANSWER, "--max-model-len", MAX_LEN)
    train = ("train", *common, *TRAIN, "--max-steps", STEPS, "--epochs", 1000)
    often = ("--checkpoint-minutes", 0.02)
    process = subprocess.Popen(
        train_drafter(*train, *often), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    state = head.with_name("head.work") / "checkpoints" / "0" / "training_state.json"
    until = time.monotonic() + 800
    while not list(state.parent.parent.glob("*/training_state.json")):
        assert process.poll() is None, "the training ended before its first checkpoint"
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (head / "training.json").exists()
    log = run(*train, "--resume")
    return Made(target, head, unseen, log)


def facts_of(head: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((head / "training.json").read_text())
    return content


def test_a_killed_training_goes_on_where_it_was(made: Made) -> None:
    facts = facts_of(made.head)
    assert facts["updates"] == STEPS
    first = next(line for line in made.log.splitlines() if line.startswith("update "))
    begun = int(first.split()[1].rstrip(","))
    assert 1 < begun < STEPS, made.log
    assert "left" in made.log


def test_a_trained_head_is_accepted_more_often_than_an_untrained_one(
    made: Made, tmp_path: Path
) -> None:
    run(
        *("eval", made.target, "-o", made.head, "--eval-prompts", f"unseen={made.prompts}"),
        *("--max-tokens", ANSWER, "--max-model-len", MAX_LEN, "--dtype", "float32"),
        *("--chains", CHAIN, "--trees", "16"),
    )
    runs = facts_of(made.head)["evaluation"]["runs"]
    lengths = {(run["drafts"], run["temperature"]): run["acceptance_length"] for run in runs}
    untrained = measure(
        str(made.target),
        chain_of(str(make_head_of(made.target, tmp_path / "untrained")), CHAIN, "eagle3"),
        {"unseen": prompt_ids(made, 16)},
        [0, 1],
        max_tokens=ANSWER,
        dtype="float32",
        max_model_len=MAX_LEN,
        concurrency=8,
    )
    shares = {run["in_draft_vocabulary"] for run in runs if run["temperature"] == 0}
    assert len(shares) == 1, "greedy answers are the same however they are drafted"
    drafted = draft_vocabulary(made.head)
    assert drafted is not None
    greedy = untrained["unseen", 0].answers
    assert shares == {
        sum(token in drafted for answer in greedy for token in answer) / sum(map(len, greedy))
    }
    card = (made.head / "README.md").read_text()
    assert "tree of 16" in card
    assert "echo-vllm train-drafter eval" in card
    for temperature in (0, 1):
        least = untrained["unseen", temperature].length + MARGIN[temperature]
        assert lengths[f"chain of {CHAIN}, vLLM's eagle3", temperature] > least, lengths
        assert lengths[f"chain of {CHAIN}", temperature] > least, lengths
    assert lengths["tree of 16", 0] > lengths[f"chain of {CHAIN}", 0], lengths


def prompt_ids(made: Made, count: int) -> list[list[int]]:
    from echo_vllm.conversations import Chat, read_conversations

    chat = Chat(str(made.target))
    return [chat.encode(turns[:1]) for turns in read_conversations(made.prompts)[:count]]


def greedy(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


Answers = tuple[list[dict[str, list[int]]], list[list[int]]]


@pytest.fixture(scope="module")
def plain_answers(made: Made) -> Answers:
    """Prompts, and what plain decoding answers."""
    prompts = [{"prompt_token_ids": ids} for ids in prompt_ids(made, 12)]
    with engine(made.target, None, max_model_len=MAX_LEN) as llm:
        return prompts, generate(llm, prompts, greedy(ANSWER))


def test_answers_with_it_are_those_of_plain_decoding_and_as_predicted(
    made: Made, plain_answers: Answers
) -> None:
    """Token for token in float32; and the engine counts what the training code predicts."""
    prompts, plain = plain_answers
    stock = {"method": "eagle3", "model": str(made.head), "num_speculative_tokens": CHAIN}
    with engine(made.target, echo(made.head, 16), max_model_len=MAX_LEN) as llm:
        assert generate(llm, prompts, greedy(ANSWER)) == plain
    with engine(made.target, stock, max_model_len=MAX_LEN) as llm:
        assert generate(llm, prompts, greedy(ANSWER)) == plain
        count = counters(llm)
    counted = 1 + count["spec_decode_num_accepted_tokens"] / count["spec_decode_num_drafts"]
    predicted = predicted_length(made, [p["prompt_token_ids"] for p in prompts], plain)
    assert predicted == pytest.approx(counted, rel=COUNT_TOLERANCE)
    assert counted > 1 + MARGIN[0]


def predicted_length(made: Made, prompts: list[list[int]], answers: list[list[int]]) -> float:
    from benchmarks.predicted_acceptance import Acceptance, predicted_acceptance
    from echo_vllm.training.features import Target
    from echo_vllm.training.rows import Row

    target = Target(str(made.target), AUX, torch.float32, "cpu")
    model = model_of(made.target, init=made.head)
    total = Acceptance(0, [0] * CHAIN)
    for prompt, answer in zip(prompts, answers, strict=True):
        row = Row(0, 0, 0.0, prompt + answer, [0] * len(prompt) + [1] * len(answer))
        states = target.hidden_states(torch.tensor(row.input_ids))[:, :-1]
        total = total.plus(predicted_acceptance(model, states, row, CHAIN, ANSWER))
    return total.length


STOCK_SCRIPT = """
import json, sys
import vllm
from vllm import LLM, SamplingParams
job = json.load(sys.stdin)
llm = LLM(job["target"], speculative_config=job["speculation"], dtype="float32",
          enforce_eager=True, max_model_len=job["max_model_len"], disable_log_stats=False)
params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params,
                       use_tqdm=False)
accepted = [m.value for m in llm.get_metrics()
            if m.name == "vllm:spec_decode_num_accepted_tokens"]
print(json.dumps({"vllm": vllm.__file__, "accepted": accepted[0],
                  "tokens": [list(o.outputs[0].token_ids) for o in outputs]}))
"""


@pytest.fixture(scope="module")
def published_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vLLM as it was published, for PYTHONPATH."""
    from echo_vllm.patching import PatchState, find_installation, load_series

    installation = find_installation()
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(installation.root / "vllm", folder / "vllm", copy_function=os.symlink)
    for path, content in PatchState(installation, load_series()).published_files().items():
        (folder / path).unlink()
        (folder / path).write_bytes(content)
    return folder


def test_unpatched_vllm_serves_it(made: Made, plain_answers: Answers, published_vllm: Path) -> None:
    prompts, plain = plain_answers
    spec = {"method": "eagle3", "model": str(made.head), "num_speculative_tokens": CHAIN}
    job = {
        "target": str(made.target),
        "speculation": spec,
        "prompts": [prompt["prompt_token_ids"] for prompt in prompts],
        "max_tokens": ANSWER,
        "max_model_len": MAX_LEN,
    }
    environment = {**os.environ, "PYTHONPATH": str(published_vllm), "VLLM_PLUGINS": ""}
    result = subprocess.run(
        [sys.executable, "-c", STOCK_SCRIPT],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["vllm"].startswith(str(published_vllm))
    assert found["accepted"] > 0
    assert found["tokens"] == plain


def test_a_full_disk_ends_training_in_one_sentence_and_keeps_the_last_checkpoint(
    made: Made,
) -> None:
    """No file of the process may grow beyond 50 kB, which is an error like a full disk."""
    before = {
        path: path.read_bytes()
        for path in made.head.with_name("head.work").glob("checkpoints/*/*")
        if path.is_file() and path.parent.name.isdigit()
    }
    assert before
    words = ("train", made.target, "-o", made.head, *TRAIN, "--max-steps", STEPS + 3)
    result = subprocess.run(
        train_drafter(*words, "--epochs", 1000, "--resume"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert result.returncode == 1, result.stderr[-2000:]
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "cannot be written" in last
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in before} == before


# --- the same numbers in training and serving ---


def model_of(target: Path, init: Path | None = None) -> Any:
    """speculators' model of a head."""
    from echo_vllm.training.trainer import make_model

    settings = train_settings(target, aux_layers=AUX, init=None if init is None else str(init))
    counts = dict.fromkeys(range(1, SHAPE.vocab, 4), 1)
    return make_model(settings, counts).eval()


def make_head_of(target: Path, folder: Path, *, lively: bool = False) -> Path:
    """An untrained head; if `lively`, with weights large enough that every part of it matters."""
    from echo_vllm.training.head_files import export_head

    model = model_of(target)
    if lively:
        generator = torch.Generator().manual_seed(5)
        for name, weights in model.named_parameters():
            if weights.ndim == 2 and name.startswith(("layers", "fc")):
                noise = torch.randn(weights.shape, generator=generator)
                weights.data = 1.5 * noise / weights.shape[1] ** 0.5
            elif "norm" in name and not name.startswith("verifier"):
                weights.data = 1 + 0.3 * torch.randn(weights.shape, generator=generator)
    export_head(model, folder, dtype=torch.float32, bos_and_eos={})
    return folder


@dataclass
class Seen:
    """What vLLM's drafter read and computed.

    Attributes:
        states: [num_tokens, num_aux * hidden_size] of each call.
        logits: [num_requests, vocab] of each call.
    """

    states: list[torch.Tensor]
    logits: list[torch.Tensor]


@pytest.fixture
def watched() -> Iterator[Callable[[Any], Seen]]:
    """Watch the drafter of an engine, until the test is over."""
    undo: list[tuple[Any, str]] = []

    def watch(llm: Any) -> Seen:
        model = runner(llm).drafter.model
        seen = Seen([], [])
        combine: Callable[[torch.Tensor], torch.Tensor] = model.combine_hidden_states
        compute: Callable[[torch.Tensor], torch.Tensor] = model.compute_logits

        def combine_and_keep(states: torch.Tensor) -> torch.Tensor:
            seen.states.append(states.clone())
            return combine(states)

        def compute_and_keep(hidden: torch.Tensor) -> torch.Tensor:
            logits = compute(hidden)
            seen.logits.append(logits.clone())
            return logits

        model.combine_hidden_states = combine_and_keep
        model.compute_logits = compute_and_keep
        undo.extend([(model, "combine_hidden_states"), (model, "compute_logits")])
        return seen

    yield watch
    for model, name in undo:
        delattr(model, name)


@pytest.mark.parametrize("make_target", [make_llama, make_qwen3], ids=["llama", "qwen3"])
def test_logits_are_the_same_in_training_and_in_vllm(
    make_target: Callable[[Path], Path], tmp_path: Path, watched: Callable[[Any], Seen]
) -> None:
    """On vLLM's own hidden states, for each token of the first chain that vLLM drafts; and the
    target's hidden states are vLLM's."""
    from echo_vllm.training.features import Target

    target = make_target(tmp_path / "target")
    head = make_head_of(target, tmp_path / "head", lively=True)
    prompt = [2, *range(10, 30), 1, 3]
    spec = {"method": "eagle3", "model": str(head), "num_speculative_tokens": CHAIN}
    with engine(target, spec, max_model_len=MAX_LEN) as llm:
        seen = watched(llm)
        answer = generate(llm, [{"prompt_token_ids": prompt}], greedy(2))[0]
    states = seen.states[0]
    assert states.shape == (len(prompt), len(AUX) * SHAPE.hidden)
    own_states = Target(str(target), AUX, torch.float32, "cpu").hidden_states(torch.tensor(prompt))
    torch.testing.assert_close(
        own_states[:, :-1].flatten(1), states, atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE
    )
    model = model_of(target, init=head)
    in_vllm = seen.logits[:CHAIN]
    drafted = [int(logits[0].argmax()) for logits in in_vllm]
    # The row of the newest token reads the drafts, as in the training-time test it reads the text.
    ids = torch.tensor([*prompt, answer[0], *drafted])
    later = states.new_zeros(len(drafted), states.shape[1])
    own: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda *call: own.append(call[2][0]))
    with torch.inference_mode():
        model(
            hidden_states=torch.cat([states, later])[None],
            input_ids=ids[None, 1:],
            document_ids=torch.zeros(1, len(ids) - 1, dtype=torch.long),
            ttt_steps=CHAIN,
        )
    hook.remove()
    tokens = torch.arange(len(model.d2t)) + model.d2t
    for step, logits in enumerate(in_vllm):
        ours, theirs = own[step][len(prompt) - 1], logits[0, tokens]
        assert theirs.std() > 0.5
        torch.testing.assert_close(ours, theirs, atol=LOGIT_TOLERANCE, rtol=0)
        assert torch.isinf(logits[0]).sum() == SHAPE.vocab - len(tokens)
