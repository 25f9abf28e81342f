"""results/ledger.md: what it names of ours is there, and has the values that it says."""

import re
from typing import Any

import pytest
import yaml

from tspin.config import Config, load_config
from tspin.yaml_files import REPOSITORY

TEXT = (REPOSITORY / "results" / "ledger.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| [")]


def value_of(config: Config, key: str) -> Any:
    """A setting by its key in a preset: of a section, or a field of SelfPlayConfig."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section or "training"), name)


def test_every_row_is_whole():
    assert len(ROWS) > 10 and all(len(row) == 4 for row in ROWS)
    links = [re.match(r"\[[^]]+\]\((https://github\.com/[^)]+/issues/\d+)\)", report) for report, *_ in ROWS]
    assert all(links) and len({link[1] for link in links if link}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split("]")[0].strip("["))
def test_settings_are_the_presets(row):
    answer = row[3]
    named = re.findall(r"`([^`]+)`", answer)
    assert named or answer.startswith("none")
    if named:
        preset, *settings = named
        config = load_config(preset)
        assert settings
        for setting in settings:
            key, wanted = setting.split("=")
            assert value_of(config, key) == yaml.safe_load(wanted), setting
