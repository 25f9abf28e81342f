"""Where prompts begin and responses end in an evaluation: one begin token, the turn's end of training."""

import pytest
from asking import CHATS, ENDS, asked_of, assert_begun, beginning, ending, ids, suite_of, writing
from lm_eval.api.instance import Instance
from test_turns import GEMMA, byte_level

from tspin.evaluation.backend import SegmentedLM
from tspin.evaluation.harness import evaluate

PAPER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}"
    "{{ '### Instruction: ' + m.content + '\n\n### Response: ' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_response_ends_where_responses_end_in_training(tasks, monkeypatch, name, sampled, chat):
    model, tokenizer, response = ending(name, chat)
    drawn = {"do_sample": True, "temperature": 0.01} if sampled else {}
    suite = suite_of(tasks, "counts", apply_chat_template=chat, gen_kwargs={"max_gen_toks": 300, "until": [], **drawn})
    if not chat:
        task = (tasks / "counts.yaml").read_text()
        (tasks / "counts.yaml").write_text(task.replace("'{{q}}'", '"{{q}}\\n"'))
    steps = []
    inner = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: steps.append(1) or inner(*args, **kwargs))
    found = evaluate(model, tokenizer, suite, batch_size=4)
    assert set(found.samples.response) == {response} and len(steps) < 40
    assert found.scores.value[0] == 25.0


def test_a_suite_may_name_another_end(tasks):
    model, tokenizer, response = ending("chatml, no tokens")
    suite = suite_of(tasks, "counts", apply_chat_template=True, turn_end="ive")
    assert set(evaluate(model, tokenizer, suite, batch_size=4).samples.response) == {"f"}
    token = {"eos_token_id": ids(tokenizer, response)[0]}
    suite = suite_of(tasks, "counts", apply_chat_template=True, gen_kwargs=token)
    assert set(evaluate(model, tokenizer, suite, batch_size=4).samples.response) == {""}


def test_prompts_that_leave_no_room_are_counted(tasks, capsys):
    model, tokenizer, _ = ending("gemma")
    suite = suite_of(tasks, "counts", apply_chat_template=True, gen_kwargs={"max_gen_toks": 500})
    evaluate(model, tokenizer, suite, batch_size=3)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said.startswith("note: 4 of 4 prompts were asked without their beginnings: a context of 512 ")


def test_a_prompts_last_space_belongs_to_the_response(tasks):
    """A byte-level tokenizer's "Ġ" before "five" is no way to ask for "Ġfive"."""
    tokenizer = byte_level(["<|endoftext|>"], "<|endoftext|>", template=PAPER)
    model = writing(tokenizer, "The answer<|endoftext|>")
    suite = suite_of(tasks, "counts", apply_chat_template=True)
    prompts, _ = asked_of(model, tokenizer, suite)
    assert all(prompt.endswith("### Response:") for prompt in prompts)
    assert set(evaluate(model, tokenizer, suite, batch_size=4).samples.response) == {"The answer"}


# The begin token, once


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("chat", [True, False])
def test_generation_begins_once(tasks, name, chat):
    model, tokenizer = beginning(CHATS[name])
    prompts, rows = asked_of(model, tokenizer, suite_of(tasks, "counts", apply_chat_template=chat))
    assert_begun(rows, tokenizer)
    lm = SegmentedLM(model, tokenizer=tokenizer, batch_size=2)
    for texts in (["<bos>one", "one", "<bos>one two"], ["one", "<bos>one"]):  # lm-eval asks the first one alone
        tokens, mask = lm.tok_batch_encode(texts)
        assert_begun([row[keep.bool()].tolist() for row, keep in zip(tokens, mask, strict=True)], tokenizer)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", ["chooses", "texts"])
def test_likelihoods_begin_once(tasks, monkeypatch, name, chat, task):
    model, tokenizer = beginning(CHATS[name])
    rows = []
    inner = SegmentedLM._loglikelihood_tokens

    def tokens_of(self, requests, *args, **kwargs):
        rows.extend([*context, *continuation] for _, context, continuation in requests)
        return inner(self, requests, *args, **kwargs)

    monkeypatch.setattr(SegmentedLM, "_loglikelihood_tokens", tokens_of)
    evaluate(model, tokenizer, suite_of(tasks, task, apply_chat_template=chat), batch_size=3)
    assert_begun(rows, tokenizer)
    assert len(rows) == {"chooses": 16, "texts": 4}[task]


def test_a_text_that_spells_the_begin_token_begins_once(tasks):
    model, tokenizer = beginning(GEMMA)
    lm = SegmentedLM(model, tokenizer=tokenizer, batch_size=2)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("one", "<bos>one")]
    found = lm.loglikelihood_rolling(requests)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
