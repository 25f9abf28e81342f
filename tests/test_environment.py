"""environment.yml follows pyproject.toml, where the versions are pinned."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def pins(requirements):
    return dict(re.fullmatch(r"([^=]+)==(.+)", line).groups() for line in requirements if "==" in line)


def test_conda_and_pip_pins_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = pins([*project["dependencies"], *extras["test"], *extras["gpu"], *extras["qlora"]])
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert pins(pip) == wanted
