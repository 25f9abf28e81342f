"""`tspin run`: every option is used, combined with the others, or refused in a line that names both; aliases; flags."""

import itertools
import json
import os
import shlex
import subprocess
import sys

import pytest
from test_cli import assert_refused, call
from typer.main import get_command

from tspin import cli, names
from tspin.cli import running as command
from tspin.config import build_config
from tspin.declared import declared
from tspin.errors import UserError
from tspin.hub.offline import VARIABLE


@pytest.fixture
def asked(monkeypatch):
    """The runs that commands ask for, none of which is carried out."""
    found = []
    monkeypatch.setattr(command, "carry_out", found.append)
    return found


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NLTK_DATA", "")
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "manifest.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "alone.yaml").write_text("model: {path: pocket}\ndata: {path: pocket}\nmethods: {spin: {lam: 0.2}}\n")
    (tmp_path / "suited.yaml").write_text("evaluation: {suite: pocket}\nmodel: {path: pocket, revision: abc}\n")
    return tmp_path


LAUNCHER = ["--launcher", "accelerate", "--launcher-config", "cpu2"]
# Option → how it is typed, and whether a run has it.
OPTIONS = {
    "--preset": (["--preset", "pocket"], lambda run: run.name == "pocket" and run.source == "pocket.yaml: "),
    "--config": (["--config", "suited.yaml"], lambda run: run.name == "suited"),
    "--model": (["--model", "pocket-cold"], lambda run: run.tree["model"]["path"] == "pocket-cold"),
    "--data": (["--data", "rows.jsonl"], lambda run: run.tree["data"]["path"] == "rows.jsonl"),
    "--methods": (["--methods", "spin,tspin"], lambda run: {"spin", "tspin"} <= {*run.methods}),
    "--method": (["--method", "sft"], lambda run: "sft" in run.methods),
    "--seeds": (["--seeds", "3,4"], lambda run: {3, 4} <= {*run.seeds}),
    "--seed": (["--seed", "5"], lambda run: 5 in run.seeds),
    "--iterations": (["--iterations", "7"], lambda run: run.tree["iterations"] == 7),
    "--out": (["--out", "here"], lambda run: str(run.out) == "here"),
    "--runs": (["--runs", "there"], lambda run: run.out is None and str(run.runs) == "there"),
    "--results": (["--results", "told"], lambda run: run.out is None and str(run.results) == "told"),
    "--launcher": (LAUNCHER, lambda run: str(run.launcher) == "cpu2"),
    "--launcher-config": (LAUNCHER, lambda run: str(run.launcher) == "cpu2"),
    "--set": (["--set", "top_p=0.5"], lambda run: "top_p=0.5" in run.overrides),
    "--learning-rate": (["--learning-rate", "1e-5"], lambda run: "learning_rate=1e-5" in run.overrides),
    "--offline": (["--offline", "offline"], lambda run: os.environ[VARIABLE].endswith("offline")),
}
CONTEXTS = [["--preset"], ["--config"], ["--model", "--data"]]


def test_the_options_are_all_of_them():
    options = {name for option in get_command(cli.app).commands["run"].params for name in option.opts}
    assert {*OPTIONS} - {"--learning-rate"} == options


