"""Evaluation through lm-eval: on a tiny random Llama, and on canned responses where what counts is scoring."""

import math
from itertools import islice

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.pocket.pretrain import ANSWER_FORMATS, documents, train_tokenizer
from tspin.errors import UserError
from tspin.evaluation.harness import evaluate, task_manager_for
from tspin.evaluation.suites import Column, Suite, load_suite, tabulated
from tspin.pocket.tasks import (
    LABEL_FORMAT,
    LABELS_PER_TASK,
    TEST_PER_TASK,
    VALIDATION_PER_TASK,
    held_out_questions,
    pool,
    task_settings,
)

FLEXIBLE, STRICT = "exact_match,flexible-extract", "exact_match,strict-match"


@pytest.fixture(scope="module")
def model_and_tokenizer():
    torch.manual_seed(0)
    texts = ("".join(document) for document in islice(documents(noise=0.3, seed=1), 500))
    tokenizer = train_tokenizer(texts, vocab_size=320)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).train(), tokenizer


@pytest.fixture(scope="module")
def suite() -> Suite:
    pocket = load_suite("pocket")
    return pocket.model_copy(update={"columns": pocket.columns[:2]})


@pytest.fixture(scope="module")
def evaluation(model_and_tokenizer, suite):
    return evaluate(*model_and_tokenizer, suite, batch_size=8, limit=4)


@pytest.fixture(scope="module")
def lm_eval_tasks() -> dict:
    """The pocket tasks as lm-eval loads them, by name."""
    suite = load_suite("pocket")
    return task_manager_for(suite).load([column.benchmark for column in suite.columns])["tasks"]


def score(task, doc: dict, response: str) -> dict[str, float]:
    """Filter name → exact match of one response, by lm-eval's own filters and metric."""
    scores = {}
    for ensemble in task._filters:
        filtered = [[response]]
        for filter_class in ensemble.filters:
            filtered = filter_class().apply(filtered, [doc])
        scores[ensemble.name] = task.process_results(doc, list(filtered))["exact_match"]
    return scores


def test_scores_of_every_metric_in_percent(evaluation, suite):
    scores = evaluation.scores
    assert list(scores.columns) == ["benchmark", "metric", "value", "stderr", "n"]
    for column in suite.columns:
        assert set(scores.loc[scores.benchmark == column.benchmark, "metric"]) == {FLEXIBLE, STRICT}
    assert (scores.n == 4).all()
    assert scores.value.isin([0.0, 25.0, 50.0, 75.0, 100.0]).all()


def test_samples_average_to_the_scores(evaluation):
    samples = evaluation.samples
    assert list(samples.columns) == ["benchmark", "task", "doc_id", "metric", "value", "response"]
    grouped = samples.groupby(["benchmark", "metric"]).value
    expected = evaluation.scores.set_index(["benchmark", "metric"])
    pd.testing.assert_series_equal(grouped.mean(), expected.value.sort_index(), check_names=False)
    pd.testing.assert_series_equal(grouped.sem(), expected.stderr.sort_index(), check_names=False)
    assert samples.response.map(type).eq(str).all()


def test_evaluation_leaves_the_training_mode(evaluation, model_and_tokenizer):
    assert model_and_tokenizer[0].training


def test_one_problem_has_no_standard_error(model_and_tokenizer, suite):
    scores = evaluate(*model_and_tokenizer, suite, batch_size=8, limit=1).scores
    assert scores.stderr.map(math.isnan).all()


