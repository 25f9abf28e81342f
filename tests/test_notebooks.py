"""The committed notebooks run from the committed results, carry their outputs, and begin with the run to look at."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_selfplay import play

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
LOOKING = ("reward_vs_likelihood", "spin_vs_tspin", "bring_your_own_run")


@pytest.fixture
def place(tmp_path):
    """Where notebooks run: two folders below one that holds the committed results alone."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "reference").symlink_to(ROOT / "results" / "reference")
    folder = tmp_path / "analysis" / "notebooks"
    folder.mkdir(parents=True)
    return folder


def read(name: str):
    return nbformat.read(ROOT / "analysis" / "notebooks" / f"{name}.ipynb", as_version=4)


def execute(notebook, place: Path) -> None:
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(place)}}).execute()


def texts(notebook) -> list[str]:
    """The outputs that are texts: tables and the like, no pictures."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kept = [output.get("data", {}) for output in outputs]
    shown = [data for data in kept if "text/plain" in data and not any("plotly" in kind for kind in data)]
    return [data.get("text/markdown", data["text/plain"]) for data in shown if "image/png" not in data]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, place):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source.startswith("RUN = ")
    assert any(cell.outputs for cell in code), "committed without outputs"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture among its outputs"
    assert path.stat().st_size < 400_000
    if path.stem in LOOKING:  # the one that trains is run by test_stranger
        committed = texts(notebook)
        execute(notebook, place)
        assert texts(notebook) == committed, "the results have moved since it was run"


def test_any_run_will_do(place, model_folder, rows):
    for method in ("spin", "tspin"):
        play(place / method, str(model_folder), rows, method=method, temperature=1.0)
    for name in LOOKING:
        notebook = read(name)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        first.source = 'RUN = "spin"\nOTHER = "tspin"'
        execute(notebook, place)


def test_there_are_four():
    assert len(NOTEBOOKS) == 4
