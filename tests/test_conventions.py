"""SelfPlayTrainer as those expect it who know transformers.Trainer: arguments, state, adapters, held-out rows."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, RepoUrl, parse_eval_result_entries
from peft import LoraConfig, PeftModel, PrefixTuningConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState, TrainingArguments

from tspin import SelfPlayConfig, SelfPlayTrainer
from tspin.cards import _origin
from tspin.engines.adapters import lora_settings
from tspin.engines.trackers import check_trackers
from tspin.errors import UserError
from tspin.models import (
    POCKET_MODEL,
    dtype_name,
    load_model,
    load_tokenizer,
    loading_of,
    policy_fingerprint,
    tokenizer_fingerprint,
)
from tspin.objectives import METHODS
from tspin.runs.stages import run_stage
from tspin.states import IterationResult, advance

SETTINGS = {
    "method": "spin",
    "iterations": 2,
    "learning_rate": 1e-2,
    "max_new_tokens": 4,
    "batch_size": 8,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


def trainer_of(folder, model, rows, settings=None, **given) -> SelfPlayTrainer:
    args = SelfPlayConfig(output_dir=str(folder), **{**SETTINGS, **(settings or {})})
    return SelfPlayTrainer(model, args=args, train_dataset=rows, **given)


class Steps(TrainerCallback):
    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


def test_a_run_with_held_out_rows_and_its_state(tmp_path, model_folder, rows):
    """One run: the state of all iterations, −log π(y) of held-out rows, the best by them, one TensorBoard run."""
    settings, held_out = {"best_iteration": "held_out_nll"}, rows[:4]
    trainer = trainer_of(tmp_path / "run", str(model_folder), rows[4:], settings, eval_dataset=held_out)
    counted = Steps()
    trainer.add_callback(counted)
    assert trainer.model is None and trainer.processing_class is trainer.tokenizer
    results = trainer.train()
    steps = [result.training["steps"] for result in results]
    assert counted.count == sum(steps) == trainer.state.global_step

    state = TrainerState.load_from_json(str(tmp_path / "run" / "trainer_state.json"))
    assert state == trainer.state
    training = [entry for entry in state.log_history if "loss" in entry]
    assert [entry["step"] for entry in training] == list(range(1, sum(steps) + 1))
    assert [entry["iteration"] for entry in training] == [t for t, count in enumerate(steps) for _ in range(count)]
    scored = [entry["eval_nll"] for entry in state.log_history if "eval_nll" in entry]
    assert scored == [result.held_out["nll"] for result in results] and state.best_metric == min(scored)
    best = trainer.result_of("best")
    assert best.iteration == int(np.argmin(scored)) and state.best_model_checkpoint == str(best.model_path)
    card = (tmp_path / "run" / "iteration-1" / "card" / "README.md").read_text()
    assert f"torch {results[1].provenance['versions']['torch']}" in card
    kept = json.loads((tmp_path / "run" / "iteration-1" / "held_out.json").read_text())
    assert kept["rows"] == 4 and kept["nll"] > kept["nll_per_token"] > 0
    # The value is that of the checkpoint.
    model = AutoModelForCausalLM.from_pretrained(results[1].model_path)
    nats = []
    for example in trainer.held_out:
        ids = torch.tensor([[*example.prompt_ids, *example.labelled.ids]])
        logps = model(ids).logits.log_softmax(-1)[0, len(example.prompt_ids) - 1 : -1]
        nats.append(-logps.gather(1, torch.tensor(example.labelled.ids)[:, None]).sum().item())
    assert np.mean(nats) == pytest.approx(kept["nll"], rel=1e-4)

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, sum(steps) + 1))

    again = trainer_of(tmp_path / "run", str(model_folder), rows[4:], settings, eval_dataset=held_out)
    for asked in (True, tmp_path / "run"):
        again.train(resume_from_checkpoint=asked)
        assert again.state == state
    with pytest.raises(UserError, match="resume_from_checkpoint=False: .* holds a run already"):
        again.train(resume_from_checkpoint=False)
    with pytest.raises(UserError, match="is not this run's folder"):
        again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3")
    with pytest.raises(UserError, match="best_iteration: .* was begun with held_out_nll"):
        trainer_of(tmp_path / "run", str(model_folder), rows[4:], eval_dataset=held_out).train()


DTYPES = [  # arguments of from_pretrained, and the type of the weights
    ({}, torch.float32),
    ({"dtype": None}, torch.float32),
    ({"dtype": "auto"}, torch.bfloat16),  # the checkpoint's own
    ({"torch_dtype": "auto"}, torch.bfloat16),
    ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
    ({"dtype": "bfloat16", "torch_dtype": torch.bfloat16}, torch.bfloat16),
    ({"dtype": torch.float32}, torch.float32),
]


@pytest.mark.parametrize("given, dtype", DTYPES)
def test_a_type_of_weights_is_had_by_all_its_names(tmp_path, model_folder, tiny_model, tokenizer, rows, given, dtype):
    tiny_model.to(torch.bfloat16).save_pretrained(model_folder)
    assert load_model(str(model_folder), given).dtype == dtype
    for model in (str(model_folder), tiny_model):
        engine = trainer_of(tmp_path / "run", model, rows, model_arguments=given, processing_class=tokenizer).run.engine
        assert dtype_name(engine.loading) == str(dtype).removeprefix("torch.")


def test_no_canary_is_off_in_the_checkpoints_own_type(tmp_path, model_folder, tiny_model, rows):
    tiny_model.to(torch.bfloat16).save_pretrained(model_folder)
    trainer = trainer_of(
        tmp_path / "run", str(model_folder), rows, {"iterations": 1}, model_arguments={"dtype": "auto"}
    )
    (result,) = trainer.train()
    assert trainer.model.dtype == torch.bfloat16
    assert not {"first loss", "first reward", "sampler"} & result.warnings.keys()
    assert json.loads((tmp_path / "run" / "iteration-0" / "guards.json").read_text())["canaries"]["sampler"]["sound"]


def test_types_of_weights_that_are_none_are_refused(model_folder):
    for given, line in (
        ({"dtype": torch.float32, "torch_dtype": torch.bfloat16}, "dtype is torch.float32 and torch_dtype torch.bfloa"),
        ({"dtype": "bf16"}, "dtype is 'bf16': give torch.float32 or torch.bfloat16"),
        ({"torch_dtype": "half precision"}, "dtype is 'half precision': give"),
    ):
        with pytest.raises(UserError, match=f"^model_arguments: {line}"):
            loading_of(str(model_folder), given)
    config = model_folder / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dtype"}))
    with pytest.raises(UserError, match="^model_arguments: dtype is 'auto': give"):
        loading_of(str(model_folder), {"dtype": "auto"})


def test_a_tokenizer_that_has_padded_is_the_same_one():
    """An untouched one has the name that kept examples have in their own."""
    tokenizer = load_tokenizer(str(POCKET_MODEL))
    assert tokenizer_fingerprint(tokenizer) == "82c7ab8f65b9aa34"
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.padding and tokenizer.backend_tokenizer.truncation
    assert tokenizer_fingerprint(tokenizer) == "82c7ab8f65b9aa34"
    assert tokenizer.backend_tokenizer.padding and tokenizer.backend_tokenizer.truncation


def test_what_cannot_be_is_refused_at_construction(tmp_path, model_folder, rows):
    def build(settings=None, **given):
        return trainer_of(tmp_path / "run", str(model_folder), rows, settings, **given)

    with pytest.raises(UserError, match="best_iteration: held_out_nll is of held-out rows"):
        build({"best_iteration": "held_out_nll"})
    with pytest.raises(UserError, match="args: a SelfPlayConfig is needed"):
        SelfPlayTrainer(str(model_folder), args=TrainingArguments(str(tmp_path / "x")), train_dataset=rows)
    with pytest.raises(UserError, match="peft_config: args.lora is given too"):
        build({"lora": {"rank": 2}}, peft_config=LoraConfig())
    with pytest.raises(UserError, match="lora.options: unknown option 'lora_dropout'"):
        build({"lora": {"options": {"lora_dropout": 0.1}}})
    with pytest.raises(UserError, match="no iteration is trained yet"):
        build().result_of("best")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config, line",
    [
        (PrefixTuningConfig(num_virtual_tokens=4), "PrefixTuningConfig is not supported"),
        (LoraConfig(lora_dropout=0.05), "peft_config.lora_dropout: .* set it to 0"),
        (LoraConfig(modules_to_save=["lm_head"]), "peft_config: unknown option 'modules_to_save'"),
        (LoraConfig(init_lora_weights="pissa"), "peft_config.init_lora_weights: 'pissa' changes the weights below"),
    ],
)
def test_adapters_that_cannot_be_are_refused(config, line):
    with pytest.raises(UserError, match=line) as refused:
        lora_settings(config, "llama")
    assert "\n" not in str(refused.value)


def test_a_lora_config_becomes_settings():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    settings = lora_settings(config, "llama")
    assert (settings.rank, settings.alpha, settings.target_modules) == (4, 8.0, ["q_proj", "v_proj"])
    assert settings.options == {"use_rslora": True}
    assert lora_settings(LoraConfig(), "llama").target_modules == ["q_proj", "v_proj"]  # as PEFT has it
    with pytest.raises(UserError, match="target_modules: PEFT knows none for new_model"):
        lora_settings(LoraConfig(), "new_model")


def test_the_adapter_alone_gives_the_merged_checkpoint(tmp_path, model_folder, rows):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_rslora=True)
    trainer = trainer_of(tmp_path / "run", str(model_folder), rows, {"iterations": 1}, peft_config=config)
    [result] = trainer.train()
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(start, tmp_path / "run" / "iteration-0" / "adapter").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(result.model_path)
    for (name, one), (_, other) in zip(adapted.named_parameters(), merged.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert result.training["changed_share"] > 0.9  # of the weights that adapters reach
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["lora"]["options"] == {
        "use_rslora": True
    }


@pytest.mark.parametrize("rule, nll, best", [("last", [3.0, 1.0, 2.0], 2), ("held_out_nll", [3.0, 1.0, 1.0], 1)])
def test_which_iteration_is_the_best(tmp_path, rule, nll, best):
    state = TrainerState()
    for number, value in enumerate(nll):
        folder = tmp_path / f"iteration-{number}"
        folder.mkdir()
        pd.DataFrame([{"loss": 1.0, "step": 1, "epoch": 1.0}]).to_parquet(folder / "steps.parquet")
        result = IterationResult(number, folder / "model", "", training={"steps": 1}, held_out={"nll": value})
        advance(state, result, rule)
    assert Path(state.best_model_checkpoint).parent.name == f"iteration-{best}"
    assert state.best_metric == (nll[best] if rule == "held_out_nll" else None)


def moved(folder: Path, rows: list[dict], **diagnostics: float) -> dict[str, float]:
    pd.DataFrame(rows).to_parquet(folder / "steps.parquet")
    known = {f"log_likelihood_{when}/labelled": value for when, value in diagnostics.items()}
    return IterationResult(0, folder / "model", "", diagnostics=known).moved()


def test_how_much_an_iteration_did(tmp_path):
    log = [{"learning_rate": rate, "log_likelihood/labelled": value} for rate, value in ((1e-3, -9.0), (2e-3, -6.0))]
    assert moved(tmp_path, log, before=-9.0, after=-5.0) == {"learning_rate": 2e-3, "labelled": 4.0}
    assert np.isnan(moved(tmp_path, log)["labelled"])  # each step has prompts of its own


@pytest.fixture
def trained(tmp_path, model_folder, rows):
    """A trainer whose only iteration is there, as if it had been trained and evaluated."""
    trainer = trainer_of(tmp_path / "run", str(model_folder), rows)
    folder = tmp_path / "run" / "iteration-0"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    scores = [{"benchmark": "gsm8k", "metric": "exact_match,strict-match", "value": 12.5, "stderr": 1.0, "n": 80}]
    pd.DataFrame(scores).to_csv(folder / "evaluation" / "scores.csv", index=False)
    facts = {"steps": 2, "tokens": 1234}
    made = {"commit": "abc", "uncommitted_changes": True, "versions": {"torch": "2.0.0"}, "hardware": {"cpu": "a CPU"}}
    told = {"changed": "it stood still"}
    trainer.results = [IterationResult(0, folder / "model", "", training=facts, warnings=told, provenance=made)]
    return trainer


def test_a_model_card_as_the_hub_reads_it(trained, tmp_path):
    trained.save_model(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and {"spin", "self-play"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_value == 12.5 and card.data.model_name == "spin-iteration-0"
    for part in ("| gsm8k | exact_match,strict-match | 12.5000 | 1.0000 | 80 |", "In percent",
                 METHODS["spin"].formula, "- it stood still",
                 "`learning_rate`: `0.01`", "2 optimizer steps", "commit abc with", "torch 2.0.0"):  # fmt: skip
        assert part in card.text, part
    assert not (trained.results[0].model_path / "README.md").exists()  # sealed


def test_what_changes_the_loss_is_in_the_card(trained, tmp_path):
    trained.args.method, trained.args.sft_weight, trained.args.proto_model = "tspin", 0.5, "org/other"
    text = (trained.write_card(trained.results[0]) / "README.md").read_text()
    assert f"\n    0.5 (−log π_θ(y)/|y|) + {METHODS['tspin'].formula}\n" in text and "y0 from org/other)" in text


def test_the_origin_of_a_card(tmp_path):
    folder = tmp_path / "models--org--base" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\ntext\n")
    assert _origin(str(folder)) == {"base_model": "org/base", "license": "apache-2.0"}
    assert policy_fingerprint(str(folder)) == f"models--org--base@{folder.name}"
    own = tmp_path / "snapshots" / "best"  # a user's own folder may change
    own.mkdir(parents=True)
    (own / "weights").write_text("a")
    before = policy_fingerprint(str(own))
    (own / "weights").write_text("b")
    assert _origin(str(own)) == {} and policy_fingerprint(str(own)) != before


@pytest.mark.parametrize("text", [b"---\nlicense: [a\n---\n", b"---\n- mit\n---\n", b"---\nlicense: \xe9\n---\n"])
def test_a_readme_that_cannot_be_read_costs_its_license(tmp_path, capsys, text):
    (tmp_path / "README.md").write_bytes(text)
    assert _origin(str(tmp_path)) == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "README.md: not read" in said


def test_an_upload(trained, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            files = sorted(path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*.*"))
            calls.append((repo_id, files, commit_message))

    monkeypatch.setattr("tspin.cards.HfApi", Api)
    address = trained.push_to_hub("me/policy", token="t", benchmarks={"gsm8k": ("openai/gsm8k", "gsm8k")})
    assert address == "https://huggingface.co/me/policy"
    card = [".eval_results", ".eval_results/gsm8k.yaml", "README.md"]
    said = "spin, iteration 0"
    assert calls == ["t", ("me/policy", ["config.json"], said), ("me/policy", card, said)]
    path = trained.results[0].model_path.parent / "card" / ".eval_results" / "gsm8k.yaml"
    [entry] = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 12.5)
    with pytest.raises(UserError, match="unknown evaluated benchmark 'mmlu'"):
        trained.push_to_hub("me/policy", benchmarks={"mmlu": ("a/b", "c")})
    scores = path.parents[2] / "evaluation" / "scores.csv"
    scores.write_text('benchmark,metric,value,stderr,n\nwikitext,"word_perplexity,none",31.5,,62\n')
    with pytest.raises(UserError, match="wikitext: word_perplexity,none is no share"):
        trained.push_to_hub("me/policy", benchmarks={"wikitext": ("a/b", "c")})


def test_what_is_damaged_is_not_uploaded(trained, monkeypatch):
    monkeypatch.setattr("tspin.cards.HfApi", None)
    model = trained.results[0].model_path

    def make(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    run_stage(model, "its inputs", make)
    (model / "config.json").write_text('{"changed": "afterwards"}')
    with pytest.raises(UserError, match=r"^\S+model was damaged, and is set aside: train\(\) makes it again"):
        trained.push_to_hub("me/policy")
    assert not model.exists()


def test_an_upload_without_a_network_is_one_line(trained):
    with pytest.raises(UserError, match="^me/policy: could not be uploaded .*nothing is lost") as refused:
        trained.push_to_hub("me/policy")  # the tests' environment is offline
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "begun, mode, known, refused",
    [
        (False, "online", False, True),
        (False, None, False, True),
        (False, "online", True, False),
        (True, "online", False, False),  # the caller's run: login() says False within one
        (False, "offline", False, False),
        (False, "disabled", False, False),
    ],
)
def test_who_has_to_log_in_to_wandb(monkeypatch, begun, mode, known, refused):
    stub = SimpleNamespace(
        run=object() if begun else None,
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)),
        login=lambda prompt, verify: known,
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    args = SimpleNamespace(report_to=["wandb"], trackio_space_id=None)
    with pytest.raises(UserError, match="report_to=wandb: no key") if refused else nullcontext():
        check_trackers(args)


def test_the_citation_is_whole():
    content = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text())
    assert content["authors"] == [{"name": "The T-SPIN suite contributors"}] and content["cff-version"] == "1.2.0"
    assert "2601.08198" in content["references"][0]["url"]