def test_a_group_has_lm_evals_aggregate_and_its_tasks_samples(model_and_tokenizer, tmp_path):
    data = "custom_dataset: !function dataset.load\ntest_split: test\ndoc_to_text: question\n"
    (tmp_path / "dataset.py").write_text("from tspin.pocket.lm_eval.dataset import load\n")
    for task in ("gcd", "aiw"):
        (tmp_path / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_kwargs: {{task: {task}}}\n{data}doc_to_choice: ['1', '2', '3']\n"
            "doc_to_target: 0\noutput_type: multiple_choice\n"
        )
    aggregate = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]"
    (tmp_path / "pair.yaml").write_text(f"group: pair\ntask: [gcd, aiw]\n{aggregate}\n")
    column = Column(benchmark="pair", label="Pair", group="math", metric="acc,none", num_fewshot=1)
    evaluation = evaluate(*model_and_tokenizer, Suite(columns=(column,), include_path=tmp_path), batch_size=8, limit=4)
    assert evaluation.scores.metric.tolist() == ["acc,none"]
    assert evaluation.scores.n.tolist() == [8]
    accuracies = evaluation.samples[evaluation.samples.metric == "acc,none"]
    assert accuracies.task.tolist() == ["gcd"] * 4 + ["aiw"] * 4
    assert accuracies.value.mean() == evaluation.scores.value[0]
    assert evaluation.samples.response.isna().all()


def test_prompts_follow_the_papers_template(model_and_tokenizer, lm_eval_tasks):
    _, tokenizer = model_and_tokenizer
    task = lm_eval_tasks["pocket_gcd"]
    prompt = task.fewshot_context(
        task.eval_docs[0],
        num_fewshot=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=lambda chat, **options: tokenizer.apply_chat_template(chat, tokenize=False, **options),
    )
    question = pool("test", "gcd", TEST_PER_TASK)[0].question
    assert prompt == f"### Instruction: {question}\n\n### Response: "


def test_split_and_shots_of_a_suite_reach_lm_eval(model_and_tokenizer, monkeypatch):
    seen = {}
    monkeypatch.setattr("lm_eval.evaluate", lambda lm, loaded, **_: seen.update(loaded["tasks"]))
    validation = load_suite("pocket-validation")
    columns = [column.model_copy(update={"num_fewshot": 2}) for column in validation.columns[:1]]
    with pytest.raises(TypeError):  # the stand-in reports nothing
        evaluate(*model_and_tokenizer, validation.model_copy(update={"columns": columns}), batch_size=8)
    task = seen["pocket_chain_sum"]
    assert task.config.num_fewshot == 2
    assert [doc["question"] for doc in task.eval_docs] == [
        problem.question for problem in pool("validation", "chain_sum", VALIDATION_PER_TASK)
    ]


def test_every_answer_is_extracted_in_every_wording(lm_eval_tasks):
    for name, task in lm_eval_tasks.items():
        for doc in task.eval_docs:
            for wording in ANSWER_FORMATS:
                scores = score(task, doc, wording.format(answer=doc["answer"]))
                expected = {"flexible-extract": 1.0, "strict-match": wording == LABEL_FORMAT}
                assert scores == expected, (name, doc, wording)


@pytest.mark.parametrize("answer", ["['3', '-10']", "[]", "-13.0 + 5.0i", "acute, go, hundred", "-1.00", "Yes", "-7"])
def test_extraction_of_unusual_answers(lm_eval_tasks, answer):
    task, doc = lm_eval_tasks["pocket_number_filtering"], {"question": "", "answer": answer}
    both, flexible, neither = ({"flexible-extract": f, "strict-match": s} for f, s in [(1, 1), (1, 0), (0, 0)])
    assert score(task, doc, f"The answer is {answer}.") == both
    assert score(task, doc, f"The answer is {answer}") == flexible
    assert score(task, doc, f"{answer}\nThe answer is 5.") == flexible
    assert score(task, doc, f"The answer is {answer}.\n") == flexible
    assert score(task, doc, f"I know: {answer}") == neither
    assert score(task, doc, f"The answer is {answer}. The answer is 5.") == neither
    assert score(task, doc, "") == neither


def test_pools_share_no_question():
    for task in task_settings():
        test, validation = pool("test", task, TEST_PER_TASK), pool("validation", task, VALIDATION_PER_TASK)
        labels = pool("labels", task, LABELS_PER_TASK)
        questions = [problem.question for problem in (*test, *validation, *labels)]
        assert len(set(questions)) == TEST_PER_TASK + VALIDATION_PER_TASK + LABELS_PER_TASK


def test_pretraining_asks_no_test_or_validation_question():
    held_out = set().union(*(held_out_questions("pretraining", task) for task in task_settings()))
    for prompt, _ in islice(documents(noise=0.3, seed=0), 3000):
        texts = {prompt, prompt.strip(), prompt[3:].removesuffix("\nA: ")}
        texts.add(prompt.removeprefix("### Instruction: ").removesuffix("\n\n### Response: "))
        assert not texts & held_out


