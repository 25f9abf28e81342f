"""The same tasks asked by vLLM's engines, for which one stands in: the same model, the rules of its settings."""

import sys
import types

import pandas as pd
import pytest
import torch
from asking import CHATS, ENDS, assert_begun, beginning, ending, suite_of, writing
from test_turns import IM, QWEN_2_5, byte_level

from tspin.config import EngineSettings
from tspin.engines import vllm_worker
from tspin.engines.vllm import Served, evaluate_folder
from tspin.errors import UserError
from tspin.evaluation.backend import ENGINES_OWN, ServedLM
from tspin.evaluation.harness import evaluate
from tspin.evaluation.suites import Suite


class Engine:
    """What tspin.engines.vllm_worker asks of vllm.LLM. model, tokenizer, seen: set from outside."""

    model = tokenizer = None
    seen: list[list[int]] = []
    settings: list[dict] = []

    def generate(self, prompts, sampling_params, use_tqdm):
        return [self._answer(prompt, settings) for prompt, settings in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def _answer(self, prompt, settings):
        prompt = prompt["prompt_token_ids"]
        self.seen.append(prompt)
        request = types.SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=0)
        logps = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        if "prompt_logprobs" in settings:
            request.prompt_logprobs = [None] + [
                {token: types.SimpleNamespace(logprob=float(row[token])) for token in (t, int(row.argmax()))}
                for t, row in zip(prompt[1:], logps, strict=False)
            ]
            return request
        if "logprob_token_ids" in settings:
            found = {t: types.SimpleNamespace(logprob=float(logps[-1, t])) for t in settings["logprob_token_ids"]}
            request.outputs = [types.SimpleNamespace(token_ids=[int(logps[-1].argmax())], logprobs=[found])]
            return request
        self.settings.append(settings)
        drawn = []
        while len(drawn) < settings["max_tokens"]:
            drawn.append(int(self.model(torch.tensor([[*prompt, *drawn]])).logits[0, -1].argmax()))
            text = self.tokenizer.decode(drawn, skip_special_tokens=settings["skip_special_tokens"])
            ended = drawn[-1] in [*settings["stop_token_ids"], self.tokenizer.eos_token_id]
            if ended or any(stop in text for stop in settings["stop"]):
                break
        request.outputs = [types.SimpleNamespace(token_ids=drawn)]
        return request


class Engines:
    """tspin.engines.serving.Engines without processes."""

    def __init__(self, command, environments, job):
        self.job = job

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, task, pieces, sizes):
        answer = {"score": vllm_worker._score, "draw": vllm_worker._draw}[task]
        return answer(Engine(), pieces)[0]


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """(model, tokenizer, suite) → scores, samples, and the token ids that reach the engine."""
    stand_in = types.ModuleType("vllm")
    stand_in.SamplingParams = stand_in.TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr("tspin.engines.vllm.Engines", Engines)

    def run(model, tokenizer, suite):
        folder = tmp_path / "served"
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        for name, value in {"model": model, "tokenizer": tokenizer, "seen": [], "settings": []}.items():
            monkeypatch.setattr(Engine, name, value)
        evaluation = evaluate_folder(Served(str(folder), "float32", EngineSettings()), suite, limit=None)
        return evaluation.scores, evaluation.samples, Engine.seen

    return run


@pytest.mark.parametrize("name", ENDS)
def test_vllm_ends_responses_there_too(tasks, vllm, name):
    model, tokenizer, response = ending(name)
    suite = suite_of(tasks, "counts", apply_chat_template=True, gen_kwargs={"max_gen_toks": 30})
    scores, samples, _ = vllm(model, tokenizer, suite)
    assert set(samples.response) == {response} and scores.value[0] == 25.0


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("chat", [True, False])
def test_vllm_is_asked_the_same_tokens(tasks, vllm, name, chat):
    """And answers the same, what generates, compares and measures."""
    model, tokenizer = beginning(CHATS[name])
    suite = suite_of(tasks, "counts", "told", "chooses", "texts", apply_chat_template=chat)
    scores, samples, seen = vllm(model, tokenizer, suite)
    assert_begun(seen, tokenizer)
    ours = evaluate(model, tokenizer, suite, batch_size=3)
    assert list(samples.response.dropna()) == list(ours.samples.response.dropna())
    pd.testing.assert_frame_equal(scores, ours.scores, rtol=1e-4, check_dtype=False)