@pytest.mark.parametrize("context", CONTEXTS, ids=" ".join)
def test_every_pair_is_used_or_refused(asked, places, context):
    for pair in itertools.combinations(OPTIONS, 2):
        given = list(dict.fromkeys([*context, *pair]))
        words = dict.fromkeys(tuple(OPTIONS[name][0]) for name in given)
        asked.clear()
        result = call("run", *(word for part in words for word in part))
        if result.exit_code == 0:
            assert all(OPTIONS[name][1](asked[0]) for name in given), given
        else:
            assert_refused(result)
            line = result.stderr.splitlines()[-1]
            assert sum(name in line for name in given) >= 2, line


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("", "run needs --preset or --config, or --model and --data"),
        ("--model pocket", "--model alone: --data is missing too; run needs"),
        ("--data pocket", "--data alone: --model is missing too; run needs"),
        ("--preset pocket --config suited.yaml", "--preset and --config both name the run's file: give one of them"),
        ("--preset pocket --out x", "--out x: --preset pocket is evaluated, and keeps its runs in --runs and "
         "its numbers in --results"),
        ("--config alone.yaml --results x", "--results x: --config alone.yaml names no suite, so nothing is evaluated; "
         "its folder is --out"),
        ("--model pocket --data pocket --methods base,spin", "--methods base,spin: base, the initial policy, can only "
         "be evaluated, and a run of --model and --data names no suite"),
        ("--model pocket --data pocket --suite pocket", "--set evaluation: a run of --model and --data is trained and "
         "not evaluated"),
        ("--preset pocket --methods ,", "--methods is empty"),
        ("--preset pocket --iterations 2 --set iterations=3", "--iterations 2 and --set iterations=3 do not agree"),
        ("--preset pocket --model pocket --set model.path=x", "--model pocket and --set model.path=x do not agree"),
        ("--preset pocket --launcher accelerate", "--launcher accelerate and --launcher-config FILE go together"),
        ("--config suited", "--config suited: a YAML file is expected, with the keys of a preset"),
        ("--config broken.yaml", "broken.yaml: not readable as YAML"),
        ("--preset pocket --methods tspin,tspin_no_history --alpha 0.3", "--set alpha=0.3: tspin, tspin_no_history "
         "have alpha: say it of each, --set methods.tspin.alpha=0.3 --set methods.tspin_no_history.alpha=0.3"),
        ("--preset pocket --output-dir x", "output_dir: no part of a config: the command gives it, by --out or --runs"),
        ("--preset pocket --sampling.batch-sze 3", "sampling: no section: unknown key 'batch_sze'"),
        ("--preset pocket --training.learning-rate 3", "training: no section: learning_rate stands at the top level"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(asked, places, arguments, line):
    (places / "broken.yaml").write_text("a: [")
    result = call("run", *arguments.split())
    assert_refused(result)
    assert result.stderr.splitlines()[-1].removeprefix("tspin: ").removeprefix("pocket.yaml: ").startswith(line)
    assert not asked


def test_what_is_run_when_nothing_is_said(asked, places):
    for arguments in (
        "--preset pocket", "--config alone.yaml", "--config suited.yaml", "--model pocket --data rows.jsonl",
        "--model pocket --data rows.jsonl --seeds 1,2 --out o", "--config suited.yaml --model pocket-cold",
    ):  # fmt: skip
        assert call("run", *arguments.split()).exit_code == 0, arguments
    preset, alone, suited, mine, seeds, other = asked
    assert preset.methods == suited.methods == ["base", "sft", "spin", "tspin"] and preset.out is suited.out is None
    assert (alone.methods, str(alone.out)) == (["spin"], "runs/alone")
    assert (mine.methods, mine.seeds, str(mine.out)) == (["tspin"], [0], "runs/mine")
    assert {seed: str(place) for seed, place in seeds.folders.items()} == {1: "o/seed-1", 2: "o/seed-2"}
    assert suited.tree["model"]["revision"] == "abc" and other.tree["model"] == {"path": "pocket-cold"}


def test_what_comes_next_is_a_command(asked, places):
    for methods in ("spin,tspin", "tspin", "spin,tspin,dpo"):
        call("run", "--model", "pocket", "--data", "pocket", "--methods", methods, "--out", "m")
    assert [list(command.what_next(run)) for run in asked] == [
        ["compare: tspin compare m/spin m/tspin --out m/compare.html"],
        ["look: tspin inspect m/tspin"],
        ["compare: tspin compare m/spin m/tspin --out m/compare-spin-tspin.html",
         "compare: tspin compare m/spin m/dpo --out m/compare-spin-dpo.html"],
    ]  # fmt: skip
    call("run", "--model", "pocket", "--data", "pocket", "--methods", "spin,tspin", "--out", "my runs")
    (line,) = command.what_next(asked[-1])
    pair = ["my runs/spin", "my runs/tspin"]
    assert shlex.split(line) == ["compare:", "tspin", "compare", *pair, "--out", "my runs/compare.html"]


def test_aliases_shadow_nothing_and_lead_somewhere():
    fields = {*names.preset_fields(), *names.COEFFICIENTS, *names.BY_COMMAND, *names.SECTIONS}
    assert not names.ALIASES.keys() & fields
    assert not {alias.partition(".")[0] for alias in names.ALIASES if "." in alias} & fields
    for alias, key in names.ALIASES.items():
        section, _, inner = key.partition(".")
        assert inner in declared(names.SECTIONS[section]) if inner else key in names.preset_fields(), alias
    assert names.expanded(["lr=1e-5", "sampling.temperature=0", "beta=0.5", "lam=1", "alpha"], ["spin", "tspin"]) == [
        "learning_rate=1e-5", "temperature=0", "methods.tspin.beta=0.5", "methods.spin.lam=1", "alpha",
    ]  # fmt: skip


def test_every_field_is_a_flag(asked, places):
    """Those that a command gives by other options are refused, and named."""
    fields = [*names.preset_fields(), *names.COEFFICIENTS, *names.BY_COMMAND, "history", "labels"]
    options = {"--iterations", "--method", "--seed", "--launcher"}
    for name in fields:
        flag = "--" + name.replace("_", "-")
        if flag in options:
            continue
        result = call("run", "--model", "pocket", "--data", "pocket", "--method", "tspin", f"{flag}=null")
        if asked:
            key = asked.pop().overrides[0]
            assert key.removeprefix("data.").removeprefix("methods.tspin.") == f"{name}=null"
        else:
            assert_refused(result, name)
    call("run", "--preset", "pocket", "--gradient-checkpointing", "--lora.rank", "8", "--adam-beta1=0.5", "--lr", "-1")
    assert not asked  # a rate below 0
    call("run", "--preset", "pocket", "--gradient-checkpointing", "--lora.rank", "8", "--adam-beta1=0.5", "--lr", "1")
    overrides = ["gradient_checkpointing=true", "lora.rank=8", "adam_beta1=0.5", "learning_rate=1"]
    assert asked[0].overrides == overrides
    training = build_config(asked[0].tree, overrides).training
    assert (training.gradient_checkpointing, training.lora.rank, training.learning_rate) == (True, 8, 1.0)


def test_switches_of_sections_are_flags_without_a_value(asked, places):
    switches = ["--model.trust-remote-code", "--data.generated", "--engine.enforce-eager"]
    for switch in switches:
        call("run", "--preset", "pocket", switch)
        assert asked.pop().overrides == [switch.removeprefix("--").replace("-", "_") + "=true"]
    for flag in ("--lora.rank", "--data.path", "--methods.tspin.beta", "--training.nothing"):
        assert_refused(call("run", "--preset", "pocket", flag), f"{flag}: no value")


def test_what_is_named_twice_is_run_once(asked, places):
    call("run", "--model", "pocket", "--data", "pocket", "--methods", "spin,tspin,spin", "--seeds", "0,1,0")
    assert (asked[0].methods, asked[0].seeds) == (["spin", "tspin"], [0, 1])


def test_settings_lists_every_field():
    listed = call("settings").output
    for name in names.preset_fields():
        assert f"\n{name}: " in f"\n{listed}", name
    assert "temperature: NonNegative = 1.0  # of y′ and y0; 0 is greedy" in listed and "data.labels: " in listed
    assert call("settings", "--help").exit_code == 0
    assert call("settings", "lr").output.startswith("learning_rate: ")
    assert "engine.tensor_parallel: PositiveInt = 1  # GPUs" in listed
    assert call("settings", "lora.rank").output.startswith("lora.rank: PositiveInt = 16  # of")


def test_the_version_and_what_shells_complete():
    assert call("--version").output.startswith("tspin 0")
    for words, wanted in {
        "run --preset poc": "pocket",
        "run --methods spin,tspin_n": "spin,tspin_no_history",
        "evaluate --suite smol": "smollm2",
        "plan zephyr-7b-": "zephyr-7b-spin-released",
        "sweep smollm2-l": "smollm2-long",
        "run --learning-rate 1e-5 --preset poc": "pocket",
    }.items():
        said = completing("complete_bash", COMP_WORDS=f"tspin {words}", COMP_CWORD=str(len(words.split())))
        assert wanted in said.split(), words
    for words in ("run --learning-rate ", "run --no-such-option x --m", "run --preset pocket --lora.rank "):
        completing("complete_bash", COMP_WORDS=f"tspin {words}", COMP_CWORD=str(words.count(" ") + 1))
    assert "complete -o default -F" in completing("source_bash")


def completing(what: str, **asked: str) -> str:
    script = "import sys; sys.argv[0] = 'tspin'; from tspin.cli import main; main()"
    environment = {**os.environ, "_TSPIN_COMPLETE": what, **asked}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert not done.stderr, asked
    return done.stdout


def test_a_value_that_types_refuse_is_refused_alike_by_the_config():
    for text in ("temperature=warm", "bf16=atuo", "lora={rnk: 1}", "engine={memory: 2}", "learning_rate=[]", "date=x"):
        messages = []
        for check in (names.check_config, build_config):
            with pytest.raises(UserError) as refused:
                check({}, [text])
            messages.append(str(refused.value))
        assert messages[0] == messages[1], text
