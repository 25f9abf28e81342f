"""Settings: presets load, YAML and Python say the same by the same names, mistakes are named."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tspin import SelfPlayConfig, config, names
from tspin.config import EngineSettings, LoraSettings, build_config, coefficients_of, load_config
from tspin.declared import declared as declared_by_source
from tspin.engines.launch import plain_arguments
from tspin.errors import UserError
from tspin.evaluation.suites import load_suite
from tspin.experiment.preset import Evaluator, training_arguments
from tspin.experiment.rerun import load_recorded
from tspin.names import COEFFICIENTS
from tspin.objectives import METHODS
from tspin.runs.files import read_json
from tspin.yaml_files import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_presets_load():
    config = load_config("pocket")
    assert config.training.iterations == 5
    assert coefficients_of(config.for_method("spin").training) == {"lam": 0.1, "loss_type": "logistic"}
    assert config.for_method("tspin").data.labels == 1000
    sft = config.for_method("sft")
    assert sft.training.iterations == 1 and sft.data.labels == 4000 and sft.training.num_train_epochs == 4


def test_names_read_from_the_sources_are_the_fields():
    declared = {field.name: field for field in dataclasses.fields(SelfPlayConfig) if field.init}
    refused = {*names.BY_COMMAND, *COEFFICIENTS, "history", *(name for name in declared if name.endswith("_token"))}
    assert {*names.preset_fields()} == declared.keys() - refused
    ours = [name for name in names.preset_fields() if "operational" in declared[name].metadata]
    assert ours == names.preset_fields()[: len(ours)]
    for section, kind in names.SECTIONS.items():
        if kind is not None:
            assert list(declared_by_source(kind)) == list(getattr(config, kind).model_fields), section


def test_overrides_and_method_sections_merge():
    tree = {"data": {"labels": 9}, "methods": {"spin": {"learning_rate": "3e-6", "data": {"split": "test"}}}}
    config = build_config(tree, ["num_train_epochs=3", "methods.tspin.beta=0.5", "lora={rank: 8}", "lora.alpha=4"])
    spin, tspin = config.for_method("spin"), config.for_method("tspin")
    assert (spin.training.learning_rate, tspin.training.learning_rate) == (3e-6, 5e-7)
    assert spin.training.num_train_epochs == tspin.training.num_train_epochs == 3
    assert (spin.data.labels, spin.data.split, tspin.data.split) == (9, "test", "train")
    assert coefficients_of(tspin.training)["beta"] == 0.5
    assert tspin.training.lora == LoraSettings(rank=8, alpha=4)


@pytest.mark.parametrize("method", METHODS)
def test_yaml_and_python_give_the_same_settings(method, tmp_path):
    coefficients = {name: value for name, value in METHODS[method].resolve({}).items() if value != "logistic"}
    fields = {"temperature": 0.5, "max_prompt_length": 99, "optim": "adamw_torch", "bf16": False, "adam_beta1": 0.8,
              "engine": {"data_parallel": 2}, "lora": {"rank": 4}, "learning_rate": [1e-6, 1e-7]}  # fmt: skip
    tree = {**fields, "methods": {method: {**coefficients, "batch_size": 5}}}
    read = training_arguments(build_config(tree).for_method(method), tmp_path, seed=3)
    written = SelfPlayConfig(
        output_dir=tmp_path, method=method, seed=3, batch_size=5, **fields, **dict.fromkeys(coefficients)
    )
    assert read.computed() == written.computed() and read.coefficients == METHODS[method].resolve({})
    assert read.engine == written.engine == EngineSettings(data_parallel=2)
    assert read.learning_rates == [1e-6, 1e-7] and read.decoding == written.decoding
    # What travels to other processes, and copies, are the same settings.
    again = SelfPlayConfig(**json.loads(json.dumps(plain_arguments(read))))
    assert again.computed() == dataclasses.replace(read, iterations=7).computed() == read.computed()


def test_defaults_are_declared_once():
    read, written = build_config({}).for_method("tspin").training, SelfPlayConfig()
    for name in ("batch_size", "learning_rate", "num_train_epochs", "optim", "warmup_steps", "temperature", "layout"):
        assert getattr(read, name) == getattr(written, name), name
    assert all(declared.metadata.get("help") for declared in dataclasses.fields(SelfPlayConfig) if declared.init)


OF_FIELDS = [  # the same in YAML and in Python
    ({"top_p": 1.5}, "top_p: input should be less than or equal to 1 .got 1.5"),
    ({"temperature": "warm"}, "temperature: input should be a valid number.* .got 'warm'"),
    ({"warmup_steps": float("nan")}, "warmup_steps: input should be a finite number .got nan"),
    ({"iterations": 0}, "iterations: input should be greater than 0"),
    ({"learning_rate": [1e-6, -1]}, "learning_rate: input should be a valid number"),
    ({"bf16": "atuo"}, "bf16: input should be a valid boolean.* or unknown value 'atuo': did you mean 'auto'"),
    ({"long_prompts": "cut"}, "long_prompts: unknown value 'cut': .known: error, truncate, drop"),
    ({"optim": "rmsprp"}, "optim: unknown value 'rmsprp': did you mean 'rmsprop'"),
    ({"engine": {"data_paralel": 1}}, "engine.data_paralel: unknown key .* did you mean 'data_parallel'"),
    ({"lora": {"rank": 0}}, "lora.rank: input should be greater than 0"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: set batch_size instead, 64 triplets"),
    ({"per_device_train_batch_size": 8}, "per_device_train_batch_size: set batch_size instead"),
    ({"sft_weight": -1}, "sft_weight: input should be greater than or equal to 0"),
]
OF_PRESETS = [
    ({"learning_rat": 1}, "learning_rat: unknown key .* did you mean 'learning_rate'"),
    ({"mdel": {}}, "mdel: unknown key 'mdel': did you mean 'model'"),
    ({"model": {"dtype": "float16"}}, "model.dtype: unknown value 'float16': did you mean 'bfloat16'"),
    ({"data": {"lables": 1}}, "data.lables: unknown key 'lables': did you mean 'labels'"),
    ({"data": {"columns": {"promt": "q"}}}, "data.columns.promt: unknown value 'promt': did you mean 'prompt'"),
    ({"methods": {"tspn": {}}}, "unknown method 'tspn': did you mean 'tspin'"),
    ({"methods": {"spin": {"lamda": 1}}}, "methods.spin.lamda: unknown key 'lamda': did you mean 'lam'"),
    ({"methods": {"spin": {"alpha": 1}}}, "methods.spin.alpha: unknown coefficient of spin .*known: lam, loss_type"),
    ({"methods": {"spin": {"num_epochs": 1}}}, "methods.spin.num_epochs: .* did you mean 'num_train_epochs'"),
    ({"methods": {"spin": {"data": {"lables": 1}}}}, "methods.spin.data.lables: .* did you mean 'labels'"),
    ({"methods": {"tspin": {"beta": -1}}}, "methods.tspin.beta: a non-negative number is expected .got -1"),
    ({"methods": {"spin": {"lam": [0.1, 0]}}}, "methods.spin.lam: a positive number is expected .got 0"),
    ({"methods": {"spin": {"lam": []}}}, r"methods.spin.lam: a positive number is expected .got \[\]"),
    ({"methods": {"tspin": {"loss_type": "logistik"}}}, "methods.tspin.loss_type: .* did you mean 'logistic'"),
    ({"methods": {"spin": {"top_p": 0}}}, "methods.spin.top_p: input should be greater than 0"),
    ({"methods": {"spin": 3}}, r"methods.spin: keys with values are expected \(got 3\)"),
    ({"alpha": 1}, "alpha: a coefficient of tspin, .*: write it as methods.tspin.alpha"),
    ({"sft_weight": 1, "methods": {"sft": {}}}, "methods.sft.sft_weight: sft's loss is that term alone: set it in"),
    ({"seed": 1}, "seed: no part of a config: the command gives it, by --seed"),
    ({"methods": {"spin": {"output_dir": "x"}}}, "methods.spin.output_dir: no part of a config"),
    ({"hub_token": "hf_1"}, "hub_token: a secret is no setting"),
    # Keys of earlier versions.
    ({"training": {"learning_rate": 1}}, "training: no section: learning_rate stands at the top level"),
    ({"training": {"optimizer": "sgd"}}, "training: no section: unknown key 'optimizer': did you mean 'optim'"),
    ({"sampling": {"temperature": 1}}, "sampling: no section: temperature stands at the top level"),
    ({"methods": {"spin": {"training": {"bf16": True}}}}, "methods.spin.training: no section: bf16 stands at the top"),
    ({"data": {"template": "chat"}}, "data.template: template stands at the top level, or in methods.<name>"),
    ({"data": {"max_prompt_tokens": 9}}, "data.max_prompt_tokens: unknown key 'max_prompt_tokens'"),
]


@pytest.mark.parametrize("tree, line", OF_FIELDS + OF_PRESETS)
def test_mistakes_are_named(tree, line):
    with pytest.raises(UserError, match=f"^mine.yaml: {line}") as error:
        build_config(tree, source="mine.yaml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields, line", OF_FIELDS)
def test_mistakes_are_named_the_same_in_python(fields, line):
    with pytest.raises(UserError, match=f"^{line}"):
        SelfPlayConfig(**fields)


def test_coefficients_are_the_methods():
    assert SelfPlayConfig(method="tspin", alpha=0.3).coefficients["alpha"] == 0.3
    assert SelfPlayConfig(method="sft").coefficients == {}
    assert SelfPlayConfig(method="spin", lam=[1, 5]).coefficients["lam"] == [1.0, 5.0]
    with pytest.raises(UserError, match="^alpha: unknown coefficient of spin 'alpha': .*known: lam, loss_type"):
        SelfPlayConfig(method="spin", alpha=0.3)
    with pytest.raises(UserError, match="^unknown method 'tspn': did you mean 'tspin'"):
        SelfPlayConfig(method="tspn")
    computed = SelfPlayConfig(method="spin").computed()
    assert computed["lam"] == 0.1 and not computed.keys() & (COEFFICIENTS.keys() - {"lam", "loss_type"})


def test_a_coefficient_has_a_name_of_its_own():
    code = """
