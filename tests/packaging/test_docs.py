# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The generated pages say what the models and the results say, and deployments parse."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from echo_vllm.policies import parse_section
from echo_vllm.policies.registry import section_models
from scripts.docs_site import reference, speed_tables
from tests.conftest import ROOT


def test_the_reference_has_every_field_of_every_policy_with_a_meaning() -> None:
    policies = reference().split("\n## ")[1:]
    assert [text.split("\n")[0] for text in policies] == list(section_models())
    for text, model in zip(policies, section_models().values(), strict=True):
        for name in model.model_fields.keys() - {"policy"}:
            [row] = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
            assert len(row.split("|")[4].split()) > 3, f"{name} has no description"


def test_speeds_below_the_limit_are_marked() -> None:
    results = ROOT / "benchmarks" / "results" / "servers-bf16-cpu.json"
    summary = json.loads(results.read_text())["summary"]
    slow = sum(row["speed over plain"]["median"] < 0.95 for row in summary)
    assert speed_tables(results).count("✗") == slow > 0


def speculative_configs() -> list[dict[str, Any]]:
    """Those of the values file, inline and by ConfigMap."""
    folder = ROOT / "docker" / "helm"
    values = yaml.safe_load((folder / "values.yaml").read_text())
    files = yaml.safe_load((folder / "configmap.yaml").read_text())["data"]
    found = []
    for model in values["servingEngineSpec"]["modelSpec"]:
        arguments = model["vllmConfig"]["extraArgs"]
        given = arguments[arguments.index("--speculative-config") + 1]
        found.append(json.loads(given if given.startswith("{") else files[given.split("/")[-1]]))
    return found


def test_the_values_for_production_stack_hold_configurations_that_we_take() -> None:
    for config in speculative_configs():
        assert config["method"] == "echo"
        nodes = config["num_speculative_tokens"]
        parse_section(config["echo"], num_speculative_tokens=nodes)


def test_pods_run_as_the_user_of_the_images() -> None:
    """Who owns /cache there, and may write to volumes here."""
    values = yaml.safe_load((ROOT / "docker" / "helm" / "values.yaml").read_text())
    spec = values["servingEngineSpec"]
    wanted = {spec["containerSecurityContext"]["runAsUser"], spec["securityContext"]["fsGroup"]}
    for name in ("Dockerfile", "Dockerfile.cuda"):
        image = (ROOT / "docker" / name).read_text()
        [made] = re.findall(r"useradd .*--uid (\d+) echo", image)
        used = re.findall(r"^USER (\d+)$", image, re.MULTILINE)
        assert {int(made), *map(int, used)} == wanted, name


def test_compose_mounts_files_that_there_are() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    mounts = [volume for service in services.values() for volume in service.get("volumes", [])]
    for source in (mount.split(":")[0] for mount in mounts):
        assert not source.startswith(".") or (ROOT / "docker" / source).exists(), source
