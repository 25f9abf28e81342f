"""vLLM beside Transformers: the same policy, the same tokens. `make test-vllm` sets up the engine's CPU build."""

import os
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_turns import MODELS, encoded, taught
from transformers import LlamaConfig, LlamaForCausalLM

from tspin import SelfPlayConfig
from tspin.config import Decoding, EngineSettings, load_config
from tspin.data.turns import Stops, stops, turn_end
from tspin.engines.engine import Engine
from tspin.engines.serving import WINDOWS, Engines
from tspin.engines.vllm import (
    WORKER,
    Served,
    Serving,
    _environment,
    context_of,
    evaluate_folder,
    generate_tokens,
    require_vllm,
)
from tspin.errors import UserError
from tspin.evaluation.harness import evaluate
from tspin.evaluation.suites import Suite, load_suite
from tspin.hub.offline import offline_model
from tspin.models import POCKET_MODEL, Policy, load_model, load_tokenizer
from tspin.sampling import sample

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = [
    "What is the capital of France?",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "Write one sentence about the sea.",
    "List three colours.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
]
# float32 on both sides: only the order of additions differs. Largest differences seen: results/benchmarks/vllm.
LOGP_TOLERANCE = 1e-3  # nats a token


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def folder_of(model: str) -> str:
    if model == "pocket":
        return str(POCKET_MODEL)
    offline = os.environ.get("TSPIN_OFFLINE_FOLDER")
    if not offline:
        pytest.skip("TSPIN_OFFLINE_FOLDER names no folder of `tspin fetch smollm2`")
    return str(offline_model(Path(offline), SMOLLM2, None))


def prompts_for(model: str, tokenizer) -> list[list[int]]:
    if model == "pocket":
        texts = [f"{a} + {b} =" for a in (3, 12, 40) for b in (5, 27)]
        return [tokenizer(text)["input_ids"] for text in texts]
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