from tspin import objectives
taken = objectives.Coefficient("weight_decay", 1.0, "taken", "a test")
objectives.METHODS["mine"] = objectives.Method("mine", "", None, None, objectives.PAIR, (taken,))
import tspin.config
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stderr.splitlines()[-1].startswith("ValueError: weight_decay: a coefficient")


# A method of SimPO's kind with a coefficient that no other method has, as one entry of METHODS.
ADDED = """
import sys
from pathlib import Path
from torch.nn.functional import logsigmoid
from tspin import objectives
from tspin.objectives import LABELLED, SYNTHETIC, Coefficient, Method

objectives.METHODS["orpo"] = Method(
    "orpo",
    "−w log σ(log π_θ(y) − log π_θ(y′))",
    lambda logps, c: -c["odds"] * logsigmoid(logps.policy[LABELLED] - logps.policy[SYNTHETIC]),
    lambda logps, c, role: c["odds"] * logps.policy[role],
    (LABELLED, SYNTHETIC),
    (Coefficient("odds", 0.25, "weight of the odds ratio", "a test"),),
)

from tspin import SelfPlayConfig, SelfPlayTrainer, cli
model, data, out = sys.argv[1:]
small = {"max_new_tokens": 4, "batch_size": 4, "bf16": False, "iterations": 1}
rows = [{"prompt": f"{a} + 1 =", "completion": str(a + 1)} for a in range(8)]
args = SelfPlayConfig(output_dir=f"{out}/python", method="orpo", odds=0.5, use_cpu=True, **small)
assert args.coefficients == {"odds": 0.5}
print(SelfPlayTrainer(model, args=args, train_dataset=rows).train()[0].training["steps"], "steps in Python")
(Path(out) / "mine.yaml").write_text("methods: {orpo: {odds: 0.75}}")
from tspin.config import coefficients_of, load_config
assert coefficients_of(load_config(f"{out}/mine.yaml").for_method("orpo").training) == {"odds": 0.75}
settings = [f"--set={name}={str(value).lower()}" for name, value in {**small, "methods.orpo.odds": 0.5}.items()]
own = ["--model", model, "--data", data, "--method", "orpo", "--iterations", "1", "--out", f"{out}/run"]
cli.app(["run", *own, *settings])
"""


