"""The 7B presets without their weights: everything but the size is real, and the width is real too.

Meta-device models for the counts; rows of UltraChat's shape through the offline folder and a tokenizer of the same
kind; one step of each method on a layer of 7B width (float32 weights as the presets say, short sequences).
"""

import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tspin.config import load_config
from tspin.data.encoding import encode_dataset
from tspin.data.responses import Response, read_responses, write_responses
from tspin.engines.here import Scoring, Training, score, train
from tspin.experiment.preset import load_dataset, training_arguments
from tspin.hub import offline as hub
from tspin.planning.architectures import find_config, shape_of
from tspin.planning.hardware import Hardware
from tspin.planning.plan import Data, plan
from tspin.schema import PROTO, SYNTHETIC
from tspin.triplets import make_triplets, reference_table, with_reference

PRESETS = ["zephyr-7b", "mistral-7b"]
ROWS = 40
HERE = ["bf16=false", "sampling_backend=transformers"]  # any CPU; vLLM is not needed before a sampling
# Zephyr's, as its tokenizer has it; Mistral's base model has none.
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def conversations() -> list[dict]:
    """Rows of ultrachat_200k: prompt, its hash, and the conversation's messages of several rounds."""
    rows = []
    for number in range(ROWS):
        prompt = f"Explain step {number} of baking bread, and why it matters for the crust."
        said = [prompt, f"Step {number} lets the dough rest.", "And after that?", "Then it is shaped and baked."]
        messages = [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(said)]
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        rows.append({"prompt": prompt, "prompt_id": digest, "messages": messages})
    return rows


@pytest.fixture(scope="module")
def stand_in(conversations) -> PreTrainedTokenizerFast:
    """A tokenizer of Mistral's kind (byte-fallback BPE, <s> before a text, </s> after a response), of these words."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [message["content"] for row in conversations for message in row["messages"]]
    special = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(
        [*texts, "### Instruction: Response:"], trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_bos_token = True
    return tokenizer


@pytest.fixture
def offline(tmp_path, monkeypatch, conversations) -> Path:
    """An offline folder as `tspin fetch` leaves it, with these rows under UltraChat's name."""
    name = "HuggingFaceH4/ultrachat_200k"
    file = f"datasets/{name}/default/train_sft.parquet"
    (tmp_path / file).parent.mkdir(parents=True)
    pd.DataFrame(conversations).to_parquet(tmp_path / file, index=False)
    facts = {"bytes": (tmp_path / file).stat().st_size, "sha256": "0" * 64}
    sets = {name: {"default": {"splits": ["train_sft"], "revision": None}}}
    manifest = {"models": {}, "datasets": sets, "files": {file: facts}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_model_is_the_one_that_was_planned(preset):
    config = load_config(preset)
    shape = shape_of(find_config(config.model.path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_config(config.model.path))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters == 7_241_732_096
    planned = plan(config, Hardware(8, "h100"), Data(rows=200_000))
    assert planned.problem is None and planned.shape == shape


@pytest.mark.parametrize("preset", PRESETS)
def test_ultrachats_first_rounds_become_the_papers_prompts(preset, offline, stand_in, conversations):
    config = load_config(preset, [*HERE, "data.labels=12"])
    stand_in.chat_template = CHAT if preset == "zephyr-7b" else None
    for method in ("spin", "tspin"):
        settings = config.for_method(method)
        args = training_arguments(settings, offline / "run", seed=0)
        examples = encode_dataset(load_dataset(settings.data), stand_in, args)
        assert len(examples) == 12
        for example in examples:
            first = conversations[example.prompt_id]["messages"]
            assert (
                example.prompt == f"### Instruction: {first[0]['content']}\n\n### Response:"
            )  # the space is the response's
            assert example.labelled.text == first[1]["content"] and example.labelled.finished
            assert example.labelled.ids[-1] == stand_in.eos_token_id not in example.prompt_ids
    # SFT takes every row, and the self-play subset is nested in it.
    every = load_dataset(config.for_method("sft").data).read()
    assert len(every) == ROWS and {e.prompt_id for e in examples} <= set(every["number"])


def test_spins_own_rows_bring_its_first_synthetic_responses(tmp_path, stand_in, conversations):
    """Rows of UCLA-AGI/SPIN_iter0: both conversations, as messages; y′ of iteration 0 is theirs."""
    file = tmp_path / "spin.jsonl"
    sides = [
        {"real": row["messages"][:2], "generated": [row["messages"][0], row["messages"][3]]} for row in conversations
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in sides))
    settings = load_config("zephyr-7b-spin-released", [*HERE, f"data.path={file}"]).for_method("spin")
    examples = encode_dataset(load_dataset(settings.data), stand_in, training_arguments(settings, tmp_path, seed=42))
    assert len(examples) == ROWS and examples.generated is not None
    for example, drawn in zip(examples, examples.generated, strict=True):
        said = conversations[example.prompt_id]["messages"]
        assert example.prompt == f"### Instruction: {said[0]['content']}\n\n### Response:"
        assert (example.labelled.text, drawn.text) == (said[1]["content"], said[3]["content"])
        assert drawn.finished and drawn.ids[-1] == stand_in.eos_token_id


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(("preset", "method"), [("zephyr-7b", "tspin"), ("mistral-7b", "spin")])
def test_one_step_at_7b_width(preset, method, offline, stand_in):
    config = load_config(preset, [*HERE, "data.labels=2", "batch_size=2", "num_train_epochs=1", "warmup_steps=0"])
    settings = config.for_method(method)
    args = training_arguments(settings, offline / "run", seed=0)
    examples = encode_dataset(load_dataset(settings.data), stand_in, args)
    shape = find_config(config.model.path)
    shape.num_hidden_layers, shape.vocab_size = 1, len(stand_in)
    assert shape.hidden_size == 4096 and shape.intermediate_size == 14336
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    sampled = {}
    for role, text in {SYNTHETIC: "Then it is baked.", PROTO: "the crust matters"}.items():
        path = offline / f"{role}.parquet"
        response = Response([*stand_in(text)["input_ids"], stand_in.eos_token_id], text, True)
        write_responses(path, examples.prompt_ids, [response] * len(examples))
        sampled[role] = read_responses(path)
    triplets = make_triplets(examples, sampled if method == "tspin" else {SYNTHETIC: sampled[SYNTHETIC]})
    if method == "spin":
        logps = score(model, triplets, Scoring(stand_in, args))
        triplets = with_reference(triplets, reference_table(triplets, logps))
    before = model.model.layers[-1].mlp.down_proj.weight[:4].clone()
    folder = offline / "run"
    facts = train(model, Training(triplets, stand_in, args, 0, checkpoint=folder / "model", log_folder=folder))
    steps = pd.read_parquet(folder / "steps.parquet")
    assert facts["steps"] == 1
    assert torch.isfinite(torch.tensor(steps[["loss", "grad_norm"]].to_numpy())).all()
    moved = (model.model.layers[-1].mlp.down_proj.weight[:4] - before).abs().max()
    assert 0 < moved < 1e-4  # RMSProp's first step is about ten times the rate, 5e-7
    assert (folder / "model" / "model.safetensors").stat().st_size > 0.85e9
    shutil.rmtree(folder / "model")  # pytest would keep it
