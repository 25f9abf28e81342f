"""How a suite's tasks are asked: as lm-eval's own command asks them, as training writes prompts."""

import json
import math
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import sacrebleu
import torch
import yaml
from asking import (
    ROWS,
    asked_of,
    beginning,
    ending,
    ids,
    suite_of,
    tiny,
    writing,
)
from lm_eval.models.huggingface import HFLM
from test_cli import call
from test_turns import DATED, GEMMA, IM, QWEN_2_5, QWEN_3, byte_level

from tspin.config import load_config
from tspin.errors import UserError
from tspin.evaluation.backend import ENGINES_OWN, SegmentedLM, ServedLM
from tspin.evaluation.harness import evaluate
from tspin.evaluation.suites import Suite, load_suite
from tspin.experiment.preset import Evaluator
from tspin.models import POCKET_MODEL
from tspin.schema import is_share, unit

# The suite's keys


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"enable_thinking": True, "apply_chat_template": True}, "enable_thinking: give think_end_token too"),
        ({"chat_template_args": {"enable_thinking": True}, "apply_chat_template": True}, "give think_end_token too"),
        ({"fewshot_as_multiturn": True}, "fewshot_as_multiturn: .* set apply_chat_template: true"),
        ({"chat_template_args": {"a": 1}}, "chat_template_args: .* set apply_chat_template: true"),
        ({"date": "2024-01-02"}, "date: .* set apply_chat_template: true"),
        ({"gen_kwargs": ["temperature=1"]}, r"gen_kwargs: input should be a valid dictionary \(got"),
        ({"gen_kwarg": {}}, "gen_kwarg: unknown key 'gen_kwarg': did you mean 'gen_kwargs'"),
        ({"columns": [{"benchmark": "gsm8k", "label": "a", "group": "b"}]}, "columns.0.metric: required, and missing"),
        ({"columns": [{"benchmark": "gsm8k", "labell": "a"}]}, "columns.0.labell: unknown key .* mean 'label'"),
    ],
)
def test_what_is_wrong_in_a_suite_is_one_line(tmp_path, keys, told):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"columns": [], **keys}))
    with pytest.raises(UserError, match=f"^{path}: .*{told}") as error:
        load_suite(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"apply_chat_template": True},
        {"apply_chat_template": True, "shots": 2},
        {"apply_chat_template": True, "shots": 2, "fewshot_as_multiturn": False, "system_instruction": "Be brief."},
        {"system_instruction": "Be brief.", "shots": 1},
        {"apply_chat_template": True, "gen_kwargs": {"until": [" "], "max_gen_toks": 5}},
        {"apply_chat_template": True, "gen_kwargs": {"do_sample": True, "temperature": 0.7, "top_p": 0.9}},
        {"apply_chat_template": True, "enable_thinking": False, "chat_template_args": {"other": 1}},
        {"max_length": 24, "gen_kwargs": {"max_gen_toks": 5}},
    ],
    ids=str,
)
def test_the_same_keys_ask_what_lm_eval_asks(tasks, keys):
    """Prompts, responses and scores are those of its own function and class, on a model that ends nothing early."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tokenizer = byte_level(IM, "<|im_end|>", pad="<|endoftext|>", template=QWEN_3)
    model, shots = tiny(tokenizer), keys.get("shots", 0)
    given = {name: value for name, value in keys.items() if name != "shots"}
    suite = suite_of(tasks, "counts", "told", **given)
    columns = [column.model_copy(update={"num_fewshot": shots}) for column in suite.columns]
    found = evaluate(model, tokenizer, suite.model_copy(update={"columns": tuple(columns)}), batch_size=4)
    models = ("enable_thinking", "chat_template_args", "max_length")
    of_model = {name: given.pop(name) for name in models if name in given}
    given.setdefault("fewshot_as_multiturn", bool(given.get("apply_chat_template")))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    loaded = manager.load(["told", "counts"])["tasks"]
    for task in loaded.values():
        task.set_config("num_fewshot", shots)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **of_model)
    samples = simple_evaluate(lm, tasks=[*loaded.values()], bootstrap_iters=0, task_manager=manager, **given)["samples"]
    assert set(samples) == {"counts", "told"}
    for name, theirs in samples.items():
        ours = found.samples[found.samples.task == name]
        assert list(ours.response) == [sample["resps"][0][0] for sample in theirs] and len(ours) == len(ROWS)
        assert list(ours.value) == [100 * sample["exact_match"] for sample in theirs]


def test_a_suite_may_give_a_model_less_context_than_it_has(tasks, capsys):
    tokenizer = byte_level(IM, "<|im_end|>", pad="<|endoftext|>", template=QWEN_3)
    model, suite = tiny(tokenizer), suite_of(tasks, "counts", gen_kwargs={"max_gen_toks": 5})
    own = SegmentedLM(model, suite, tokenizer=tokenizer).max_length
    for asked, given in ((None, own), (24, 24), (own + 1, own)):
        less = suite.model_copy(update={"max_length": asked})
        assert SegmentedLM(model, less, tokenizer=tokenizer).max_length == given
        assert ServedLM(model, less, 0, tokenizer=tokenizer).max_length + ENGINES_OWN == given
    prompts, rows = asked_of(model, tokenizer, suite.model_copy(update={"max_length": 9}))
    assert max(map(len, rows)) == 4 and "a context of 9 tokens has no room" in capsys.readouterr().err


def test_a_key_that_came_later_renames_no_cell_of_a_suite_without_it():
    assert "max_length" not in load_suite("pocket").model_dump(mode="json")
    assert Suite(columns=(), max_length=9).model_dump(mode="json")["max_length"] == 9


def test_generation_settings_are_not_kept_for_the_next_evaluation(tasks):
    tokenizer = byte_level(IM, "<|im_end|>", pad="<|endoftext|>", template=QWEN_3)
    model, suite = tiny(tokenizer), suite_of(tasks, "counts")
    before = evaluate(model, tokenizer, suite, batch_size=4).samples.response
    short = suite.model_copy(update={"gen_kwargs": {"max_gen_toks": 2}})
    assert evaluate(model, tokenizer, short, batch_size=4).samples.response.map(len).max() < before.map(len).max()
    assert list(evaluate(model, tokenizer, suite, batch_size=4).samples.response) == list(before)


@pytest.mark.parametrize("special, by", [(True, str), (True, int), (False, str)])
def test_reasoning_is_no_part_of_a_response(tasks, special, by):
    """It is gone before the task's stop strings are looked for, and does not stop at one either."""
    tokenizer = byte_level([*IM, *(["</think>"] if special else [])], "<|im_end|>", template=QWEN_3)
    model = writing(tokenizer, "Yes, it is.\n\nten</think>five<|im_end|>")
    token = "</think>" if by is str else tokenizer.convert_tokens_to_ids("</think>")
    suite = suite_of(tasks, "counts", apply_chat_template=True, enable_thinking=True, think_end_token=token,
                     gen_kwargs={"until": ["\n\n", "Yes"], "max_gen_toks": 40})  # fmt: skip
    found = evaluate(model, tokenizer, suite, batch_size=4)
    assert set(found.samples.response) == {"five"} and found.scores.value[0] == 25.0
    compares = suite.model_copy(update={"columns": suite_of(tasks, "chooses").columns})
    with pytest.raises(UserError, match=r"^enable_thinking: chooses compare likelihoods"):
        evaluate(model, tokenizer, compares, batch_size=4)