def test_a_method_is_added_by_one_entry(tmp_path, model_folder, data_file):
    command = [sys.executable, "-c", ADDED, str(model_folder), str(data_file), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "2 steps in Python" in done.stdout
    settings = read_json(tmp_path / "run" / "orpo" / "config.json")["settings"]
    assert settings["method"] == "orpo" and settings["odds"] == 0.5 and "alpha" not in settings
    assert (tmp_path / "run" / "orpo" / "iteration-0" / "model" / "model.safetensors").is_file()


def test_unknown_presets_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="unknown preset 'poket': did you mean 'pocket'"):
        load_config("poket")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_config(str(broken))
    broken.write_text("- 1")
    with pytest.raises(UserError, match="broken.yaml: keys with values are expected"):
        load_config(str(broken))


def test_a_tree_is_what_decides_numbers():
    """Written out it is a config again; what changes no number is not in it, however it is said."""
    config = load_config("pocket", ["adam_beta1=0.8", "methods.sft.micro_batch_tokens=7"])
    tree = json.loads(json.dumps(config.tree()))
    assert build_config(tree).tree() == tree
    assert tree["adam_beta1"] == 0.8 and "adam_beta2" not in tree and tree["methods"]["sft"]["num_train_epochs"] == 4
    same = ["micro_batch_tokens=7", "iterations=2", "engine.memory=0.5", "diagnostics=false", "adam_beta2=0.999"]
    assert load_config("pocket", ["adam_beta1=0.8", *same]).tree() == config.tree()
    assert load_config("pocket", ["temperature=0"]).tree() != load_config("pocket").tree()


