"""Token by token: tables of a run and of the command, whose sums are the sequence log-probabilities."""

import pandas as pd
import pytest
from test_selfplay import play
from typer.testing import CliRunner

from tspin.cli import app
from tspin.engines.engine import Engine
from tspin.models import load_tokenizer
from tspin.tokens import pieces


def test_a_runs_tokens(tmp_path, model_folder, rows):
    play(tmp_path, str(model_folder), rows, method="tspin", temperature=1.0, token_prompts=3)
    for number in range(2):
        folder = tmp_path / f"iteration-{number}"
        tokens = pd.read_parquet(folder / "tokens.parquet").set_index(["prompt_id", "role"])
        whole = pd.read_parquet(folder / "diagnostics.parquet").set_index(["prompt_id", "role"])
        assert len(tokens) == 3 * 3
        for when in ("before", "after"):
            sums = tokens[when].map(sum)
            assert sums.to_list() == pytest.approx(whole.loc[tokens.index, when].to_list(), abs=1e-3)
        drawn = pd.read_parquet(folder / "synthetic.parquet" if number else tmp_path / "iteration-0-synthetic.parquet")
        drawn = drawn.set_index("prompt_id")
        for (prompt, role), row in tokens.iterrows():
            assert len(row["pieces"]) == len(row["ids"]) == len(row["after"])
            if role == "synthetic":
                assert "".join(row["pieces"]).startswith(drawn.loc[prompt, "text"])


def test_none_are_kept_when_none_are_wanted(tmp_path, model_folder, rows):
    play(tmp_path, str(model_folder), rows, method="spin", temperature=1.0, token_prompts=0)
    assert not (tmp_path / "iteration-0" / "tokens.parquet").exists()


def test_the_command(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "tokens.parquet"
    data.write_text('{"prompt": "What is 3 + 4?", "completion": "The answer is 7."}\n')
    command = ["tokens", "--model", "pocket", "--before", "pocket-cold", "--data", str(data), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (row,) = pd.read_parquet(out).to_dict("records")
    assert "".join(row["pieces"]) == "The answer is 7.<|end|>"
    assert sum(row["before"]) < sum(row["after"]) < 0


def test_the_command_without_a_policy_before_scores_once(tmp_path, monkeypatch):
    data, out = tmp_path / "data.jsonl", tmp_path / "tokens.parquet"
    data.write_text('{"prompt": "What is 3 + 4?", "completion": "The answer is 7."}\n')
    command, scored, score = (
        ["tokens", "--model", "pocket", "--data", str(data), "--out", str(out)],
        [],
        Engine.score_tokens,
    )
    monkeypatch.setattr(Engine, "score_tokens", lambda *given: scored.append(given) or score(*given))
    assert CliRunner().invoke(app, command).exit_code == 0
    (row,) = pd.read_parquet(out).to_dict("records")
    assert len(scored) == 1 and row["before"].tolist() == row["after"].tolist()
    result = CliRunner().invoke(app, [*command, "--token-prompts", "0"])
    assert result.exit_code == 2 and "token_prompts=0: of no prompt are tokens asked for" in result.stderr


def test_pieces_of_bytes_and_of_spaces():
    tokenizer = load_tokenizer("tspin/pocket/model")
    text = "naïve 東京 🙂  two spaces"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
