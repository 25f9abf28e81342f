"""Tasks, suites and tokenizers that the tests of an evaluation ask of models: how responses begin and end."""

import json
from functools import cache
from pathlib import Path

import torch
import yaml
from test_turns import GEMMA, IM, QWEN_2_5, TURN, byte_level
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tspin.evaluation.harness import evaluate
from tspin.evaluation.suites import Column, Suite

ROWS = [{"q": f"How many apples are in basket {n}?", "a": a} for n, a in enumerate(["five", "twelve", "two", "ten"])]


def tiny(tokenizer, **generation) -> LlamaForCausalLM:
    """Random weights, far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(**generation)
    return model


def writing(tokenizer, text: str, *, chat: bool = True, **generation) -> LlamaForCausalLM:
    """A model that has learned to write a text after each of the questions, and goes on after it."""
    prompts = [f"{row['q']}\n" for row in ROWS]
    if chat:
        messages = [[{"role": "user", "content": row["q"]}] for row in ROWS]
        prompts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    contexts = [ids(tokenizer, prompt.rstrip(" ")) for prompt in prompts]
    tokens = torch.tensor([ids(tokenizer, f"{prompt}{text} user") for prompt in prompts])
    first = len(contexts[0]) - 1
    model = tiny(tokenizer, **generation)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(tokens).logits[:, first:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, first + 1 :].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    return model


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def task_file(folder: Path, name: str, kind: str, text: str, target: str, metrics: list[str], **settings) -> None:
    """A task on folder/rows.jsonl, as others write theirs."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    task = {
        "task": name, **data, "test_split": "test", "output_type": kind, "doc_to_text": text, "doc_to_target": target,
        "metric_list": [{"metric": metric} for metric in metrics], "num_fewshot": 0, **settings,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def suite_of(folder: Path, *names: str, **settings) -> Suite:
    columns = [Column(benchmark=name, label=name, group="g", metric="m") for name in names]
    return Suite(columns=tuple(columns), include_path=folder, **settings)


def make_tasks(folder: Path) -> Path:
    """Four rows, and tasks that generate, compare, and measure whole texts."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    until = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    counts = {"generation_kwargs": until}
    task_file(folder, "counts", "generate_until", "{{q}}", "{{a}}", ["exact_match"], **counts)
    task_file(folder, "told", "generate_until", "{{q}}", "{{a}}", ["exact_match"], **counts, description="Well.")
    task_file(folder, "translates", "generate_until", "{{q}}", "{{a}}", ["bleu", "chrf"], **counts)
    task_file(folder, "texts", "loglikelihood_rolling", "", "{{q}} The answer is {{a}}.",
              ["word_perplexity", "byte_perplexity", "bits_per_byte"])  # fmt: skip
    task_file(folder, "chooses", "multiple_choice", "{{q}}", "{{a}}", ["acc", "acc_norm"],
              doc_to_choice=["five", "twelve", "two", "ten"])  # fmt: skip
    return folder


def asked_of(model, tokenizer, suite) -> tuple[list[str], list[list[int]]]:
    """What is asked of a model in an evaluation: texts, and the token ids that reach it."""
    seen = []
    inner = model.generate

    def generate(input_ids, *, attention_mask, **settings):
        if settings.get("past_key_values") is None:
            rows = zip(input_ids, attention_mask, strict=True)
            seen.extend(row[mask.bool()].tolist() for row, mask in rows)
        return inner(input_ids, attention_mask=attention_mask, **settings)

    model.generate = generate
    try:
        evaluate(model, tokenizer, suite, batch_size=3)
    finally:
        del model.generate
    return tokenizer.batch_decode(seen), seen


# The turn's end: by name

# The turn's end, on both back ends

AS_ADDED = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n<|done|>\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def with_added(template: str):
    """A tokenizer whose turns end by a token that was added, but is not special: decoding does not leave it out."""
    tokenizer = byte_level(["<|endoftext|>"], "<|endoftext|>", template=template)
    tokenizer.add_tokens(["<|done|>"])
    return tokenizer


ENDS = {
    "gemma": (byte_level(TURN, "<eos>", "<bos>", "<pad>", GEMMA), "five", "<end_of_turn>", {"eos_token_id": 1}),
    "chatml, no tokens": (byte_level(["<|endoftext|>"], "<|endoftext|>", template=QWEN_2_5), "five", "<|im_end|>", {}),
    "added, not special": (with_added(AS_ADDED), "five", "\n<|done|>", {}),
    "the model's": (byte_level(IM, "<|im_end|>", template=QWEN_2_5), "five", "<|endoftext|>", {"eos_token_id": [0]}),
}  # fmt: skip


@cache
def ending(name: str, chat: bool = True):
    """(model, tokenizer, response): the model writes the response, the turn's end and more."""
    tokenizer, response, end, generation = ENDS[name]
    return writing(tokenizer, f"{response}{end}\n", chat=chat, **generation), tokenizer, response


# The begin token: by name

WITHOUT = GEMMA.replace("{{ bos_token }}", "")
CHATS = {"with": GEMMA, "without": WITHOUT, "both": GEMMA.replace(
    "{{ bos_token }}", "{% if '1' in messages[0].content %}{{ bos_token }}{% endif %}")}  # fmt: skip


def beginning(template: str):
    """A tokenizer that puts a begin token before each text, and a random model."""
    tokenizer = byte_level(TURN, "<eos>", "<bos>", "<pad>", template)
    return tiny(tokenizer), tokenizer


def assert_begun(rows: list[list[int]], tokenizer) -> None:
    assert rows
    for row in rows:
        assert row[0] == tokenizer.bos_token_id and row.count(tokenizer.bos_token_id) == 1, row