def test_the_committed_results_can_be_added_to():
    """No setting stands between them and a run of their preset, which Table 1 holds beside them."""
    found = read_json(REPOSITORY / "results" / "reference" / "pocket" / "config.json")
    found.pop("checksum", None)
    wanted = Evaluator(load_config("pocket"), load_suite("pocket")).results_config()
    assert found == json.loads(json.dumps(wanted, default=str))


@pytest.mark.parametrize("preset", ["pocket", "pocket-greedy", "smollm2-tuned", "smollm2-short", "smollm2-long"])
def test_the_committed_results_are_those_of_their_preset(preset):
    recorded = load_recorded(REPOSITORY / "results" / "reference" / preset / "provenance.json", None, None, None)
    assert recorded.config.tree() == load_config(preset).tree()


def test_spins_preset_is_its_authors_release():
    """Every value says which of their files it is from, or that it is ours."""
    name = "zephyr-7b-spin-released"
    config = load_config(name)
    spin = config.for_method("spin")
    training, data = spin.training, spin.data
    assert (data.path, data.generated, data.history) == ("UCLA-AGI/SPIN_iter0", True, 1)
    assert config.model.revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190" and config.model.dtype == "float32"
    assert (training.temperature, training.max_new_tokens, training.sampling_backend) == (0, 256, "transformers")
    assert training.max_prompt_length + training.max_completion_length == 1024
    assert (training.iterations, training.num_train_epochs, training.batch_size) == (4, 6, 64)
    assert training.learning_rate == [5e-7, 5e-7, 1e-7] and training.warmup_steps == 0.1
    spins = METHODS["spin"]
    lam = [spins.coefficients_at(number, coefficients_of(training))["lam"] for number in range(4)]
    assert lam == [0.1, 0.1, 0.1, 5.0]
    lines = (REPOSITORY / "experiments" / "presets" / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if ": " in line.split("#")[0]]
    sources = ("README.md:", ".yaml", ".py", ".sh", "ours", "README.md;")
    assert len(values) > 25 and all(any(source in line.split("#")[1] for source in sources) for line in values)


@pytest.mark.parametrize("name", ["zephyr-7b", "mistral-7b"])
def test_the_papers_presets_are_its_set_up(name):
    """What the digest of the paper states; each line beside it that is a choice of ours says so."""
    config = load_config(name)
    tspin, sft = config.for_method("tspin"), config.for_method("sft")
    coefficients = coefficients_of(tspin.training)
    assert (config.training.iterations, coefficients["alpha"], coefficients["beta"]) == (5, 1.0, 0.1)
    assert (tspin.data.labels, sft.data.labels) == (50_000, None) and tspin.training.template == "paper"
    training = tspin.training
    assert training.max_prompt_length + training.max_completion_length == 2048
    assert (training.optim, training.weight_decay, training.warmup_steps) == ("rmsprop", 0.0, 0.1)
    assert training.batch_size == 64 and config.model.revision and config.data.revision
    assert sft.training.learning_rate == 2e-5
    assert config.evaluation and len(load_suite(config.evaluation.suite).columns) == 10
    text = (REPOSITORY / "experiments" / "presets" / f"{name}.yaml").read_text()
    stated = "num_train_epochs: 2        # as in Fig. 4a"
    # What the paper does not state:
    for silent in ("learning_rate", "lr_scheduler_type", "num_train_epochs", "temperature", "max_new_tokens"):
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith(f"{silent}:")]
        assert lines and all("ours" in line or line == stated for line in lines), silent


def test_a_preset_starts_from_another(tmp_path):
    """Section by section; its own keys come on top, and a circle ends in a line."""
    greedy, pocket = load_config("pocket-greedy"), load_config("pocket")
    assert (greedy.training.temperature, pocket.training.temperature) == (0.0, 1.0)
    assert greedy == load_config("pocket", ["temperature=0.0"])
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: pocket-greedy\nmethods: {tspin: {alpha: 0.1}}\ndata: {labels: 8}\n")
    config = load_config(str(mine))
    assert config.methods["tspin"] == {"alpha": 0.1, "beta": 0.1} and config.methods["spin"] == {"lam": 0.1}
    assert (config.data.path, config.data.labels, config.training.temperature) == ("pocket", 8, 0.0)
    for text, said in {
        "extends: mine.yaml": "in no circle", "extends: [pocket]": "is the name of another preset",
        "extends: pockett": "did you mean 'pocket'", "extends: list.yaml": "which holds no settings",
    }.items():  # fmt: skip
        (tmp_path / "list.yaml").write_text("- 1")
        mine.write_text(text.replace("mine.yaml", str(mine)).replace("list.yaml", str(tmp_path / "list.yaml")))
        with pytest.raises(UserError, match=said):
            load_config(str(mine))
