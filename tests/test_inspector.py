"""Two runs side by side: the numbers, and the page as a real browser shows it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import browser
from test_selfplay import play
from typer.testing import CliRunner

from tspin.cli import app
from tspin.data.mapped import spread
from tspin.errors import UserError
from tspin_analysis import compare, inspector
from tspin_analysis.runs import Run, load_run
from tspin_analysis.samples import spread_over

HOSTILE = '<script>document.title="broken"</script><img src=x onerror="document.title=1">'
COUNT = 30
TEMPLATE = "### Question: {} ###"
LONG = 1_000
BENCHMARKS = (("X", -5), ("Y", 5))  # and how far from the average
DIAGNOSTICS = ["prompt_id", "role", "tokens", "finished", "before", "after", "reward_before", "reward_after"]
TOKENS = ["prompt_id", "role", "ids", "pieces", "before", "after"]


def run(name: str, course: list[float], count: int = COUNT, seeds: tuple[int, ...] = (3,), words: int = 3) -> Run:
    """A made-up run; prompts 0 and 1 are misaligned, prompt 2's y′ is y, prompt 3's was cut."""
    keys = [(seed, t, p) for seed in seeds for t in range(len(course)) for p in range(count)]
    roles = {"labelled": (-2.0, 1.0), "synthetic": (-1.0, 0.5), "proto": (-3.0, 0.0)}

    def likelihood(p: int, role: str) -> float:
        return roles[role][0] - 0.01 * p + (2.0 if role == "labelled" and p > 1 else 0.0)

    diagnostics = [
        (seed, t, p, role, 4, not (role == "synthetic" and p == 3), likelihood(p, role) - 0.5, likelihood(p, role),
         0.0, roles[role][1])
        for seed, t, p in keys for role in roles
    ]  # fmt: skip
    texts = [f"{HOSTILE} {name} {t} {p}" if p != 2 else "That 2." for _, t, p in keys]
    pieces = ["That", "\n", "<b>bold</b>", *["word"] * words]
    tokens = [
        (seed, t, p, role, list(range(len(pieces))), pieces, [-1.0] * len(pieces), [-2.0 * (p + 1)] * len(pieces))
        for seed, t, p in keys if seed == seeds[0] and p < max(count // 3, 5) for role in roles
    ]  # fmt: skip
    iterations = range(len(course))
    return Run(
        name=name,
        method=name,
        scores=pd.DataFrame([(s, t, b, v + d) for s in seeds for t, v in enumerate(course) for b, d in BENCHMARKS],
                            columns=["seed", "iteration", "label", "value"]),
        outcomes=pd.DataFrame([(s, t, b, d, 100.0 * (d % 100 < v + e)) for s in seeds for t, v in enumerate(course)
                               for b, e in BENCHMARKS for d in range(200)],
                              columns=["seed", "iteration", "label", "doc_id", "value"]),
        steps=pd.DataFrame([(t, s, 1.0 * s, -1.0 * s) for t in iterations for s in range(1, 4)],
                           columns=["iteration", "step", "log_likelihood/labelled", "log_likelihood/synthetic"]),
        diagnostics=pd.DataFrame(diagnostics, columns=["seed", "iteration", *DIAGNOSTICS]),
        costs=pd.DataFrame([(t, 10.0, 1000, 2**30) for t in iterations],
                           columns=["iteration", "seconds", "tokens", "peak_bytes"]),
        responses=pd.DataFrame([(*key, text) for key, text in zip(keys, texts, strict=True)],
                               columns=["seed", "iteration", "prompt_id", "text"]),
        token_logps=pd.DataFrame(tokens, columns=["seed", "iteration", *TOKENS]),
        prompts=pd.DataFrame([(p, TEMPLATE.format(f"{p}? {HOSTILE}"), f"That {p}.", f"task {p % 2}")
                              for p in range(count)],
                             columns=["prompt_id", "prompt", "labelled", "task"]),
        proto=pd.DataFrame([(seeds[0], p, "Earlier.") for p in range(count)], columns=["seed", "prompt_id", "text"]),
        settings={"method": name, "learning_rate": 1e-3},
    )  # fmt: skip


def test_numbers():
    first, second = run("spin", [40, 42, 41, 38]), run("tspin", [41, 42, 43, 44])
    table = compare.facts_table([first, second]).set_index("")
    assert table.loc["Avg after the last iteration, %"].tolist() == ["38.00", "44.00"]
    assert table.loc["drops between iterations"].tolist() == ["2 of 3", "0 of 3"]
    assert table.loc["worst drop, points"].tolist() == ["-3.00", "–"]
    assert table.loc["misaligned after iteration 1"].tolist() == ["6.7%", "6.7%"]
    assert table.loc["time, s"].tolist() == ["40", "40"]
    average, x, _ = inspector.benchmarks([first, second])
    assert [average["label"], x["label"]] == ["Avg", "X"] and len(average["cells"]) == 4
    assert average["cells"][3]["scores"] == ["38.00", "44.00"] and average["cells"][3]["main"] == "+6.00"
    assert average["cells"][3]["sure"] and not average["cells"][1]["sure"]  # 42 and 42
    assert inspector.differing_settings([first, second]) == [("method", '"spin"', '"tspin"')]


def test_differences_are_paired():
    values = pd.DataFrame({3: [0.0, 100.0, 100.0, 0.0], 4: [0.0, 100.0, 100.0, 0.0]},
                          index=pd.MultiIndex.from_product([["X"], range(4)], names=["label", "doc_id"]))  # fmt: skip
    found = inspector.difference(values, values)
    assert found.mean == 0 and found.low == found.high == 0  # what both answer alike is no noise of the difference
    other = values.rename(columns={3: 5, 4: 6})
    assert inspector.difference(*inspector.shared(values, other)).seeds == 1
    elsewhere = other.rename(index={0: 9, 1: 10, 2: 11, 3: 12})
    assert inspector.difference(*inspector.shared(values, elsewhere)) is None


def test_the_scores_beside_a_difference_are_those_that_were_compared():
    first, second = run("spin", [40, 42], seeds=(3,)), run("tspin", [41, 46], seeds=(3, 4))
    second.outcomes.loc[second.outcomes["seed"] == 4, "value"] = 100.0
    cell = inspector.cell([first, second], "X", 1)
    assert cell["main"] == "+4.00" and [float(score) for score in cell["scores"]] == [37.0, 41.0]


def test_what_is_evaluated_once_is_held_against_every_iteration():
    sft, tspin = run("sft", [40]), run("tspin", [41, 42, 46])
    sft = replace(sft, diagnostics=sft.diagnostics[sft.diagnostics["role"] == "labelled"])
    average = inspector.benchmarks([sft, tspin])[0]
    assert [cell["main"] for cell in average["cells"]] == ["+1.00", "+2.00", "+6.00"]
    assert inspector.payload(inspector.paired([sft, tspin]))["paired"]


def test_y0_are_those_of_their_seed():
    made = run("tspin", [40], seeds=(3, 4))
    rows = made.samples()
    kept = rows["seed"] == 3
    assert rows.loc[kept, "proto"].eq("Earlier.").all() and rows.loc[~kept, "proto"].isna().all()
    (part,) = inspector.payload([made])["runs"][0]["proto"]
    assert part["seed"] == 3 and len(part["place"]) == COUNT
    committed = Path(__file__).parents[1] / "results" / "reference" / "pocket"
    assert load_run(f"{committed}:tspin:10").samples(0)["proto"].notna().all()
    assert load_run(f"{committed}:tspin:11").samples(0)["proto"].isna().all()


def test_a_number_that_is_none_ends_no_page():
    made = run("spin", [40, 42])
    made.diagnostics.loc[made.diagnostics.index[1], ["after", "reward_after"]] = [float("-inf"), float("nan")]
    assert inspector.page([made])


def test_samples_and_tokens_as_tables():
    made = run("spin", [40, 42])
    rows = made.samples(1)
    assert len(rows) == COUNT and rows["misaligned"].tolist() == [True, True] + [False] * (COUNT - 2)
    assert rows["equal"].tolist() == [False, False, True] + [False] * (COUNT - 3)
    assert rows["finished"].tolist()[2:5] == [True, False, True]
    assert set(rows["length_difference"]) == {0} and len(made.samples()) == 2 * COUNT
    tokens = made.tokens(4, iteration=1)
    assert tokens["role"].unique().tolist() == ["y", "y′", "y0"] and len(tokens) == 3 * 6
    assert tokens.iloc[2][["place", "token", "before", "after", "change"]].tolist() == [2, "<b>bold</b>", -1, -10, -9]
    with pytest.raises(UserError, match="spin: single tokens are kept of 10 other prompts, not of prompt 20"):
        made.tokens(20)


def test_seeds_and_prompts_that_are_not_the_same():
    first, second = run("spin", [40, 42]), run("tspin", [41, 43], seeds=(7,))
    data = inspector.payload(inspector.paired([first, second]))
    assert data["paired"] and [part["seed"] for made in data["runs"] for part in made["samples"]] == [0] * 4
    other = replace(second, prompts=second.prompts.assign(prompt="Another."))
    data = inspector.payload(inspector.paired([first, other]))
    assert not data["paired"] and data["count"] == 2 * COUNT and data["prompts"]["prompt"][COUNT] == "Another."
    assert data["prompts"]["id"] == 2 * first.prompts["prompt_id"].tolist()


def test_sft_has_prompts_and_responses_without_pairs():
    made = run("sft", [40])
    labelled = made.diagnostics[made.diagnostics["role"] == "labelled"]
    data = inspector.payload([replace(made, diagnostics=labelled)])
    assert data["count"] == COUNT and not data["runs"][0]["samples"] and data["runs"][0]["responses"]


def test_tokens_that_a_run_kept_are_on_the_page():
    assert set(spread_over(5000, 200)) <= set(spread_over(5000, 1000))
    assert spread_over(5000, 200).tolist() == spread(range(5000), 200)
    long = run("spin", [40], count=100)
    long.responses["text"] = "x" * 1_000_000
    assert inspector.bound([long], np.arange(100)) == 20


def test_nothing_was_kept():
    bare = replace(run("spin", [40]), diagnostics=pd.DataFrame(), responses=pd.DataFrame(), prompts=pd.DataFrame(),
                   token_logps=pd.DataFrame(), outcomes=pd.DataFrame(), scores=pd.DataFrame())  # fmt: skip
    assert "The run was not evaluated" in inspector.page([bare]) and bare.samples().empty


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser that shows two runs, whose texts try to run scripts."""
    folder = tmp_path_factory.mktemp("page")
    hostile = run(HOSTILE, [40, 42, 41])  # a folder's name, and all that comes from files
    hostile.scores["label"] = hostile.outcomes["label"] = "X"
    hostile.scores["label"] = HOSTILE + hostile.scores["label"]
    hostile.prompts["task"] = HOSTILE + hostile.prompts["task"]
    warned = pd.DataFrame([(1, HOSTILE)], columns=["iteration", "name"])
    text = inspector.page([replace(hostile, warnings=warned), run("t$pin", [41, 42, 43])])
    path = folder / "page.html"
    path.write_text(text)
    with browser(folder / "profile") as shown:
        shown.size(1200, 900)
        shown.open(path)
        yield shown


