"""Per-sample diagnostics: the numbers of a run, of `tspin diagnose`, and of the pure table agree."""

import numpy as np
import pandas as pd
import pytest
from test_selfplay import play
from typer.testing import CliRunner

from tspin.cli import app
from tspin.data.responses import Response
from tspin.diagnostics import sample_table, summary
from tspin.objectives import METHODS
from tspin.schema import DIAGNOSTICS, ROLES, gaps
from tspin.triplets import Triplet


def triplet(number: int, length: int) -> Triplet:
    return Triplet(number, [1, 2], {role: Response([3] * length, "", finished=length < 5) for role in ROLES})


def test_table_by_hand():
    before = {"labelled": [-4.0, -6.0], "synthetic": [-5.0, -3.0], "proto": [-5.0, -3.0]}
    after = {"labelled": [-3.0, -5.0], "synthetic": [-5.5, -4.5], "proto": [-5.2, -3.1]}
    triplets = [triplet(7, 4), triplet(9, 5)]
    table = sample_table(METHODS["spin"], {"lam": 0.5}, triplets, before, after, before)
    assert list(table) == DIAGNOSTICS.names and len(table) == 6
    y = table[table["role"] == "labelled"].set_index("prompt_id")
    assert y.loc[7, ["tokens", "reference", "before", "after"]].tolist() == [4, -4.0, -4.0, -3.0]
    assert y["reward_before"].tolist() == [0, 0] and y["reward_after"].tolist() == [0.5, 0.5]
    assert y["finished"].tolist() == [True, False]
    # Prompt 9: y gains on its reference while y′ loses, and yet y′ stays the likelier.
    assert gaps(table).set_index("prompt_id").loc[9].tolist() == pytest.approx([1.25, -0.5])
    facts = summary(table)
    assert facts["misaligned_share"] == 0.5 and facts["log_likelihood_after/labelled"] == -4.0

    table = sample_table(METHODS["tspin"], {"alpha": 0.5}, triplets, before, after, None)
    assert table["reference"].isna().all()
    assert table["reward_after"].tolist() == (table["after"] * 0.5).tolist()
    assert summary(table)["misaligned_share"] == 0
    sft = sample_table(METHODS["sft"], {}, triplets, {"labelled": [-1, -2]}, {"labelled": [-1, -1]}, None)
    assert sft["reward_after"].isna().all() and "misaligned_share" not in summary(sft)


@pytest.mark.parametrize("method", ["spin", "tspin", "dpo", "sft"])
def test_a_run_records_what_the_command_computes(tmp_path, model_folder, data_file, rows, method):
    run = tmp_path / "run"
    _, results = play(run, str(model_folder), rows, method=method, temperature=1.0, max_completion_length=30)
    last = results[-1]
    recorded = pd.read_parquet(last.model_path.parent / "diagnostics.parquet")
    assert last.diagnostics["log_likelihood_after/labelled"] < 0
    # What an iteration ended with is what the next one starts from.
    if method != "sft":
        first = pd.read_parquet(run / "iteration-0" / "diagnostics.parquet")
        for one in (first, recorded):
            assert sorted(one["role"].unique()) == sorted(ROLES)
        left, right = (t[t["role"] != "synthetic"].set_index(["prompt_id", "role"]) for t in (first, recorded))
        np.testing.assert_allclose(left["after"], right["before"], rtol=1e-5)
        reference = {"spin": right["before"], "dpo": left["before"], "tspin": None}[method]
        if reference is None:
            assert recorded["reference"].isna().all()
        else:
            np.testing.assert_allclose(right["reference"], reference, rtol=1e-5)

    out = tmp_path / "diagnostics.parquet"
    command = ["diagnose", "--model", last.model_path, "--data", data_file, "--out", out, "--method", method]
    command += ["--before", results[-2].model_path if len(results) > 1 else model_folder]
    if method != "sft":
        command += ["--iteration", 1, "--synthetic", last.model_path.parent / "synthetic.parquet"]
        command += ["--proto", run / "proto.parquet", "--reference", model_folder]
    settings = ["--set", "max_completion_length=30", "--set", "bf16=false"]
    result = CliRunner().invoke(app, [str(part) for part in [*command, *settings]])
    assert result.exit_code == 0, result.output
    # The run has some of these from its sampler and from an earlier iteration: the same up to rounding.
    pd.testing.assert_frame_equal(pd.read_parquet(out), recorded, rtol=1e-5, atol=1e-5)


def test_a_long_response_has_its_number_of_tokens():
    """Reasoning of 32,768 tokens and more, as thinking models are given room for."""
    responses = {"labelled": Response([3], "", True), "synthetic": Response([3] * 40_000, "", False)}
    values = {"labelled": [-1.0], "synthetic": [-2.0]}
    coefficients = {"alpha": 1.0, "loss_type": "logistic"}
    table = sample_table(METHODS["tspin_no_history"], coefficients, [Triplet(0, [1], responses)], values, values, None)
    assert table["tokens"].tolist() == [1, 40_000]
