# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a step costs: measured curves, the paper's hinge, and corrections from real steps.

Policies ask `StepCost` what a number of rows will take; the engine measures it at start-up, keeps
it in `CostCache`, and refines it with `OnlineCost`. Nothing here measures by itself or knows vLLM.
"""

from echo_vllm.forecast.cost_cache import CostCache, CostKey
from echo_vllm.forecast.curve import CostCurve, CostError
from echo_vllm.forecast.hinge import Hinge, budget_rows, fit_hinge
from echo_vllm.forecast.online_cost import OnlineCost
from echo_vllm.forecast.step_cost import Costs, StepCost

__all__ = [
    "CostCache",
    "CostCurve",
    "CostError",
    "CostKey",
    "Costs",
    "Hinge",
    "OnlineCost",
    "StepCost",
    "budget_rows",
    "fit_hinge",
]
