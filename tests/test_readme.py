"""README files: no number of theirs is stale, and what they name is there."""

import re
from pathlib import Path

import pytest

from tspin_analysis.readme import FILES, filled

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    "results/ledger.md",
    *FILES[1:],
]


@pytest.mark.parametrize("name", FILES)
def test_numbers_are_those_of_results(name):
    """`make readme` writes them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert filled(text, ROOT / "results") == text


def test_a_changed_result_makes_a_place_stale(tmp_path):
    folder = tmp_path / "faults"
    folder.mkdir()
    (folder / "summary.csv").write_text("fault,injected,survived,numbers_lost\nnone,1,1,0\nkill,7,7,0\n")
    text = "Of <!-- fill faults -->6<!-- end --> faults"
    assert filled(text, tmp_path) == "Of <!-- fill faults -->7<!-- end --> faults"
    (folder / "summary.csv").write_text("fault,injected,survived,numbers_lost\nkill,7,6,1\n")
    with pytest.raises(ValueError, match="not survived"):
        filled(text, tmp_path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target


def test_the_readme_is_short():
    """Words that a reader sees."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub(r"<!--.*?-->", "", text).split()) <= 1270