def test_tabulated_keeps_the_columns_metrics_in_table_order(evaluation, suite):
    backwards = suite.model_copy(update={"columns": suite.columns[::-1]})
    table = tabulated(evaluation.scores, backwards)
    assert list(table.benchmark) == ["pocket_simple_equations", "pocket_chain_sum"]
    assert set(table.metric) == {FLEXIBLE}
    unknown = suite.columns[0].model_copy(update={"metric": "acc,none"})
    with pytest.raises(UserError, match="acc,none.*exact_match,flexible-extract"):
        tabulated(evaluation.scores, suite.model_copy(update={"columns": (unknown,)}))


def test_suites_extend_and_name_their_mistakes(tmp_path):
    assert load_suite("pocket-validation") == load_suite("pocket").model_copy(update={"split": "validation"})
    with pytest.raises(UserError, match="did you mean 'pocket'"):
        load_suite("pockett")
    file = tmp_path / "mine.yaml"
    file.write_text("extends: pocket\nchat_template: true\n")
    twice = "{benchmark: gsm8k, label: %s, group: math, metric: 'exact_match,none'}"
    other = tmp_path / "twice.yaml"
    other.write_text(f"columns: [{twice % 'A'}, {twice % 'B'}]\n")
    with pytest.raises(UserError, match="gsm8k is there twice; evaluations.csv has all of a benchmark's metrics"):
        load_suite(other)
    with pytest.raises(UserError, match="chat_template: unknown key .* did you mean 'chat_template_args'"):
        load_suite(file)
    wrong = load_suite("pocket").columns[0].model_copy(update={"benchmark": "gsm8kk"})
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        task_manager_for(Suite(columns=(wrong,)))


def test_the_papers_benchmarks_and_metrics_exist_in_lm_eval():
    suite = load_suite("paper")
    assert len(suite.columns) == 10
    index = task_manager_for(suite).task_index
    for column in suite.columns:
        metric, _, filter_name = column.metric.partition(",")
        settings = index[column.benchmark].cfg
        metrics = settings.get("metric_list") or settings["aggregate_metric_list"]
        assert metric in [entry["metric"] for entry in metrics]
        assert filter_name in [entry["name"] for entry in settings.get("filter_list", [{"name": "none"}])]


@pytest.mark.parametrize("until", [[], ["1", " the"]])
def test_segmented_decoding_is_lm_evals_own(monkeypatch, tokenizer, until):
    """The same responses as HFLM's, with and without stop strings, from a model that ends at different lengths."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tspin.evaluation.backend import SegmentedLM
    from tspin.models import EMBEDDED, load_model

    monkeypatch.setattr("tspin.sampling.FIRST_SEGMENT", 3)
    model = load_model(str(EMBEDDED["pocket-cold"]))
    texts = [f"### Instruction: What is {a} + {a + 7}?\n\n### Response: " for a in range(12)]
    requests = [Instance("generate_until", {}, (text, {"until": until, "max_gen_toks": 24}), i)
                for i, text in enumerate(texts)]  # fmt: skip
    found = [
        backend(pretrained=model, tokenizer=tokenizer, batch_size=5).generate_until(requests)
        for backend in (SegmentedLM, HFLM)
    ]
    assert found[0] == found[1] and len(set(map(len, found[0]))) > 1


def test_a_column_may_ask_fewer_problems(model_and_tokenizer):
    suite = load_suite("pocket")
    first, second = suite.columns[:2]
    suite = suite.model_copy(update={"columns": (first.model_copy(update={"limit": 2}), second)})
    found = evaluate(*model_and_tokenizer, suite, batch_size=8, limit=3)
    asked = found.samples.groupby("benchmark")["doc_id"].unique().map(sorted)
    assert asked[first.benchmark] == [0, 1] and asked[second.benchmark] == [0, 1, 2]
    assert dict(found.scores.groupby("benchmark")["n"].first()) == {first.benchmark: 2, second.benchmark: 3}