def test_hostile_texts_are_texts(page):
    assert page.run("document.title").endswith("and t$pin, side by side")
    assert page.run("document.title").startswith("<script>") and page.run("document.images.length") == 0
    page.run("inspector.open(0, 3)")
    assert HOSTILE in page.run("document.getElementById('detail-prompt').textContent")
    assert page.run("document.querySelectorAll('#detail img, #rows img, #scatter img').length") == 0
    page.run("document.getElementById('detail').close()")
    assert page.errors == []  # no exception, and nothing that the page's own policy refused


def test_a_click_opens_a_prompt_token_by_token(page):
    page.until("document.querySelectorAll('#scatter .point').length === 60")
    page.run("document.getElementById('scatter').scrollIntoView()")
    x, y = page.run("(() => { const b = document.querySelectorAll('#scatter .point')[29].getBoundingClientRect();"
                    "return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
    page.click(x, y)
    page.until("document.getElementById('detail').open")
    assert (
        page.run("document.querySelectorAll('#detail-rows tr').length") == 1 + 2 + 3
    )  # head; y and y0; y′ three times
    page.run("inspector.open(0, 3)")
    spans = "[...document.querySelectorAll('#detail-rows .tokens')][0].children"
    assert page.run(f"[...{spans}].map(span => span.textContent)")[:3] == ["That", "⏎\n", "<b>bold</b>"]
    first = page.run(f"{spans}[0].style.backgroundColor")
    put(page, "colour", "'change'")
    assert page.run(f"{spans}[0].style.backgroundColor") != first
    page.run("document.querySelector('#detail-rows .tokens').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert '"\\n": log π -1.00 before, -2.00 after training, −1.00' in page.run(
        "document.getElementById('token').textContent"
    )
    page.press("Escape")
    page.until("!document.getElementById('detail').open")


def put(page, name: str, value: str) -> None:
    """Set a control of the page to the value of a script."""
    page.run(
        f"(() => {{ const i = document.getElementById('{name}'); const value = {value};"
        "if (i.type === 'checkbox') i.checked = value; else i.value = value; i.dispatchEvent(new Event('input')); })()"
    )


def test_search_filter_and_sort(page):
    def count() -> int:
        return int(page.run("document.getElementById('found').textContent").split()[0])

    assert count() == COUNT
    put(page, "misaligned", "true")
    assert count() == 2 and page.run("document.querySelectorAll('#rows tbody tr').length") == 2
    put(page, "misaligned", "false")
    put(page, "equal", "true")
    assert count() == 1
    put(page, "equal", "false")
    put(page, "ended", "'0'")
    assert count() == 1
    put(page, "ended", "''")
    put(page, "search", "'THAT 7.'")
    assert count() == 1
    put(page, "search", "''")
    put(page, "task", "[...document.getElementById('task').options].find(o => o.value.endsWith('task 1')).value")
    assert count() == COUNT / 2
    put(page, "task", "''")
    put(page, "tokens", "true")
    assert count() == 10
    put(page, "tokens", "false")
    assert count() == COUNT
    page.run("document.querySelectorAll('#rows thead button')[0].click()")
    assert page.run("document.querySelector('#rows tbody button').textContent") == str(COUNT - 1)
    assert page.run("document.querySelector('#rows thead th').ariaSort") == "descending"
    page.run("document.querySelectorAll('#rows thead button')[0].click()")
    assert page.run("common(['What is it? End.', 'Where? End.', 'Why? End.'])") == [0, 5]  # words are not cut
    assert page.run("[3, null, 1].sort((a, b) => compared(a, b, true))") == [3, 1, None]
    page.run("document.getElementById('on').click()")
    assert page.run("document.getElementById('pages').textContent") == "page 2 of 2"
    page.run("document.getElementById('back').click()")


def test_iterations_by_keyboard(page):
    page.run("document.getElementById('iteration').focus()")
    before = page.run("inspector.iteration")
    page.press("ArrowRight")
    assert page.run("inspector.iteration") == before + 1
    page.press("ArrowLeft")
    page.run("document.querySelector('#rows tbody button').focus()")
    page.press("Enter")
    page.until("document.getElementById('detail').open")
    page.press("Tab")
    assert page.run("document.getElementById('detail').contains(document.activeElement)")  # and not behind it
    page.press("Escape")


def test_on_a_phone(page):
    page.size(375, 800)
    page.until("document.querySelector('#scatter').clientWidth < 400")
    assert page.run("document.documentElement.scrollWidth") <= 375  # what is wider scrolls by itself
    page.run("inspector.open(0, 3)")
    assert page.run("document.getElementById('detail').scrollWidth") <= 375
    page.press("Escape")
    page.size(1200, 900)
    page.until("document.querySelector('#scatter').clientWidth > 900")


def test_a_large_run_stays_small():
    random = np.random.default_rng(0)
    made = []
    for name in ("spin", "tspin"):
        large = run(name, [40, 41, 42, 43, 44], count=LONG, words=20)
        noise = random.normal(size=len(large.diagnostics))
        large.diagnostics["after"] += noise
        large.responses["text"] = [" ".join(map(str, random.integers(0, 999, 12))) for _ in range(len(large.responses))]
        large.token_logps["after"] = [random.normal(size=23) for _ in range(len(large.token_logps))]
        made.append(large)
    text = inspector.page(made)
    assert len(text.encode()) < 10e6
    assert not re.search(r'(src|href)="(?!data:|#)', text.split("<script")[0])  # nothing from elsewhere


def test_runs_from_folders_and_from_results(tmp_path, model_folder, rows):
    paths = []
    for method in ("spin", "tspin"):
        play(tmp_path / method, str(model_folder), rows, method=method, temperature=1.0)
        paths.append(str(tmp_path / method))
    loaded = load_run(paths[1])
    assert loaded.method == "tspin" and len(loaded.prompts) == len(rows)
    assert set(loaded.diagnostics["iteration"]) == {0, 1} and (loaded.costs["seconds"] > 0).all()
    assert loaded.costs["iteration"].tolist() == [0, 1]
    drawn = pd.read_parquet(tmp_path / "tspin" / "iteration-1" / "diagnostics.parquet").query("role == 'synthetic'")
    assert loaded.entropy()[1] == pytest.approx(-drawn["before"].mean(), rel=1e-5)
    assert set(loaded.responses["iteration"]) == {0, 1} and loaded.samples(0)["proto"].notna().all()
    number = int(loaded.token_logps["prompt_id"].iloc[0])
    assert loaded.tokens(number).groupby("iteration").size().size == 2
    result = CliRunner().invoke(app, ["compare", *paths, "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "Neither run was evaluated" in (tmp_path / "page.html").read_text()

    result = CliRunner().invoke(app, ["compare", paths[0], str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "no run" in result.output
    result = CliRunner().invoke(app, ["compare", paths[0], str(tmp_path)])
    assert result.exit_code == 2 and f"holds runs, name one of them: {paths[0]}, {paths[1]}" in result.output
    empty = tmp_path / "results"
    empty.mkdir()
    (empty / "suite.json").write_text(json.dumps({"columns": []}))
    assert CliRunner().invoke(app, ["compare", f"{empty}:spin:0", paths[0]]).exit_code == 2
