# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm bench`: measures configurations against plain decoding, in one interleaved run."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from echo_vllm.cli.console import errors, fail, located, note, numbers, read_prompts
from echo_vllm.conversations import CHATS
from echo_vllm.machine import fast_dtype
from echo_vllm.offline.bench.configurations import (
    DEMO_HEAD,
    DEMO_TARGET,
    Configuration,
    built_in,
    choose,
)
from echo_vllm.offline.bench.engine_process import KV_CACHE_BYTES, EngineOptions
from echo_vllm.offline.bench.fleet import Kind, exit_on_sigterm, workers_that_fit
from echo_vllm.offline.bench.results import Journal, write_results
from echo_vllm.offline.bench.sweep import Plan, Sweep

CONFIGURATIONS = (
    "plain,rest,eagle3-k1,eagle3-k2,eagle3-k3,eagle3-k5,eagle3-adaptive,ngram,topn-8,topn-equal,"
    "echo,auto"
)
CONCURRENCIES = "1,2,4,8,16,32"
# Under ten minutes on two cores with the demo.
QUICK: dict[str, Any] = {
    "configs": "plain,eagle3-k2,topn-8,echo,auto",
    "concurrency": "1,8,32",
    "engine": "in-process",
    "rounds": 3,
    "tokens": 24,
    "turns": 1,
}


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Target: a folder or a name.")] = str(DEMO_TARGET),
    drafter: Annotated[str, typer.Option(help="EAGLE-3 head: a folder or a name.")] = str(
        DEMO_HEAD
    ),
    prompts: Annotated[
        list[Path],
        typer.Option(
            help="JSON lines with 'prompt' or 'turns'; may be given several times.",
            show_default="chats of the project",
        ),
    ] = [CHATS],  # noqa: B006 - typer copies it
    configs: Annotated[
        str, typer.Option(help="Names, or JSON files with a speculative_config; `--configs list`.")
    ] = CONFIGURATIONS,
    concurrency: Annotated[
        str, typer.Option(help="Chats at once, each client's next turn after its last answer.")
    ] = CONCURRENCIES,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Instead: requests that arrive a second, at random, such as 0.5,1,2.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For how long they arrive.")] = 60.0,
    tpot_ms: Annotated[
        float, typer.Option(min=0.001, help="With --rate: good requests have at most this a token.")
    ] = 100.0,
    temperature: Annotated[str, typer.Option(help="Sampling temperatures, such as 0,1.")] = "0",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Of a chat at most.", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of an answer at most.")] = 128,
    spread: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Requests may have up to this share fewer or more."),
    ] = 0.5,
    chats_per_client: Annotated[int, typer.Option(min=1, help="Chats of a run.")] = 1,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Let no answer end before its last token.")
    ] = False,
    engine: Annotated[Kind, typer.Option(help="Servers over HTTP, or engines without.")] = "server",
    dtype: Annotated[str, typer.Option(help="As in vLLM.")] = fast_dtype(),
    threads: Annotated[
        int, typer.Option(min=1, help="Cores of a worker.", show_default="all")
    ] = len(os.sched_getaffinity(0)),
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile, not eager.")] = False,
    max_model_len: Annotated[int, typer.Option(min=16, help="As in vLLM.")] = 2048,
    kv_cache_mib: Annotated[
        int, typer.Option(min=1, help="KV cache of a worker, MiB.")
    ] = KV_CACHE_BYTES >> 20,
    keep_alive: Annotated[
        int | None, typer.Option(min=1, help="Workers alive at once.", show_default="what fits")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="OUTPUT.json, .md, .png, .jsonl (the samples) and .logs/.")
    ] = Path("bench"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUTPUT.jsonl.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Defaults that take under ten minutes on two cores.")
    ] = False,
) -> None:
    """Speed, latency and acceptance of configurations, as ratios to plain decoding."""
    given = dict(context.params)
    if quick:
        for name, value in QUICK.items():
            source = context.get_parameter_source(name)
            if source is not None and source.name == "DEFAULT":
                given[name] = value
    if configs == "list":
        typer.echo("\n".join(built_in(drafter)))
        return
    names = [name for name in str(given["configs"]).split(",") if name]
    concurrencies = numbers("--concurrency", given["concurrency"], int, 1)
    rates = None if rate is None else numbers("--rate", rate, float, 1e-3)
    temperatures = numbers("--temperature", temperature, float, 0)
    if rates and given["engine"] != "server":
        fail("--rate needs servers, got --engine in-process; leave out --engine")
    if rates and find_spec("pandas") is None:
        fail("--rate needs pandas for `vllm bench serve`; run pip install 'echo-vllm[tools]'")
    for folder in (model, drafter):
        if folder in (str(DEMO_TARGET), str(DEMO_HEAD)) and not Path(folder).is_dir():
            fail(f"the demo is not at {folder}; run `make setup`, or give MODEL and --drafter")
    try:
        chosen = choose(names, located(drafter))
    except (ValueError, OSError) as error:
        fail(str(error))
    conversations = [chat[: given["turns"]] for chat in read_prompts(prompts)]
    plan = Plan(
        configurations=tuple(chosen),
        loads=rates or concurrencies,
        temperatures=temperatures,
        rounds=given["rounds"],
        max_tokens=given["tokens"],
        chats_per_client=chats_per_client,
        ignore_eos=ignore_eos,
        spread=spread,
        arrival_seconds=seconds if rates else None,
        tpot_ms=tpot_ms,
    )
    options = EngineOptions(
        model=located(model),
        dtype=dtype,
        max_num_seqs=max(concurrencies),
        threads=threads,
        compile=compile,
        max_model_len=max_model_len,
        kv_cache_bytes=kv_cache_mib << 20,
    )
    settings = {
        "model": Path(model).name,
        "drafter": Path(drafter).name,
        "prompts": [path.name for path in prompts],
        "engine": given["engine"],
        "turns": given["turns"],
        "tokens": plan.max_tokens,
        "spread": plan.spread,
        "chats_per_client": plan.chats_per_client,
        "ignore_eos": plan.ignore_eos,
        "open_loop": rates is not None,
        "arrival_seconds": plan.arrival_seconds,
        "tpot_ms": plan.tpot_ms,
        # Nothing else of a worker may differ, but a later session may have more concurrency.
        **{n: getattr(options, n) for n in ("dtype", "threads", "compile", "max_model_len")},
        "speculation": {c.name: _without_folder(c) for c in chosen},
    }
    journal_path = output.with_name(output.name + ".jsonl")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(journal_path, settings, ["echo-vllm", *sys.argv[1:]], resume)
    except (ValueError, OSError) as error:
        fail(str(error))
    _warn_if_busy()
    logs = output.with_name(output.name + ".logs")
    sweep = Sweep(
        plan,
        options,
        given["engine"],
        conversations,
        keep_alive or workers_that_fit(given["engine"], options),
        logs,
    )
    exit_on_sigterm()
    failures: dict[str, str] = {}
    try:
        failures = sweep.run(journal.append, journal.done(), journal.session, errors)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        note(f"interrupted; all workers are stopped; go on with --resume ({output})")
        raise typer.Exit(130) from None
    finally:
        text = write_results(journal, chosen, failures) if journal.samples else ""
    typer.echo(text)
    if failures:
        for name, reason in failures.items():
            note(f"error: {name} failed: {reason}; the logs are in {logs}")
        raise typer.Exit(1)


def _without_folder(configuration: Configuration) -> dict[str, Any] | None:
    """A `speculative_config` as it is published: the head's name, not where it lies."""
    found = configuration.speculation
    if found is None or "model" not in found:
        return found
    return {**found, "model": Path(found["model"]).name}


def _warn_if_busy() -> None:
    busy = os.getloadavg()[0]
    if busy > 0.5:
        note(f"warning: {busy:.1f} other programs are running; only ratios will mean anything")
