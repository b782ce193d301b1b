# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What is known about a drafter before it runs: gates, thresholds, survival curves.

The engine reads `DrafterProfile` and `SurvivalModel` from here. The modules that make a profile out
of a trace (`samples`, `gates`, `fit`, `report`) are for offline tools and are not imported here;
they need scikit-learn and matplotlib.
"""

from echo_vllm.calibration.profile import DepthProfile, DrafterProfile
from echo_vllm.calibration.survival import OnlineSurvival, SurvivalModel

__all__ = ["DepthProfile", "DrafterProfile", "OnlineSurvival", "SurvivalModel"]
