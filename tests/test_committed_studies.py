"""The committed studies: each can run, the sweeps are fair, and presets have what they chose."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from tspin.config import REPOSITORY, load_config
from tspin.experiment import gathering
from tspin.experiment.grid import load_sweep
from tspin_analysis import figures

FILES = sorted((REPOSITORY / "experiments" / "studies").glob("*.yaml"))
SWEEPS = ("sweep-rate", "sweep-scale")
SWEEP_OF_LABELS = "sweep-labels"  # of SFT alone
SWEEPS_OF_STARTS = ("sweep-half", "sweep-cold")  # of self-play alone
SMOLLM2_SWEEP = "smollm2-rate"
AS_RUN = ("pocket-greedy", "smollm2-short", "smollm2-tuned", "smollm2-long", "zephyr-7b")  # drawn as `tspin run` is


def test_the_preset_has_what_the_pocket_sweep_says():
    """The rate that it chooses for self-play, away from the edges; nothing is a point above what the preset has."""
    sweep = load_sweep(Path("sweep-rate"), None, Path("runs"), REPOSITORY / "results" / "reference")
    table = pd.read_csv(sweep.target.with_suffix(".csv"))
    assert set(table["cell"]) == {cell.name for cell in sweep.cells}
    scores = gathering.scores_of(table, ["learning_rate", "num_train_epochs"])
    marks = gathering.chosen(scores, sweep.study.choose)
    config = load_config("pocket")
    for method, rows in scores[scores["method"] != "base"].groupby("method"):
        training = config.for_method(str(method)).training
        rates, epochs = rows["learning_rate"], rows["num_train_epochs"]
        own = rows.loc[(rates == training.learning_rate) & (epochs == training.num_train_epochs), "score"]
        assert rows["score"].max() - own.item() < 1  # point: within the noise of two seeds
        if method != "sft":
            assert training.learning_rate in set(rates[marks[rows.index]])
            assert rates.min() < training.learning_rate < rates.max()


def test_sft_on_the_labels_of_self_play_has_what_the_sweep_chose():
    sweep = load_sweep(Path(SWEEP_OF_LABELS), None, Path("runs"), REPOSITORY / "results" / "reference")
    table = pd.read_csv(sweep.target.with_suffix(".csv"))
    assert set(table["cell"]) == {cell.name for cell in sweep.cells}
    scores = gathering.scores_of(table, settings := ["learning_rate", "num_train_epochs"])
    best = scores[gathering.chosen(scores, sweep.study.choose)].set_index("method").loc["sft", settings].to_dict()
    cells = load_sweep(Path("own-labels"), None, Path("runs"), Path("results")).cells
    own = {name: {float(dict(cell.setting)[name]) for cell in cells if cell.method == "sft"} for name in settings}
    assert own == {name: {value} for name, value in best.items()}


def test_smollm2_tuned_has_the_rates_that_the_sweep_chose():
    sweep = load_sweep(Path(SMOLLM2_SWEEP), None, Path("runs"), REPOSITORY / "results" / "reference")
    table = pd.read_csv(sweep.target.with_suffix(".csv"))
    assert set(table["cell"]) == {cell.name for cell in sweep.cells}
    scores = gathering.scores_of(table, ["learning_rate"])
    best = scores[gathering.chosen(scores, sweep.study.choose)].set_index("method")["learning_rate"].to_dict()
    config = load_config("smollm2-tuned")
    assert best == {method: config.for_method(method).training.learning_rate for method in best}
    ablations = {config.for_method(f"tspin_{name}").training.learning_rate for name in ("no_history", "reference")}
    assert ablations == {best["tspin"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_committed_study_is_whole(path):
    """Loading one checks every setting against the config, and its suite."""
    assert load_sweep(path, None, Path("runs"), Path("results")).cells


@pytest.mark.parametrize(
    ("names", "methods"),
    [(SWEEPS, {"spin", "tspin", "sft"}), ((SMOLLM2_SWEEP,), {"spin", "tspin", "sft"}),
     *(((name,), {"spin", "tspin"}) for name in SWEEPS_OF_STARTS)],
    ids=["pocket", "smollm2", *SWEEPS_OF_STARTS],
)  # fmt: skip
def test_the_sweeps_have_the_same_budget_for_every_method(names, methods):
    cells = [cell for name in names for cell in load_sweep(Path(name), None, Path("runs"), Path("results")).cells]
    counts = Counter(cell.method for cell in cells if cell.method != "base")
    assert set(counts) == methods and len(set(counts.values())) == 1


def test_studies_are_drawn():
    assert {path.stem for path in FILES} == figures.STUDIES | {
        *SWEEPS,
        *SWEEPS_OF_STARTS,
        SWEEP_OF_LABELS,
        SMOLLM2_SWEEP,
        *AS_RUN,
    }
