"""What does not fit together is one line before the first sample, and nothing is written; what fits is silent."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from typer.testing import CliRunner

from tspin import SelfPlayConfig, SelfPlayTrainer, cli, fits
from tspin.errors import UserError
from tspin.evaluation.suites import Suite, check_chat_template
from tspin.fits import (
    check_checkpointing,
    check_positions,
    check_router,
    check_softcap,
    check_tokens,
    movable_share,
    position_table,
)
from tspin.models import POCKET_MODEL, load_shape, load_tokenizer
from tspin.sampling import generation_settings

SETTINGS = {"iterations": 1, "max_new_tokens": 6, "batch_size": 4, "bf16": False, "use_cpu": True, "disable_tqdm": True}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDTHS = {"n_embd": 32, "n_layer": 1, "n_head": 4}  # as GPT-2 names them


def trainer(folder, model, rows, tokenizer=None, model_arguments=None, **settings):
    args = SelfPlayConfig(output_dir=str(folder / "run"), **{**SETTINGS, **settings})
    return SelfPlayTrainer(model, args, rows, processing_class=tokenizer, model_arguments=model_arguments)


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    return result.exit_code, result.stderr


def told(capsys) -> list[str]:
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    return [line for line in notes if not re.search("responses end with|columns prompt, completion", line)]


def test_a_pad_token_past_the_embedding(tmp_path, tiny_model, rows, data_file):
    """Added to the tokenizer, and the embedding left as it was."""
    longer = load_tokenizer(str(POCKET_MODEL))
    size = len(longer)
    longer.add_special_tokens({"pad_token": "[PAD]"})
    for saved in (tiny_model, longer):
        saved.save_pretrained(tmp_path / "model")
    line = rf"the pad token is '\[PAD\]' with the id {size}, past the model's embedding of {size} rows: .*{size + 1}"
    for model, given in ((str(tmp_path / "model"), None), (tiny_model, longer)):
        with pytest.raises(UserError, match=line):
            trainer(tmp_path, model, rows, given)
    mine = ("--model", tmp_path / "model", "--data", data_file)
    for arguments in (
        ("sample", "--out", tmp_path / "y.parquet"),
        ("train", "--method", "sft", "--out", tmp_path / "m"),
    ):
        code, errors = call(arguments[0], *mine, *arguments[1:])
        assert code == 2 and errors.count("tspin: ") == 1 and "'[PAD]'" in errors
    code, errors = call("evaluate", "--model", tmp_path / "model")
    assert code == 2 and "the pad token is '[PAD]'" in errors
    assert {path.name for path in tmp_path.iterdir()} == {"model", "data.jsonl"}
    tiny_model.resize_token_embeddings(size + 1)
    trainer(tmp_path, tiny_model, rows, longer)
    tiny_model.resize_token_embeddings(size + 64)  # more rows than tokens do no harm
    trainer(tmp_path, tiny_model, rows, longer)


def test_other_tokens_past_the_embedding(tmp_path, tiny_model, tokenizer):
    rows = tiny_model.get_input_embeddings().num_embeddings
    check_tokens(tiny_model, tokenizer, {"a prompt": rows - 1})
    with pytest.raises(UserError, match=f"^a labelled response has .* with the id {rows}, past the model's embedding"):
        check_tokens(tiny_model, tokenizer, {"a prompt": 1, "a labelled response": rows})


TABLES = {
    "transformer.wpe": lambda: GPT2LMHeadModel(GPT2Config(n_positions=64, vocab_size=64, **WIDTHS)),
    "model.decoder.embed_positions": lambda: OPTForCausalLM(
        OPTConfig(ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=64, vocab_size=64, **SIZES)
    ),
    "transformer.h.0.attn.embed_positions": lambda: GPTJForCausalLM(
        GPTJConfig(n_positions=64, rotary_dim=8, vocab_size=64, **WIDTHS)
    ),
    # Rotary, with as many tokens as positions: no table.
    None: lambda: LlamaForCausalLM(
        LlamaConfig(intermediate_size=32, max_position_embeddings=64, vocab_size=64, **SIZES)
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_positions_are_found_where_models_fail_past_them(name, capsys):
    model = TABLES[name]().eval()
    assert position_table(model, 64) == name
    check_positions(model, 64)
    model(input_ids=torch.zeros((1, 64), dtype=torch.long))
    if name is None:
        model(input_ids=torch.zeros((1, 65), dtype=torch.long))
        check_positions(model, 65)
        (line,) = told(capsys)
        assert "65 tokens long, and the model has 64 positions (max_position_embeddings)" in line
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.zeros((1, 65), dtype=torch.long))
        with pytest.raises(
            UserError, match=rf"65 tokens long, and the model has 64 positions, a table \({name}\): lower"
        ):
            check_positions(model, 65)


def test_rows_that_are_too_long(tmp_path, tokenizer, rows, capsys):
    """The longest prompt with the longest response there may be: of the longest label, or of max_new_tokens."""
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_positions=64, **tokens, **WIDTHS))
    examples = trainer(tmp_path, gpt2, rows, tokenizer).examples
    longest = max(len(example.prompt_ids) for example in examples)
    trainer(tmp_path, gpt2, rows, tokenizer, max_new_tokens=64 - longest)
    with pytest.raises(UserError, match="65 tokens long, and the model has 64 positions, a table"):
        trainer(tmp_path, gpt2, rows, tokenizer, max_new_tokens=65 - longest)
    long = [*rows, {"prompt": "1 + 1 =", "completion": "so " * 64}]
    with pytest.raises(UserError, match="and the model has 64 positions, a table"):
        trainer(tmp_path, gpt2, long, tokenizer)
    assert told(capsys) == [] and not (tmp_path / "run").exists()
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=32, max_position_embeddings=64, **tokens, **SIZES))
    for _ in range(2):  # told once, however many runs it is true of
        trainer(tmp_path, llama, rows, tokenizer, max_new_tokens=80)
    (line,) = told(capsys)
    assert f"{longest + 80} tokens long, and the model has 64 positions (max_position_embeddings)" in line
    trainer(tmp_path, llama, rows, tokenizer, max_new_tokens=64 - longest, sampling_backend="vllm")
    with pytest.raises(UserError, match="65 tokens long, .* 64 positions .*, past which vLLM draws nothing"):
        trainer(tmp_path, llama, rows, tokenizer, max_new_tokens=65 - longest, sampling_backend="vllm")
    with pytest.raises(UserError, match="temperature: 2.5, and vLLM takes 2 at most"):
        trainer(tmp_path, llama, rows, tokenizer, max_new_tokens=8, sampling_backend="vllm", temperature=2.5)


def test_a_shape_is_read_without_memory_or_random_numbers(model_folder, tiny_model):
    state = torch.get_rng_state()
    shape = load_shape(str(model_folder))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: p.shape for name, p in shape.named_parameters()} == {
        name: p.shape for name, p in tiny_model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in shape.parameters())
    (model_folder / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    with pytest.raises(UserError, match="could not be loaded as a model"):
        load_shape(str(model_folder))


def test_schedules_that_are_longer_than_their_training(tmp_path, model_folder, rows, capsys):
    trainer(tmp_path, str(model_folder), rows, warmup_steps=2)
    trainer(tmp_path, str(model_folder), rows, warmup_steps=3, max_steps=4)
    trainer(tmp_path, str(model_folder), rows, batch_size=64)  # a tenth of one step
    assert told(capsys) == []
    trainer(tmp_path, str(model_folder), rows, warmup_steps=3)
    trainer(tmp_path, str(model_folder), rows, warmup_steps=100, batch_size=64)
    first, second = told(capsys)
    assert "warmup_steps is 3, and an iteration has no more than 3 (12 rows in steps of 4): " in first
    assert "the warm-up takes 2 of them" in first and "the warm-up takes 0 of them" in second
    with pytest.raises(UserError, match="dataloader_drop_last: 12 rows make no step of 64: lower batch_size"):
        trainer(tmp_path, str(model_folder), rows, batch_size=64, dataloader_drop_last=True)
    trainer(tmp_path, str(model_folder), rows, batch_size=12, dataloader_drop_last=True)


def test_a_single_step_is_at_the_full_rate(tmp_path, model_folder, rows):
    """Twelve rows and the default of 64 in a step: its warm-up would have been that step, at rate 0."""
    (result,) = trainer(tmp_path, str(model_folder), rows, batch_size=64, learning_rate=1e-3, method="sft").train()
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, result.model_path))
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-4


def test_weights_too_coarse_for_the_rate(tmp_path, model_folder, tiny_model, rows, tokenizer, capsys):
    bfloat16 = {"dtype": torch.bfloat16}
    for model in (str(model_folder), tiny_model):
        shares = {}
        for rate in (1e-6, 1e-4, 1e-2):  # against the definition: every weight, and the number after it
            weights = torch.cat([p.detach().flatten() for p in tiny_model.parameters()]).to(torch.bfloat16).abs()
            after = torch.nextafter(weights, torch.full_like(weights, torch.inf))
            shares[rate] = float((rate >= (after.float() - weights.float()) / 2).float().mean())
            assert movable_share(model, rate) == pytest.approx(shares[rate], abs=1e-6)
        assert shares[1e-6] < 0.01 < shares[1e-4] < 0.5 < shares[1e-2]
    trainer(tmp_path, str(model_folder), rows, model_arguments=bfloat16, learning_rate=1e-2)
    trainer(tmp_path, str(model_folder), rows, model_arguments=bfloat16, learning_rate=1e-4, lora={"rank": 2})
    trainer(tmp_path, str(model_folder), rows, learning_rate=1e-4)
    assert told(capsys) == []
    trainer(tmp_path, str(model_folder), rows, model_arguments=bfloat16, learning_rate=[1e-6, 1e-4])
    (line,) = told(capsys)
    assert f"weights in bfloat16: only for {shares[1e-4]:.1%} of them is learning_rate, 0.0001, at least half" in line
    assert "float32" in line


def test_large_tensors_are_looked_at_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "LOOKED_AT", 10)
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, vocab_size=64, **SIZES))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.flatten()[:10] = 0.0
    assert movable_share(model, 1e-6) == 1.0
    counts = [count for _, count in fits._first_weights(str(tmp_path))]
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())
    assert max(len(weights.flatten()) for weights, _ in fits._first_weights(str(tmp_path))) == 10


def test_a_suite_with_a_template_that_is_not_there(tmp_path, tiny_model, data_file):
    plain = load_tokenizer(str(POCKET_MODEL))
    suite = Suite(columns=(), apply_chat_template=True)
    check_chat_template(suite, plain)
    plain.chat_template = None
    check_chat_template(Suite(columns=()), plain)
    for saved in (tiny_model, plain):
        saved.save_pretrained(tmp_path / "model")
    code, errors = call("evaluate", "--model", tmp_path / "model", "--suite", "pocket")
    assert code == 2 and errors.startswith("tspin: apply_chat_template: ") and errors.count("\n") == 1
    preset = ("--preset", "pocket", "--methods", "base,spin", "--set", f"model.path={tmp_path / 'model'}")
    code, errors = call("run", *preset, "--runs", tmp_path / "runs", "--results", tmp_path / "results")
    assert code == 2 and errors.startswith("tspin: apply_chat_template: ") and errors.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_a_model_without_layers_to_checkpoint():
    class Plain(PreTrainedModel):
        config_class = PreTrainedConfig

    check_checkpointing(TABLES["transformer.wpe"]())
    with pytest.raises(UserError, match="^gradient_checkpointing: Plain has no layers made for it"):
        check_checkpointing(Plain(PreTrainedConfig()))


def test_a_cap_that_sdpa_leaves_out_is_told(capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, num_key_value_heads=2, head_dim=8, **sizes))
    check_softcap(model, {"attn_implementation": "eager"})
    assert not capsys.readouterr().err
    check_softcap(model, {"attn_implementation": "sdpa"})
    assert "leaves out the cap of 50 on the model's attention logits" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_settings_of_sampling_that_do_not_say_so_end_no_training(tmp_path, model_folder, tiny_model, rows, file):
    """As Vicuna's: Transformers reads them and saves no model with them. The checkpoint says what they said."""
    given, other = {"temperature": 0.9, "top_p": 0.6}, model_folder / "generation_config.json"
    if file == "config.json":
        other.unlink()  # they count where there is no file of their own
    path = model_folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))
    tiny_model.generation_config.update(**given)
    for name, model in {"folder": str(model_folder), "model": tiny_model}.items():
        tokenizer = load_tokenizer(str(model_folder))
        (result,) = trainer(tmp_path / name, model, rows, tokenizer, method="sft", diagnostics=False).train()
        kept = generation_settings(str(result.model_path))
        assert (kept.temperature, kept.top_p, kept.do_sample) == (0.9, 0.6, True)


def test_settings_that_no_checkpoint_can_have_are_refused_at_once(tmp_path, model_folder, tiny_model, rows, tokenizer):
    tiny_model.generation_config.length_penalty = 2.0
    path = model_folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "length_penalty": 2.0}))
    for model in (str(model_folder), tiny_model):
        with pytest.raises(UserError, match=r"^generation_config.json: .*`length_penalty`: .*num_beams") as refused:
            trainer(tmp_path, model, rows, tokenizer)
        assert "\n" not in str(refused.value)
    path.write_text(json.dumps({"num_return_sequences": 2}))
    with pytest.raises(UserError, match=r"^generation_config.json: .*num_return_sequences"):
        trainer(tmp_path, str(model_folder), rows)
    assert not (tmp_path / "run").exists()


def test_a_routers_auxiliary_loss_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=2, **sizes)
    check_router(MixtralForCausalLM(config))
    config.output_router_logits = True
    with pytest.raises(UserError, match="output_router_logits"):
        check_router(MixtralForCausalLM(config))
