# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs engines that have nothing to do with ECHO, with everything that is installed of it.

    python -m tests.startup.other_methods TARGET HEAD

prints one JSON line a method of speculation: `patched`, whether vLLM is, the plug-ins that vLLM
finds for statistics, the number of tokens, and the names of all metrics.
"""

from __future__ import annotations

import json
import sys
from typing import Any

METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "eagle3": {"method": "eagle3", "num_speculative_tokens": 2},
    # The last one: it imports numba, beside which vLLM starts no further engine in a process.
    "ngram": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
}


def main(target: str, head: str) -> None:
    from vllm import SamplingParams
    from vllm.config import SpeculativeConfig
    from vllm.v1.metrics.loggers import StatLoggerManager, load_stat_logger_plugin_factories
    from vllm.v1.metrics.stats import SchedulerStats

    from echo_vllm.offline.engine import LocalEngine

    for method, speculation in METHODS.items():
        if speculation is not None and method == "eagle3":
            speculation = {**speculation, "model": head}
        with LocalEngine(
            target,
            speculative_config=speculation,
            dtype="float32",
            max_num_seqs=2,
            skip_tokenizer_init=True,
            disable_log_stats=False,
        ) as local:
            llm = local.llm
            params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
            [output] = llm.generate({"prompt_token_ids": [3, 4, 3, 4]}, params, use_tqdm=False)
            # As a server does, which has the plug-ins in addition.
            plugins = load_stat_logger_plugin_factories()
            manager = StatLoggerManager(
                llm.llm_engine.vllm_config, custom_stat_loggers=plugins, client_count=1
            )
            manager.log_engine_initialized()
            manager.record(SchedulerStats(), None)
            manager.log()
            found = {
                "method": method,
                "patched": "echo" in SpeculativeConfig.__dataclass_fields__,
                "plugins": [str(plugin) for plugin in plugins],
                "tokens": len(output.outputs[0].token_ids),
                "metrics": sorted({metric.name for metric in llm.get_metrics()}),
            }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