def test_a_template_is_chosen_by_its_name(tasks):
    tokenizer = byte_level(IM, "<|im_end|>", template={"default": QWEN_2_5, "short": "{{ messages[-1].content }}!"})
    lm = SegmentedLM(tiny(tokenizer), suite_of(tasks, "counts", apply_chat_template="short"), tokenizer=tokenizer)
    assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"
    with pytest.raises(UserError, match=r"no template 'long' \(it has: default, short\)"):
        evaluate(tiny(tokenizer), tokenizer, suite_of(tasks, "counts", apply_chat_template="long"), batch_size=4)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="^apply_chat_template: this suite asks for the tokenizer"):
        evaluate(tiny(tokenizer), tokenizer, suite_of(tasks, "counts", apply_chat_template=True), batch_size=4)


def test_messages_that_a_template_refuses_are_one_line(tasks):
    template = "{{ raise_exception('roles must alternate') if messages | length > 1 else 'x' }}"
    tokenizer = byte_level(IM, "<|im_end|>", template=template)
    suite = suite_of(tasks, "counts", apply_chat_template=True)
    columns = tuple(column.model_copy(update={"num_fewshot": 1}) for column in suite.columns)
    with pytest.raises(UserError, match=r"^the tokenizer's chat template refuses a task's messages \(roles must alt"):
        evaluate(tiny(tokenizer), tokenizer, suite.model_copy(update={"columns": columns}), batch_size=4)


