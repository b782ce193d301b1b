# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm bench`: measures configurations against plain decoding, in one interleaved run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from echo_vllm.cli.console import errors, fail, located, note
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
from echo_vllm.offline.bench.prompts import DEFAULT_PROMPTS, read_shuffled
from echo_vllm.offline.bench.results import Journal, write_results
from echo_vllm.offline.bench.sweep import Plan, Sweep

CONFIGURATIONS = (
    "plain,eagle3-k1,eagle3-k2,eagle3-k3,eagle3-k5,eagle3-adaptive,ngram,topn-8,echo,auto"
)
CONCURRENCIES = "1,2,4,8,16,32"
# Under ten minutes on two cores with the demo.
QUICK: dict[str, Any] = {
    "configs": "plain,eagle3-k2,topn-8,echo,auto",
    "concurrency": "1,8,32",
    "engine": "in-process",
    "rounds": 3,
    "tokens": 24,
    "requests_per_client": 1,
}


def _numbers(option: str, text: str, kind: Callable[[str], Any], lowest: float) -> tuple[Any, ...]:
    """`1,2,4` as a tuple without repetitions."""
    try:
        values = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(lowest <= value < float("inf") for value in values):
        fail(f"{option} must be numbers from {lowest:g} on, with commas, got {text!r}")
    return values


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Target: a folder or a name.")] = str(DEMO_TARGET),
    drafter: Annotated[str, typer.Option(help="EAGLE-3 head: a folder or a name.")] = str(
        DEMO_HEAD
    ),
    prompts: Annotated[
        list[Path],
        typer.Option(help="JSON lines with 'prompt' or 'turns'; may be given several times."),
    ] = [DEFAULT_PROMPTS],  # noqa: B006 - typer copies it
    configs: Annotated[
        str, typer.Option(help="Names, or JSON files with a speculative_config; `--configs list`.")
    ] = CONFIGURATIONS,
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = CONCURRENCIES,
    temperature: Annotated[str, typer.Option(help="Sampling temperatures, such as 0,1.")] = "0",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for a request.")] = 128,
    spread: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Requests have up to this share fewer or more tokens."),
    ] = 0.5,
    requests_per_client: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 2,
    until_eos: Annotated[
        bool, typer.Option("--until-eos", help="Let requests end by themselves.")
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
    concurrencies = _numbers("--concurrency", given["concurrency"], int, 1)
    temperatures = _numbers("--temperature", temperature, float, 0)
    for folder in (model, drafter):
        if folder in (str(DEMO_TARGET), str(DEMO_HEAD)) and not Path(folder).is_dir():
            fail(f"the demo is not at {folder}; run `make setup`, or give MODEL and --drafter")
    try:
        chosen = choose(names, located(drafter))
        conversations = read_shuffled(prompts)
    except (ValueError, OSError) as error:
        fail(str(error))
    plan = Plan(
        configurations=tuple(chosen),
        concurrencies=concurrencies,
        temperatures=temperatures,
        rounds=given["rounds"],
        max_tokens=given["tokens"],
        requests_per_client=given["requests_per_client"],
        ignore_eos=not until_eos,
        spread=spread,
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
        "tokens": plan.max_tokens,
        "spread": plan.spread,
        "requests_per_client": plan.requests_per_client,
        "ignore_eos": plan.ignore_eos,
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
        frozen=output.with_name(output.name + ".turns.json"),
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
        note(f"error: {', '.join(failures)} failed; the logs are in {logs}")
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
