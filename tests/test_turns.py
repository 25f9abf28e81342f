"""How responses begin and end: chat templates of many models, tokenizers of four kinds, likelihoods to the letter."""

import importlib.util
import json
from datetime import date as real_date
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tspin import SelfPlayConfig, SelfPlayTrainer
from tspin.config import Decoding, Rendering
from tspin.data.encoding import encode_examples
from tspin.data.sources import source_of
from tspin.data.templates import Template
from tspin.data.turns import Stops, closing, rendered, stops, turn_end
from tspin.engines.here import Scoring, score
from tspin.errors import UserError
from tspin.sampling import response_of, sample
from tspin.triplets import make_triplets

WORDS = [
    "The answer is twelve. Yes, it is. What is two plus ten? Please say it in one line.",
    "How many apples are in the basket? There are five apples. user assistant system tool model",
    "### Instruction: Tell me a story\n\n### Response: The fox ran. The end.",
]

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN_2_5 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3 = (  # an assistant's last message opens with its thoughts, the generation prompt only where thinking is off
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
SMOLLM_2 = QWEN_2_5.replace("You are Qwen.", "You are a helpful AI assistant named SmolLM.")
DOTS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n...\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + QWEN_2_5

IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TURN = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
HEADERS = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def byte_level(special, eos, bos=None, pad=None, template=None) -> PreTrainedTokenizerFast:
    """Of GPT-2's and Llama 3's kind: a space is part of the word after it. With a begin token, it is put there."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        WORDS * 4,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, bos_token=bos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def sentence_piece(template=None, bos=True) -> PreTrainedTokenizerFast:
    """Of Llama 2's and Mistral's kind: a space is ▁, one is put before each text, unknown characters are bytes."""
    octets = [f"<0x{i:02X}>" for i in range(256)]
    words = sorted({"▁" + word for text in WORDS for word in text.split()})
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *octets], show_progress=False, max_token_length=12
    )
    raw.train_from_iterator([*WORDS * 4, *words * 4, *(word[1:] for word in words)], trainer)
    state = {**json.loads(raw.to_str()), "pre_tokenizer": None}
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    raw = Tokenizer.from_str(json.dumps(state))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer, rows, **given):
    limits = {"max_prompt_length": 512, "max_completion_length": 512}
    return encode_examples(source_of(rows).read(), tokenizer, SelfPlayConfig(**{**limits, **given}))


MODELS = {
    "llama-3": (byte_level(HEADERS, "<|end_of_text|>", "<|begin_of_text|>", None, LLAMA_3), "<|eot_id|>"),
    "gemma-2": (byte_level(TURN, "<eos>", "<bos>", "<pad>", GEMMA), "<end_of_turn>"),
    "phi-3": (byte_level(["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"], "<|endoftext|>", template=PHI_3),
              "<|end|>"),
    "qwen-2.5": (byte_level(IM, "<|im_end|>", pad="<|endoftext|>", template=QWEN_2_5), "<|im_end|>"),
    "qwen-2.5-base": (byte_level(IM, "<|endoftext|>", template=QWEN_2_5), "<|im_end|>"),
    "qwen-3": (byte_level(IM, "<|im_end|>", pad="<|endoftext|>", template=QWEN_3), "<|im_end|>"),
    "mistral": (sentence_piece(MISTRAL), "</s>"),
    "zephyr": (sentence_piece(ZEPHYR), "</s>"),
    "smollm-2": (byte_level(IM, "<|im_end|>", template=SMOLLM_2), "<|im_end|>"),
    "chatml, no tokens": (byte_level(["<|endoftext|>"], "<|endoftext|>", template=QWEN_2_5), "<|im_end|>"),
    "dots": (byte_level(["<|endoftext|>"], "<|endoftext|>", template=DOTS), "\n..."),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_responses_are_the_rendered_conversations_tokens_up_to_the_turns_end(name):
    tokenizer, end = MODELS[name]
    conversation = [{"role": "user", "content": "How many apples?"}, {"role": "assistant", "content": "The answer."}]
    (example,) = encoded(tokenizer, [{"prompt": "How many apples?", "completion": "The answer."}])
    whole = rendered(conversation, tokenizer, Rendering())
    whole = whole[: whole.rindex(end) + len(end)]  # without the line feed after it
    begin = [] if tokenizer.bos_token is None or whole.startswith(tokenizer.bos_token) else [tokenizer.bos_token_id]
    assert example.prompt_ids + example.labelled.ids == begin + tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert turn_end(tokenizer).text == end and tokenizer.decode(example.labelled.ids).endswith(end)
    assert example.labelled.finished and "The answer." in example.labelled.text
    if tokenizer.bos_token:
        assert example.prompt_ids.count(tokenizer.bos_token_id) == 1 and example.prompt_ids[0] == tokenizer.bos_token_id


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL, which ships chat templates, is not installed")
@pytest.mark.parametrize(
    "name, model", [("llama3", "llama-3"), ("gemma", "gemma-2"), ("gemma3", "gemma-2"), ("phi3", "phi-3"),
                    ("qwen2_5", "qwen-2.5"), ("qwen3", "qwen-3")]
)  # fmt: skip
def test_released_templates_end_turns_as_ours_do(name, model):
    tokenizer, end = MODELS[model]
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    released = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token,
                                   bos_token=tokenizer.bos_token)  # fmt: skip
    released.chat_template = (folder / f"{name}.jinja").read_text()
    assert turn_end(released).text == end
    rows = [{"prompt": "How many apples?", "completion": "The answer."}]
    (example,) = examples = encoded(released, rows)
    assert not examples.noted and example.labelled.ids[-1] == turn_end(released).token
    assert example.labelled.text.endswith("The answer.")


def test_the_first_token_is_the_conversations():
    zephyr = sentence_piece(ZEPHYR)
    (example,) = encoded(zephyr, [{"prompt": "How many apples?", "completion": "The answer is twelve."}])
    first = zephyr.convert_ids_to_tokens(example.labelled.ids)[0]
    assert not first.startswith("▁") and "The".startswith(first)
    assert zephyr.decode(example.prompt_ids + example.labelled.ids).endswith("<|assistant|>\nThe answer is twelve.</s>")
    paper = byte_level(IM, "<|endoftext|>")
    (example,) = encoded(paper, [{"prompt": "Tell me a story", "completion": "The fox ran."}])
    assert example.prompt.endswith("### Response:") and paper.convert_ids_to_tokens(example.labelled.ids)[0] == "ĠThe"
    assert example.labelled.text == "The fox ran." and example.labelled.ids[-1] == paper.eos_token_id


def test_thinking_is_of_the_response_or_of_the_prompt():
    tokenizer, _ = MODELS["qwen-3"]
    rows = [{"prompt": "How many?", "completion": "Twelve."}]
    (example,) = encoded(tokenizer, rows)
    assert example.labelled.text == "<think>\n\n</think>\n\nTwelve."
    (example,) = encoded(tokenizer, rows, chat_template_kwargs={"enable_thinking": False})
    assert example.labelled.text == "Twelve." and example.prompt.endswith("</think>\n\n")


def test_the_end_can_be_set():
    tokenizer, _ = MODELS["qwen-2.5"]
    rows = [{"prompt": "How many?", "completion": "Twelve."}]
    (example,) = examples = encoded(tokenizer, rows, turn_end="<|endoftext|>")
    assert example.labelled.ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert examples.remarks[0] == "responses end with '<|endoftext|>'"


def test_a_template_that_leaves_out_the_assistant_is_refused():
    tokenizer = byte_level(IM, "<|im_end|>", template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        turn_end(tokenizer)


def test_the_date_is_the_runs():
    tokenizer = byte_level(IM, "<|im_end|>", template=DATED)
    (example,) = encoded(tokenizer, [{"prompt": "Hi", "completion": "Yes."}], date="2024-02-29")
    assert "Today: 29 Feb 2024" in example.prompt
    assert "Today: 29 Feb 2024" in rendered([{"role": "user", "content": "a"}], tokenizer, Rendering(date="2024-02-29"))


def test_a_system_prompt_is_put_where_there_is_none():
    tokenizer, _ = MODELS["qwen-2.5"]
    asked = {"role": "user", "content": "Hi"}
    own = [{"role": "system", "content": "Mine."}, asked]
    rows = [{"prompt": [asked], "completion": "Yes."}, {"prompt": own, "completion": "Yes."}]
    first, second = encoded(tokenizer, rows, system_prompt="Be short.")
    assert "system\nBe short.<" in first.prompt and "Mine." in second.prompt and "Be short." not in second.prompt
    with pytest.raises(UserError, match="system_prompt: template 'paper' has no place for it"):
        encoded(tokenizer, [{"prompt": "Hi", "completion": "Yes."}], template="paper", system_prompt="Be short.")


def test_prompts_rendered_beforehand_have_one_begin_token():
    gemma, end = MODELS["gemma-2"]
    prompt = rendered([{"role": "user", "content": "Hi"}], gemma, Rendering(), open_turn=True)
    for text in (prompt, prompt.removeprefix("<bos>")):
        (example,) = encoded(gemma, [{"prompt": text, "completion": "Yes."}], template="none")
        assert example.prompt_ids.count(gemma.bos_token_id) == 1 and example.prompt_ids[0] == gemma.bos_token_id
        assert gemma.decode(example.labelled.ids) == f"Yes.{end}"


def test_a_begin_token_that_ends_texts_too_is_kept():
    """OPT's and XGLM's </s>; a tokenizer that closes every text with it writes none before it."""
    for single, begins in (("</s> $A", 1), ("$A </s>", 0), ("</s> $A </s>", 1)):
        tokenizer = byte_level(["</s>"], "</s>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("</s>", tokenizer.eos_token_id)]
        )
        (example,) = encoded(tokenizer, [{"prompt": "Hi", "completion": "Yes."}], template="none")
        assert example.prompt_ids[: begins + 1].count(tokenizer.eos_token_id) == begins
        assert example.prompt_ids.count(tokenizer.eos_token_id) == begins


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}  # fmt: skip
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tools_and_tool_calls_are_rendered_or_refused_with_their_count():
    tokenizer = byte_level(IM, "<|im_end|>", template=TOOL_TEMPLATE)
    asked = {"role": "user", "content": "What is 2+10?"}
    answer = [{"role": "assistant", "content": "Twelve."}]
    rows = [
        {"prompt": [asked], "completion": answer, "tools": TOOLS},
        {"prompt": [asked, CALL, {"role": "tool", "content": "12"}], "completion": answer, "tools": TOOLS},
        {"prompt": [asked], "completion": [CALL], "tools": TOOLS},
    ]
    first, second, third = examples = encoded(tokenizer, rows)
    assert all('"name": "add"' in example.prompt for example in examples)
    assert "<tool_call>" in second.prompt and second.labelled.text == "Twelve."
    assert third.labelled.text.startswith("<tool_call>") and third.labelled.ids[-1] == tokenizer.eos_token_id
    plain, _ = MODELS["smollm-2"]
    with pytest.raises(UserError, match="1 of 2 data rows: .* does not write tools: .* the first is row 2"):
        encoded(plain, [{"prompt": "Hi", "completion": "Yes."}, rows[0]])
    with pytest.raises(UserError, match="does not write tool calls"):
        encoded(plain, [{**rows[1], "prompt": [asked, {**CALL, "content": ""}], "tools": None}])


def test_only_the_turns_end_ends_a_response():
    gemma, _ = MODELS["gemma-2"]
    end = turn_end(gemma)
    stop = stops(gemma, GenerationConfig(eos_token_id=[1, 4]), end)
    assert stop == Stops(end, frozenset({1})) and stop.tokens == [1, 4]
    word = gemma("twelve")["input_ids"][1:]
    assert response_of([*word, 4, 7, 8], stop, gemma).ids == [*word, 4]
    assert response_of([*word, 4, 7, 8], stop, gemma).finished
    other = response_of([*word, 1, 4], stop, gemma)
    assert other.ids == word and not other.finished and other.text == "twelve"
    assert response_of([1], stop, gemma).ids == [1] and not response_of([1], stop, gemma).finished
    assert response_of(word, stop, gemma) == response_of([*word, 1], stop, gemma)


@pytest.mark.parametrize("name", ["gemma-2", "chatml, no tokens"])
def test_sampled_responses_end_as_labelled_ones(name):
    """A model that knows one sentence by heart writes it, its end included, and stops there."""
    tokenizer, _ = MODELS[name]
    (example,) = encoded(tokenizer, [{"prompt": "How many apples?", "completion": "The answer is twelve."}])
    greedy = Decoding(0.0, 1.0, len(example.labelled.ids) + 3, 4)
    (drawn,) = sample(taught(tokenizer, example), tokenizer, [example.prompt_ids], greedy, seed=0)
    assert drawn == example.labelled


def taught(tokenizer, example, heads: int = 4) -> LlamaForCausalLM:
    """A tiny model that knows an example by heart, and would go on after its end."""
    model = llama(tokenizer, heads=heads)
    ids = torch.tensor([example.prompt_ids + example.labelled.ids + [5, 5, 5]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def llama(tokenizer, spare: int = 0, heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + spare, max_position_embeddings=512, **shape)).eval()


KINDS = {
    "byte-level": byte_level(["<|endoftext|>"], "<|endoftext|>"),
    "byte-level, begin token, chat": byte_level(TURN, "<eos>", "<bos>", "<pad>", GEMMA),
    "sentence pieces, pad is the end": sentence_piece(ZEPHYR),
    "sentence pieces, no begin token": sentence_piece(bos=False),
}
KINDS["sentence pieces, pad is the end"].pad_token = "</s>"
MODEL_OF = {kind: llama(tokenizer, spare=7) for kind, tokenizer in KINDS.items()}  # an embedding of spare rows
TEXTS = st.text(st.sampled_from("The answer1 \n\t.,é中</s>▁Ġ"), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_likelihoods_are_those_of_the_conversations_own_tokens(kind, prompts):
    """log π(y) of what training sees is a plain forward's on the tokens of prompt and response together."""
    tokenizer, model = KINDS[kind], MODEL_OF[kind]
    rows = [{"prompt": f"a{prompt}b", "completion": f"{response}c"} for prompt, response in prompts]
    examples = encoded(tokenizer, rows, bf16=False)
    template = Template(tokenizer, Rendering())
    apart = {row for row in examples.noted.get("border", [])}
    assert not set(examples.noted) & {"left_out", "opened_otherwise", "cut"}
    for row, example in zip(rows, examples, strict=True):
        ids = example.prompt_ids + example.labelled.ids
        written = template.write(
            [{"role": "user", "content": row["prompt"]}], {"role": "assistant", "content": row["completion"]}
        )
        (whole,) = template.encode([f"{written.prompt}{written.response}{template.end.text}"], [written.hidden])
        assert ids == whole or example.prompt_id in apart
        assert ids.count(tokenizer.bos_token_id) == len(template.begin)
        assert ids[-1] == turn_end(tokenizer).token and ids.count(ids[-1]) == whole.count(ids[-1])
    logps = score(model, make_triplets(examples, {}), Scoring(tokenizer, SelfPlayConfig(bf16=False)))["labelled"]
    for example, logp in zip(examples, logps, strict=True):
        ids = torch.tensor([example.prompt_ids + example.labelled.ids])
        with torch.no_grad():
            plain = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert logp == pytest.approx(plain[len(example.prompt_ids) - 1 :].sum().item(), abs=1e-3)


def test_a_templates_closing_is_all_that_it_writes():
    phi, _ = MODELS["phi-3"]
    assert closing(phi, Rendering()) == "<|end|>\n<|endoftext|>" and turn_end(phi).text == "<|end|>"


def test_a_run_that_goes_on_the_next_day_is_the_same_run(tmp_path, monkeypatch):
    class Day(real_date):
        shift = 0

        @classmethod
        def today(cls):
            return real_date(2024, 2, 28 + cls.shift)

    monkeypatch.setattr("tspin.runs.dates.date", Day)
    tokenizer = byte_level(IM, "<|im_end|>", pad="<|endoftext|>", template=DATED)
    model = llama(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"How many? {n}", "completion": "Twelve."} for n in range(4)]
    given = {"output_dir": str(tmp_path / "run"), "method": "spin", "batch_size": 4, "max_new_tokens": 4}
    for shift in (0, 1):
        Day.shift = shift
        trainer = SelfPlayTrainer(str(tmp_path / "model"), SelfPlayConfig(iterations=1 + shift, **given), rows)
        assert "28 Feb 2024" in trainer.examples[0].prompt
        assert len(list(trainer.iterate())) == 1 + shift