# Alike with the run


def test_an_experiment_asks_as_its_runs_write_their_prompts():
    given = ["system_prompt=Be brief.", "chat_template_kwargs={a: 1}", "date=2024-03-02", "turn_end=<|end|>"]
    config = load_config("pocket", given)
    plain = load_suite("pocket")
    found = Evaluator(config, plain).suite
    assert (found.system_instruction, found.chat_template_args) == ("Be brief.", {"a": 1})
    assert (found.date, found.turn_end) == ("2024-03-02", "<|end|>")
    own = Suite(columns=(), apply_chat_template=True, system_instruction=None, date="2020-01-01")
    found = Evaluator(config, own).suite
    assert (found.system_instruction, found.date, found.chat_template_args) == (None, "2020-01-01", {"a": 1})
    found = Evaluator(config, Suite(columns=())).suite  # without a chat template it is lm-eval's plain text
    assert (found.system_instruction, found.date, found.turn_end) == (None, None, "<|end|>")
    with pytest.raises(UserError, match="^evaluation.suite: enable_thinking: give think_end_token"):
        Evaluator(load_config("pocket", ["chat_template_kwargs={enable_thinking: true}"]), plain)


def test_what_an_evaluation_follows_from_is_in_its_record():
    """The run's way of writing prompts is a part of the stage's fingerprint, and of the results' config."""
    suite = load_suite("pocket")
    first, second = (Evaluator(load_config("pocket", given), suite) for given in ([], ["date=2024-03-02"]))
    assert first.results_config()["suite"] != second.results_config()["suite"]
    assert second.results_config()["suite"]["date"] == "2024-03-02"


def test_templates_are_told_the_runs_date(tasks):
    tokenizer = byte_level(IM, "<|im_end|>", template=DATED)
    suite = suite_of(tasks, "counts", apply_chat_template=True, date="2021-03-04")
    prompts, _ = asked_of(tiny(tokenizer), tokenizer, suite)
    assert all("Today: 04 Mar 2021" in prompt for prompt in prompts)


# Units