@needs_vllm
@pytest.mark.parametrize("model", ["pocket", "smollm2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_agree_token_by_token(model, temperature):
    folder = folder_of(model)
    tokenizer, policy = load_tokenizer(folder), load_model(folder).eval()
    prompts = prompts_for(model, tokenizer)
    stop = stops(tokenizer, policy.generation_config, turn_end(tokenizer))
    answers = generate_tokens(
        Served(folder, "float32", EngineSettings(enforce_eager=True)), prompts, stop,
        decoding=Decoding(temperature, 1.0, 48, 64), seed=3, watched=range(len(prompts)),
    )  # fmt: skip
    largest = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer["ids"]])
        with torch.no_grad():
            logps = policy(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        own = logps.gather(1, ids[0, len(prompt) :, None])[:, 0]
        largest = max(largest, float((own - torch.tensor(answer["logprobs"])).abs().max()))
        assert len(answer["ids"]) == 48 or answer["ids"][-1] in stop.tokens
    print(f"{model}, temperature {temperature}: largest difference {largest:.2e} nats a token")
    assert largest < LOGP_TOLERANCE
    if temperature == 0.0:
        greedy = sample(policy, tokenizer, prompts, Decoding(0.0, 1.0, 48, batch_size=64), seed=0)
        assert [answer["ids"] for answer in answers] == [response.ids for response in greedy]


@needs_vllm
@pytest.mark.parametrize("name", ["gemma-2", "chatml, no tokens"])
def test_responses_end_as_labelled_ones(name, tmp_path):
    """By a token that is not the tokenizer's own end, and by a text that ordinary tokens spell."""
    tokenizer, _ = MODELS[name]
    (example,) = encoded(tokenizer, [{"prompt": "How many apples?", "completion": "The answer is twelve."}])
    taught(tokenizer, example, heads=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = SelfPlayConfig(str(tmp_path / "run"), sampling_backend="vllm", temperature=0.0, max_new_tokens=40)
    args.engine = EngineSettings(enforce_eager=True)
    engine = Engine(args, tokenizer, {})
    (drawn,) = engine.sample(Policy(str(tmp_path), ""), [example.prompt_ids], seed=0)
    assert drawn == example.labelled and drawn.logp > -1.0


@needs_vllm
def test_copies_of_the_engine_draw_what_one_draws():
    tokenizer = load_tokenizer(str(POCKET_MODEL))
    prompts = prompts_for("pocket", tokenizer)
    one, two = (
        generate_tokens(
            Served(str(POCKET_MODEL), "float32", EngineSettings(data_parallel=copies, enforce_eager=True)),
            prompts, Stops(turn_end(tokenizer)), decoding=Decoding(1.0, 1.0, 16, 64), seed=5,
        )
        for copies in (1, 2)
    )  # fmt: skip
    assert one.to_list() == two.to_list()


@pytest.fixture
def started(monkeypatch) -> list[Engines]:
    """The engines that were started."""
    found = []

    class Noted(Engines):
        def _start(self):
            if self._thread is None:
                found.append(self)
            super()._start()

    monkeypatch.setattr("tspin.engines.vllm.Engines", Noted)
    return found


@needs_vllm
def test_a_run_samples_and_evaluates_with_vllm(tmp_path, started):
    from tspin.experiment.preset import Where, run_experiment

    overrides = [
        "data.labels=16", "iterations=2", "max_new_tokens=16", "batch_size=8", "evaluation.limit=10",
        "engine.enforce_eager=true", "evaluation.held_out=null",
    ]  # fmt: skip
    scores = {}
    for backend in ("vllm", "transformers"):
        config = load_config("pocket", [*overrides, f"sampling_backend={backend}", f"evaluation.backend={backend}"])
        methods = ["base", "tspin"] if backend == "vllm" else ["base"]
        where = Where(tmp_path / backend / "runs", tmp_path / backend / "results")
        out = run_experiment("pocket", config, methods, [0], where)
        scores[backend] = pd.read_csv(out / "evaluations.csv").query("method == 'base'")["value"].to_numpy()
    # The same base under both engines: at most one problem in ten of one benchmark may tip.
    assert abs(scores["vllm"] - scores["transformers"]).max() <= 10.0
    assert (tmp_path / "vllm/runs/pocket/seed-0/tspin/iteration-1/model/model.safetensors").exists()
    # The base for its evaluation and y0, again for y′; each checkpoint for its evaluation and what is drawn from it.
    assert len(started) == 4 and not any(engines._thread.is_alive() for engines in started)


CHOICES = """\
task: {name}
custom_dataset: !function data.load
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: {choices}
doc_to_target: 1
num_fewshot: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
DATA = """
import datasets

def load(**_):
    rows = [{"question": "Tom has %d apples and Ann has %d. " % (a, b) * 24, "answer": "The answer is %d." % (a + b)}
            for a in range(3) for b in range(4)]
    return {"test": datasets.Dataset.from_list(rows)}
"""
LETTERS, SENTENCES = ["A", "B", "C", "D"], [f"The answer is {word}." for word in ("one", "seven", "four hundred", "no")]


ROLLED = """\
task: rolled
custom_dataset: !function data.load
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: answer
num_fewshot: 0
metric_list: [{metric: word_perplexity}]
"""


def choice_suite(folder) -> Suite:
    folder.mkdir()
    (folder / "data.py").write_text(DATA)
    tasks = {name: CHOICES.format(name=name, choices=of) for name, of in (("letters", LETTERS), ("texts", SENTENCES))}
    for name, text in {**tasks, "rolled": ROLLED}.items():
        (folder / f"{name}.yaml").write_text(text)
    metrics = {"letters": "acc,none", "texts": "acc,none", "rolled": "word_perplexity,none"}
    columns = [{"benchmark": name, "label": name, "group": "g", "metric": of} for name, of in metrics.items()]
    return Suite(include_path=str(folder), columns=columns)


@needs_vllm
def test_engines_score_as_transformers_does_and_a_context_once(tmp_path, monkeypatch):
    """Choices of one token and of several, and rolling texts: every log-probability, whatever the number of engines."""
    suite, tokenizer = choice_suite(tmp_path / "tasks"), load_tokenizer(str(POCKET_MODEL))
    asked, used, answered = [], [], []

    class Noted(Engines):
        def ask(self, task, pieces, sizes):
            answers = super().ask(task, pieces, sizes)
            asked.extend(pieces)
            answered.append([answer for piece in answers for answer in piece])
            used.append(self)
            return answers

    monkeypatch.setattr("tspin.engines.vllm.Engines", Noted)
    monkeypatch.setitem(WINDOWS, "score", 1200)  # several windows for each engine
    engines = [EngineSettings(data_parallel=copies, enforce_eager=True) for copies in (1, 2)]
    found = [evaluate_folder(Served(str(POCKET_MODEL), "float32", engine), suite, limit=None) for engine in engines]
    ours = evaluate(load_model(str(POCKET_MODEL)), tokenizer, suite, batch_size=4)
    for evaluation in found:
        pd.testing.assert_frame_equal(evaluation.scores, ours.scores, rtol=1e-4, check_dtype=False)
        pd.testing.assert_frame_equal(evaluation.samples, ours.samples, rtol=1e-4, check_dtype=False)
    half = len(answered) // 2
    for one, two in zip(answered[:half], answered[half:], strict=True):
        assert [greedy for _, greedy in one] == [greedy for _, greedy in two]
        assert max(abs(a - b) for (a, _), (b, _) in zip(one, two, strict=True)) < LOGP_TOLERANCE
    # A context's choices came together; by tokens that were computed, it was computed once and not for each.
    shared = [piece for piece in asked[: len(asked) // 2] if len(piece["context"]) > 1]
    assert {len(piece["continuations"]) for piece in shared} == {8}  # of both tasks, which ask the same questions
    each = sum(
        len(piece["context"]) + len(tokens) for piece in asked[: len(asked) // 2] for tokens in piece["continuations"]
    )
    assert used[0].computed < 0.45 * each
    assert used[-1] is not used[0] and abs(used[-1].computed / used[0].computed - 1) < 0.2


@needs_vllm
def test_engines_stay_for_what_is_drawn_after_an_evaluation(tmp_path, started):
    """And draw what new ones draw, of prompts that the evaluation asked for too."""
    suite, tokenizer = choice_suite(tmp_path / "tasks"), load_tokenizer(str(POCKET_MODEL))
    served = Served(str(POCKET_MODEL), "float32", EngineSettings(enforce_eager=True, data_parallel=2))
    asked = [f"Tom has {a} apples and Ann has {b}. " * 24 for a in range(3) for b in range(4)]
    prompts = tokenizer(asked)["input_ids"]
    context = context_of(served, suite)

    def drawn(serving: Serving, prompts: list[list[int]]) -> list:
        stop, decoding = Stops(turn_end(tokenizer)), Decoding(1.0, 1.0, 24, 64)
        watched = range(len(prompts))
        return list(generate_tokens(served, prompts, stop, decoding=decoding, seed=5, watched=watched, serving=serving))

    with Serving(context) as serving:
        evaluate_folder(served, suite, limit=None, serving=serving)
        assert started[0]._thread.is_alive() and started[0].computed > 0
        after = drawn(serving, prompts)
        assert len(started) == 1 and not started[0]._thread.is_alive()  # a training has the memory
        assert drawn(serving, prompts) == after and len(started) == 2
    assert drawn(None, prompts) == after and len(started) == 3  # of a run that vLLM does not evaluate


@needs_vllm
def test_continuations_that_begin_alike_are_scored_right():
    """The engine's cache may have a part of a continuation, of which it gives no log-probability."""
    tokenizer, policy = load_tokenizer(str(POCKET_MODEL)), load_model(str(POCKET_MODEL)).eval()
    ids = [3 + n % 50 for n in range(500)]
    pieces = [{"context": ids[:32], "continuations": [ids[32:32 + n] for n in (1, 40, 200, 201, 2)]},
              {"context": ids[:64], "continuations": [ids[64:264]]}]  # fmt: skip
    served = Served(str(POCKET_MODEL), "float32", EngineSettings(enforce_eager=True))
    with Engines(WORKER, [_environment(0, 1)], served.job(320, texts=False, evaluates=True)) as engines:
        for _ in range(2):  # the second time all of it is in the cache
            answers = engines.ask("score", pieces, [500, 300])
            for piece, scored in zip(pieces, answers, strict=True):
                for tokens, (logp, greedy) in zip(piece["continuations"], scored, strict=True):
                    row = torch.tensor([piece["context"] + tokens])
                    with torch.no_grad():
                        logps = policy(row).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
                    wanted = logps.gather(1, row[0, -len(tokens) :, None])
                    assert logp == pytest.approx(float(wanted.sum()), abs=LOGP_TOLERANCE * len(tokens))
                    assert greedy == bool((logps.argmax(-1) == row[0, -len(tokens) :]).all())
    assert tokenizer.eos_token_id is not None


@needs_vllm
def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=2000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path)
    load_tokenizer(str(POCKET_MODEL)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"^vllm: .*\(log: ") as error:
        evaluate_folder(Served(str(tmp_path), "float32", EngineSettings()), load_suite("pocket"), limit=1)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_a_run_says_so_before_it_starts():
    with pytest.raises(UserError, match=r"^sampling_backend: vllm is not installed; pip install"):
        require_vllm("sampling_backend")
