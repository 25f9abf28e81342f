"""The config tree: presets load, mistakes are named."""

import json

import pytest

from tspin.config import REPOSITORY, build_config, load_config
from tspin.errors import UserError
from tspin.evaluation.suites import load_suite
from tspin.experiment.preset import results_config, upgraded
from tspin.models import POCKET_MODEL, policy_fingerprint
from tspin.runs.stages import read_json


def test_presets_load():
    config = load_config("pocket")
    assert config.iterations == 5
    assert config.for_method("spin").coefficients.lam == 0.1
    assert config.for_method("tspin").data.labels == 1000
    sft = config.for_method("sft")
    assert sft.iterations == 1 and sft.data.labels == 4000


def test_overrides_and_method_sections_merge():
    tree = {"methods": {"spin": {"training": {"learning_rate": "3e-6"}}}}
    config = build_config(tree, ["training.epochs=3", "methods.tspin.beta=0.5"])
    assert config.for_method("spin").training.learning_rate == 3e-6
    assert config.for_method("spin").training.epochs == config.for_method("tspin").training.epochs == 3
    assert config.for_method("tspin").coefficients.beta == 0.5


@pytest.mark.parametrize(
    "tree, line",
    [
        ({"trainig": {}}, "trainig: unknown key 'trainig': did you mean 'training'?"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat: unknown key .* did you mean 'learning_rate'"),
        ({"methods": {"tspn": {}}}, "unknown method 'tspn': did you mean 'tspin'"),
        ({"methods": {"spin": {"lamda": 1}}}, "methods.spin.lamda: unknown key 'lamda': did you mean 'lam'"),
        ({"methods": {"spin": {"training": {"epoch": 1}}}}, "methods.spin.training.epoch: .* did you mean 'epochs'"),
        ({"sampling": {"top_p": 1.5}}, "sampling.top_p: input should be less than or equal to 1"),
        ({"iterations": 0}, "iterations: input should be greater than 0"),
        ({"data": {"long_prompts": "cut"}}, "data.long_prompts: input should be 'error', 'truncate' or 'drop'"),
    ],
)
def test_mistakes_are_named(tree, line):
    with pytest.raises(UserError, match=line):
        build_config(tree)


def test_unknown_presets_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="unknown preset 'poket': did you mean 'pocket'"):
        load_config("poket")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_config(str(broken))
    broken.write_text("- 1")
    with pytest.raises(UserError, match="a config is a mapping"):
        load_config(str(broken))


def test_results_of_an_earlier_version_are_known():
    """A setting that came later had its default then; a setting that was another stays another."""
    config, suite = load_config("pocket"), load_suite("pocket")
    now = json.loads(json.dumps(results_config(config, suite, "p"), default=str))
    earlier = json.loads(json.dumps(now))
    del earlier["config"]["sampling"]["backend"], earlier["config"]["training"]["lora"]
    for column in earlier["suite"]["columns"]:
        del column["limit"]
    assert upgraded(earlier) == now
    earlier["config"]["sampling"]["temperature"] = 0.5
    assert upgraded(earlier)["config"] != now["config"]
    assert upgraded({"config": {"no such section": 1}}) == {"config": {"no such section": 1}}


def test_the_committed_results_can_be_added_to():
    """In a fresh clone `make reproduce-table1` puts its rows beside the committed ones: no setting stands between."""
    found = upgraded(read_json(REPOSITORY / "results" / "pocket" / "config.json"))
    found["suite"]["include_path"] = "pocket/lm_eval"  # relative to the package since then
    policy = policy_fingerprint(str(POCKET_MODEL))
    wanted = results_config(load_config("pocket"), load_suite("pocket"), policy)
    assert found == json.loads(json.dumps(wanted, default=str))


@pytest.mark.parametrize("name", ["zephyr-7b", "mistral-7b"])
def test_the_papers_presets_are_its_set_up(name):
    """What the digest of the paper states; each line beside it that is a choice of ours says so."""
    config = load_config(name)
    tspin, sft = config.for_method("tspin"), config.for_method("sft")
    assert (config.iterations, tspin.coefficients.alpha, tspin.coefficients.beta) == (5, 1.0, 0.1)
    assert (tspin.data.labels, sft.data.labels) == (50_000, None) and tspin.data.template == "paper"
    assert tspin.data.max_prompt_tokens + tspin.data.max_response_tokens == 2048
    assert (tspin.training.optimizer, tspin.training.weight_decay, tspin.training.warmup) == ("rmsprop", 0.0, 0.1)
    assert tspin.training.batch_size == 64 and config.model.revision and config.data.revision
    assert config.evaluation and len(load_suite(config.evaluation.suite).columns) == 10
    text = (REPOSITORY / "experiments" / "presets" / f"{name}.yaml").read_text()
    for silent in ("learning_rate", "schedule", "epochs", "temperature", "max_new_tokens"):  # the paper does not state
        assert all("ours" in line for line in text.splitlines() if line.strip().startswith(f"{silent}:")), silent