def test_a_checkpoints_own_penalty_holds_there_too(tasks, vllm):
    """As Transformers heeds it; how it would draw says nothing of what is greedy."""
    model, tokenizer, _ = ending(next(iter(ENDS)))
    model.generation_config.update(repetition_penalty=1.3, top_p=0.9, do_sample=True)
    vllm(model, tokenizer, suite_of(tasks, "counts", apply_chat_template=True))
    (penalties,) = {(each.get("repetition_penalty"), each.get("top_p")) for each in Engine.settings}
    assert penalties == (1.3, None)
    vllm(model, tokenizer, suite_of(tasks, "counts", gen_kwargs={"do_sample": True, "temperature": 1, "num_beams": 1}))
    assert {(each["repetition_penalty"], each["top_p"]) for each in Engine.settings} == {(1.3, 0.9)}
    assert not any("num_beams" in each for each in Engine.settings)
    assert len({each["seed"] for each in Engine.settings}) == len(Engine.settings) > 1


def test_of_tokens_that_are_as_likely_the_first_is_what_greedy_decoding_gives():
    found = {7: types.SimpleNamespace(logprob=-1.5), 3: types.SimpleNamespace(logprob=-1.5)}
    assert vllm_worker._is_likeliest(found, 3) and not vllm_worker._is_likeliest(found, 7)
    found[9] = types.SimpleNamespace(logprob=-1.0)
    assert vllm_worker._is_likeliest(found, 9) and not vllm_worker._is_likeliest(found, 3)


def test_choices_are_asked_with_as_much_context_as_there_is_room_for(capsys):
    model, tokenizer, _ = ending(next(iter(ENDS)))
    lm = ServedLM(model, Suite(columns=(), max_length=10 + ENGINES_OWN), 0, tokenizer=tokenizer)
    pieces = []

    def ask(task, asked, sizes):
        pieces.extend(asked)
        return [[(0.0, True)] * len(piece["continuations"]) for piece in asked]

    lm.ask = ask
    context = list(range(3, 23))
    lm._loglikelihood_tokens([(("", ""), context[:8], [1, 2, 3]), (("", ""), context, [4] * 10)])
    # As by lm-eval's own class: of both, the last eleven tokens, as nothing is asked after the last one.
    assert [(piece["context"], len(piece["continuations"][0])) for piece in pieces] == [
        (context[:8], 3),
        (context[-1:], 10),
    ]
    assert "1 of 2 contexts were scored without their beginnings: a context of 10 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="an answer has 11 tokens, and the context 10"):
        lm._loglikelihood_tokens([(("", ""), context, [4] * 11)])


def test_vllm_has_a_suites_other_keys(tasks, vllm):
    tokenizer = byte_level([*IM, "</think>"], "<|im_end|>")
    tokenizer.chat_template = {"default": "no", "dated": "{{ word }} {{ strftime_now('%Y') }}" + QWEN_2_5}
    number = tokenizer.convert_tokens_to_ids("</think>")
    suite = suite_of(tasks, "counts", apply_chat_template="dated", chat_template_args={"word": "now"},
                     date="2021-01-01", system_instruction="Be brief.", enable_thinking=True,
                     think_end_token=number)  # fmt: skip
    template = "now 2021" + QWEN_2_5.replace("You are Qwen", "Be brief")
    same = byte_level([*IM, "</think>"], "<|im_end|>", template=template)
    _, samples, seen = vllm(writing(same, "Yes,</think>five<|im_end|>"), tokenizer, suite)
    assert set(samples.response) == {"five"}
    begins = "now 2021<|im_start|>system\nBe brief.<|im_end|>"
    assert all(text.startswith(begins) for text in tokenizer.batch_decode(seen))
