"""The committed notebooks run from the committed results, carry their outputs, and take a user's results first."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def place(tmp_path):
    """Where notebooks run: two folders below one that holds the committed results alone."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "reference").symlink_to(ROOT / "results" / "reference")
    folder = tmp_path / "analysis" / "notebooks"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, place):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "committed without outputs"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture among its outputs"
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(place)}}).execute()


@pytest.mark.parametrize("name", ["reward_vs_likelihood", "spin_vs_tspin"])
def test_a_users_results_come_first(name, place, monkeypatch, capsys):
    (place.parents[1] / "results" / "pocket").mkdir()
    first = nbformat.read(ROOT / "analysis" / "notebooks" / f"{name}.ipynb", as_version=4).cells[1].source
    monkeypatch.chdir(place)
    exec(first.replace("%matplotlib inline", ""), {})
    assert capsys.readouterr().out == "../../results/pocket\n"


def test_there_are_three():
    assert len(NOTEBOOKS) == 3
