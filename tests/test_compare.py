"""Two runs side by side: the numbers, and the page as a real browser shows it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest
from test_selfplay import play
from typer.testing import CliRunner

from tspin.cli import app
from tspin_analysis import compare
from tspin_analysis.runs import Run, load_run

HOSTILE = '<script>document.title="broken"</script><img src=x onerror="document.title=1">'


def run(name: str, course: list[float]) -> Run:
    iterations = range(len(course))
    samples = [(t, p, 1.0, -1.0 if p < 2 else 1.0) for t in iterations for p in range(8)]
    return Run(
        name=name,
        method=name,
        scores=pd.DataFrame([(t, b, v + d) for t, v in enumerate(course) for b, d in (("X", -5), ("Y", 5))],
                            columns=["iteration", "label", "value"]),
        steps=pd.DataFrame([(t, s, 1.0 * s, -1.0 * s) for t in iterations for s in range(1, 4)],
                           columns=["iteration", "step", "log_likelihood/labelled", "log_likelihood/synthetic"]),
        samples=pd.DataFrame(samples, columns=["iteration", "prompt_id", "reward", "log_likelihood"]),
        costs=pd.DataFrame([(t, 10.0, 1000, 2**30) for t in iterations],
                           columns=["iteration", "seconds", "tokens", "peak_bytes"]),
        responses=pd.DataFrame([(t, p, f"{HOSTILE} {name} {t}") for t in iterations for p in range(30)],
                               columns=["iteration", "prompt_id", "text"]),
        prompts=pd.DataFrame([(p, f"What? {HOSTILE}", "That.") for p in range(30)],
                             columns=["prompt_id", "prompt", "labelled"]),
    )  # fmt: skip


def test_numbers():
    first, second = run("spin", [40, 42, 41, 38]), run("tspin", [41, 42, 43, 44])
    table = compare.summary(first, second).set_index("")
    assert table.loc["Avg after the last iteration, %"].tolist() == ["38.00", "44.00"]
    assert table.loc["drops between iterations"].tolist() == ["2 of 3", "0 of 3"]
    assert table.loc["worst drop, points"].tolist() == ["-3.00", "–"]
    assert table.loc["misaligned after iteration 1"].tolist() == ["25.0%", "25.0%"]
    assert table.loc["time, s"].tolist() == ["40", "40"]
    scores = compare.by_iteration(first, second)
    assert len(scores) == 4 * 3
    assert scores[scores["iteration"] == 3].iloc[0].tolist() == [3, "Avg", "38.00", "44.00", "+6.00"]
    assert len(compare.prompts(first, second)) == 10


def test_page_in_a_browser(tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    first = run(HOSTILE, [40, 42, 41])  # a folder's name, and all that comes from files
    first.scores["label"] = HOSTILE + first.scores["label"]
    warned = pd.DataFrame([(1, HOSTILE)], columns=["iteration", "name"])
    text = compare.page(replace(first, warnings=warned), run("t$pin", [41, 42, 43]))
    page = tmp_path / "page.html"
    page.write_text(text)
    assert not re.search(r'(src|href)="(?!data:)', text.replace("&#34;", ""))  # nothing from elsewhere
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    assert "t$pin, side by side</title>" in shown and "<title>broken" not in shown  # no script of the data's has run
    assert "<script>document" not in shown and "<img src=x" not in shown.split("</title>")[1]
    assert shown.count("<details") == 10 and "document.title" in shown
    picture = tmp_path / "phone.png"
    subprocess.run([browser, *options, "--window-size=390,844", f"--screenshot={picture}", page.as_uri()],
                   capture_output=True, timeout=120, check=True)  # fmt: skip
    assert picture.stat().st_size > 10_000


def test_runs_from_folders_and_from_results(tmp_path, model_folder, rows):
    paths = []
    for method in ("spin", "tspin"):
        play(tmp_path / method, str(model_folder), rows, method=method, temperature=1.0)
        paths.append(str(tmp_path / method))
    loaded = load_run(paths[1])
    assert loaded.method == "tspin" and len(loaded.prompts) == len(rows)
    assert set(loaded.samples["iteration"]) == {0, 1} and (loaded.costs["seconds"] > 0).all()
    assert loaded.costs["iteration"].tolist() == [0, 1]
    drawn = pd.read_parquet(tmp_path / "tspin" / "iteration-1" / "diagnostics.parquet").query("role == 'synthetic'")
    assert loaded.entropy()[1] == pytest.approx(-drawn["before"].mean(), rel=1e-5)
    assert len(compare.picture(loaded, loaded).axes[3].lines) == 2
    assert set(loaded.responses["iteration"]) == {0}  # the second y′, drawn from the policy that iteration 0 ended with
    result = CliRunner().invoke(app, ["compare", *paths, "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "Neither run was evaluated" in (tmp_path / "page.html").read_text()

    result = CliRunner().invoke(app, ["compare", paths[0], str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "no run" in result.output
    empty = tmp_path / "results"
    empty.mkdir()
    (empty / "suite.json").write_text(json.dumps({"columns": []}))
    assert CliRunner().invoke(app, ["compare", f"{empty}:spin:0", paths[0]]).exit_code == 2