@pytest.mark.parametrize("template", [GEMMA, None])
def test_perplexities_are_a_plain_computations(tasks, template):
    model, tokenizer = beginning(GEMMA)
    if template is None:  # no begin token: texts begin after the end token, as lm-eval has it
        tokenizer = byte_level(["<|endoftext|>"], "<|endoftext|>")
        model = tiny(tokenizer)
    scores = evaluate(model, tokenizer, suite_of(tasks, "texts"), batch_size=3).scores.set_index("metric")
    rows = map(json.loads, (tasks / "rows.jsonl").read_text().splitlines())
    nats, words, octets = 0.0, 0, 0
    for text in (f"{row['q']} The answer is {row['a']}." for row in rows):
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        tokens = torch.tensor([[begin, *ids(tokenizer, text)]])
        with torch.no_grad():
            logps = model(tokens).logits[0, :-1].log_softmax(dim=-1)
        nats -= float(logps.gather(1, tokens[0, 1:, None]).sum())
        words, octets = words + len(text.split()), octets + len(text.encode())
    assert scores.value["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert scores.value["byte_perplexity,none"] == pytest.approx(math.exp(nats / octets), rel=1e-4)
    assert scores.value["bits_per_byte,none"] == pytest.approx(nats / octets / math.log(2), rel=1e-4)


def test_bleu_and_chrf_are_sacrebleus(tasks, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of lm-eval's bootstrap
    model, tokenizer, _ = ending("gemma")
    suite = suite_of(tasks, "translates", apply_chat_template=True)
    scores = evaluate(model, tokenizer, suite, batch_size=3).scores.set_index("metric")
    answers, responses = ["five", "twelve", "two", "ten"], ["five"] * 4
    assert scores.value["bleu,none"] == pytest.approx(sacrebleu.corpus_bleu(responses, [answers]).score)
    assert scores.value["chrf,none"] == pytest.approx(sacrebleu.corpus_chrf(responses, [answers]).score)
    assert 0 < scores.value["chrf,none"] < 100 and 0 < scores.stderr["chrf,none"] < 100


def test_shares_are_told_from_others():
    shares = """acc acc_norm acc_mutual_info exact_match em prompt_level_strict_acc inst_level_loose_acc rouge1_acc
        rougeL_acc bleu_acc math_verify pct_stereotype pass_at_1 pass@1 r@1 precision accuracy_amb""".split()
    others = """word_perplexity byte_perplexity perplexity bits_per_byte bleu chrf chrf++ ter rouge1 rougeLsum
        rouge2_max rougeL_avg bleu_diff smoothed_bleu_4 brier_score mcc f1 qa_f1_score bertscore_f1_max bert eqbench wer
        percent_parseable likelihood_diff amb_bias_score""".split()
    assert [name for name in shares if not is_share("some", f"{name},none")] == []
    assert [name for name in others if is_share("some", f"{name},none")] == []
    assert not is_share("squadv2", "exact,none") and not is_share("scrolls_quality", "em,none")
    assert unit([("gsm8k", "exact_match,none", "A")]) == "percent"
    assert unit([("a", "acc,none", "A"), ("b", "bleu,none", "B")]) == "percent, but B in lm-eval's units"


# lm-eval's own command


@pytest.mark.parametrize(
    "keys, options",
    [
        ({}, []),
        ({"system_instruction": "Answer in one line.", "gen_kwargs": {"max_gen_toks": 24}, "shots": 2},
         ["--system_instruction", "Answer in one line.", "--gen_kwargs", "max_gen_toks=24", "--fewshot_as_multiturn"]),
    ],
    ids=["plain", "shots and a system instruction"],
)  # fmt: skip
def test_scores_are_those_of_lm_evals_command(tmp_path, keys, options):
    """`python -m lm_eval run` and `tspin evaluate` on the pocket model: the same responses, the same scores."""
    names, limit = ["pocket_gcd", "pocket_chain_sum", "pocket_choice"], 12
    folder = tmp_path / "tasks"
    shutil.copytree(
        POCKET_MODEL.parent / "lm_eval", folder, ignore=lambda _, found: {name for name in found if name not in KEPT}
    )
    shots = keys.get("shots", 0)
    shared = folder / "_pocket_yaml"
    shared.write_text(shared.read_text().replace("num_fewshot: 0", f"num_fewshot: {shots}"))
    (folder / "choice.yaml").write_text(CHOICE.format(shots=shots))
    suite = {
        "include_path": str(folder), "apply_chat_template": True,
        **{name: value for name, value in keys.items() if name != "shots"},
        "columns": [{"benchmark": name, "label": name, "group": "g", "metric": "acc,none"
                     if name == "pocket_choice" else "exact_match,flexible-extract"} for name in names],
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    common = ["-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "12", "--limit", str(limit)]
    model = f"pretrained={POCKET_MODEL},dtype=float32"
    theirs = [*common, "--model_args", model, "--tasks", ",".join(names), "--include_path", str(folder),
              "--apply_chat_template", "--output_path", str(tmp_path / "theirs"), *options]  # fmt: skip
    done = subprocess.run([sys.executable, *theirs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = call("evaluate", "--model", POCKET_MODEL, "--suite", tmp_path / "suite.yaml", "--batch-size", 12,
                "--limit", limit, "--out", tmp_path / "ours.csv")  # fmt: skip
    assert said.exit_code == 0, said.output
    (report,) = (tmp_path / "theirs").glob("**/results_*.json")
    results = json.loads(report.read_text())["results"]
    scores = pd.read_csv(tmp_path / "ours.csv")
    assert set(scores.benchmark) == set(names) and len(scores) == 6
    for row in scores.to_dict("records"):
        value = results[row["benchmark"]][row["metric"]]
        assert row["value"] == pytest.approx(100 * value) and row["n"] == limit
        metric, _, filter_name = row["metric"].partition(",")
        assert row["stderr"] == pytest.approx(100 * results[row["benchmark"]][f"{metric}_stderr,{filter_name}"])
    assert len(set(scores.value)) > 1


KEPT = ("_pocket_yaml", "dataset.py", "gcd.yaml", "chain_sum.yaml")
CHOICE = """\
task: pocket_choice
custom_dataset: !function dataset.load
dataset_kwargs: {{task: gcd}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: ["The answer is 1.", "The answer is 2.", "The answer is 3.", "The answer is 4."]
doc_to_target: 1
num_fewshot: {shots}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
