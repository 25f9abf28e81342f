"""Mistakes with data, models and machines, and the sentence that each one gets: what is there, what to type."""

import os

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from test_cli import assert_refused, call

from tspin import SelfPlayConfig, SelfPlayTrainer
from tspin.config import EngineSettings, LoraSettings
from tspin.engines.launch import check_launcher
from tspin.engines.scoring import check_gpus
from tspin.errors import UserError
from tspin.hub.offline import _hub_says
from tspin.yaml_files import recipes

KNOWN = (
    "prompt + completion; prompt + chosen; chosen; real; messages; conversations; conversation; instruction + output; "
    "instruction + response; prompt + response; question + answer; query + response"
)
CELLS = " (a table's first line names its columns: these look like the cells of a row)"
SEMICOLON = " (a single one, with ';' in it: a .csv has commas between its cells, a .tsv tabs)"
SMALL = ["--iterations", "1", "--max-new-tokens", "4", "--batch-size", "4"]


@pytest.mark.parametrize(
    "name, text, shown, guessed",
    [
        ("a.jsonl", '{"Prompt": "a", "Completion": 1}', "Prompt, Completion", "prompt: Prompt, completion: Completion"),
        ("a.jsonl", '{"prompts": "a", "completions": "b"}', "prompts, completions",
         "prompt: prompts, completion: completions"),
        ("a.json", '[{"input": "a", "output": "b"}]', "input, output", "prompt: input, completion: output"),
        ("a.csv", "question,response,id\na,b,1\n", "question, response, id", "prompt: question, completion: response"),
        ("a.csv", "promt,completon\na,b\n", "promt, completon", "prompt: promt, completion: completon"),
        ("a.csv", '"a: prompt",answer\na,b\n', "a: prompt, answer", 'prompt: "a: prompt", completion: answer'),
        ("a.jsonl", '{"text": "a b"}', "text", "prompt: …, completion: …"),
        ("a.csv", "What is 1 + 1?,2\nWhat is 2 + 2?,4\n", "What is 1 + 1?, 2" + CELLS, "prompt: …, completion: …"),
        ("a.csv", "prompt;completion\na;b\n", "prompt;completion" + SEMICOLON, "prompt: …, completion: …"),
    ],
)  # fmt: skip
def test_columns_that_are_none(tmp_path, name, text, shown, guessed):
    path = tmp_path / name
    path.write_text(text)
    result = call("run", "--model", "pocket", "--data", path)
    assert_refused(result)
    assert result.stderr.rstrip("\n") == (
        f"tspin: {path}: the columns {shown} are none of the known formats ({KNOWN}): say which hold what: "
        f"--set data.columns='{{{guessed}}}' (in Python: columns=)"
    )


def test_what_is_guessed_can_be_typed(tmp_path, monkeypatch):
    """The line's own words, quoted as a shell would."""
    monkeypatch.setattr("tspin.cli.running.carry_out", lambda asked: None)
    path = tmp_path / "a.csv"
    path.write_text('"a: prompt",answer\na,b\n')
    result = call(
        "run", "--model", "pocket", "--data", path, "--set", 'data.columns={prompt: "a: prompt", completion: answer}'
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == f"note: {path}: the chosen columns a: prompt, answer\n"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.csv", "prompt,completion\na,b\n", "TRL's columns prompt, completion"),
        ("a.jsonl", '{"instruction": "a", "input": "", "output": "b"}', "Alpaca's columns instruction, input, output"),
        ("a.json", '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]',
         "ShareGPT's column conversations"),
        ("a.jsonl", '{"real": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 1}], "generated": 1}',
         "SPIN's column real; generated is not used (data.generated=true takes it as iteration 0's y′)"),
        ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}',
         "TRL's preference columns prompt, chosen; not used: rejected"),
    ],
)  # fmt: skip
def test_how_a_known_format_is_read_is_said_at_once(tmp_path, monkeypatch, name, text, said):
    monkeypatch.setattr("tspin.cli.running.carry_out", lambda asked: None)
    path = tmp_path / name
    path.write_text(text)
    result = call("run", "--model", "pocket", "--data", path)
    assert result.exit_code == 0 and result.stderr == f"note: {path}: {said}\n"


def test_a_model_that_is_not_there(data_file):
    result = call("run", "--model", "nobody/none", "--data", data_file)
    assert_refused(result)
    assert result.stderr.splitlines()[-1] == (
        "tspin: nobody/none: no folder of this name is here, and the hub cannot be reached (LocalEntryNotFoundError): "
        "give the path of a model, or --offline FOLDER"
    )
    assert_refused(call("run", "--model", "~/none", "--data", data_file), "~/none: no such folder, and no hub name")
    result = call("run", "--model", "pocket", "--data", "nobody/none")
    assert_refused(
        result, "data set 'nobody/none': no file or folder of this name is here, and the hub cannot be reached"
    )


def test_what_the_hub_says():
    class ConnectError(Exception):  # httpx's, by the name of its module
        __module__ = "httpx"

    assert _hub_says(ConnectError("[Errno -2]"), "model") == (
        "the hub cannot be reached (ConnectError): give the path of a model, or --offline FOLDER"
    )
    assert _hub_says(LocalEntryNotFoundError("x"), "model").startswith("the hub cannot be reached")
    assert _hub_says(HFValidationError("'a b'"), "model") == (
        "the hub has no such names ('a b'): give OWNER/NAME, or the path of a folder"
    )
    assert _hub_says(ValueError("broken"), "data set") == "the hub's cannot be read (broken)"


def test_prompts_without_a_chat_template_are_said_to_be_the_papers(tmp_path, model_folder, data_file):
    (model_folder / "chat_template.jinja").unlink()
    result = call(
        "run", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out", "--method", "sft", *SMALL
    )
    assert result.exit_code == 0, result.output
    assert (
        "note: responses end with '<|end|>'; there is no chat template, so that prompts are written as "
        "'### Instruction: …\\n\\n### Response:' (--set template=… sets another)\n"
    ) in result.stderr


def test_gpus_that_are_not_there(tmp_path, data_file, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    mine = ["run", "--model", "pocket", "--data", data_file, "--out", tmp_path / "out"]
    result = call(*mine, "--set", "engine.data_parallel=8")
    assert_refused(result)
    assert result.stderr.splitlines()[-1] == (
        "tspin: engine.data_parallel=8, engine.tensor_parallel=1: 8 GPUs are asked for, and this machine has no GPU: "
        "set both so that they make 1, such as --set engine.data_parallel=1 --set engine.tensor_parallel=1"
    )
    assert_refused(
        call(*mine, "--sampling-backend", "vllm"), "sampling_backend: vllm is not installed; pip install 'tsp"
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    result = call(*mine, "--launcher", "accelerate", "--launcher-config", "fsdp2")
    assert_refused(result)
    assert result.stderr.splitlines()[-1] == (
        f"tspin: {recipes() / 'accelerate' / 'fsdp2.yaml'}: num_processes is 8, and this machine has 2 CPU cores and "
        "no GPU: write a lower one into a copy of the file and give it as --launcher-config"
    )
    assert not (tmp_path / "out").exists()


def test_as_many_gpus_as_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    check_gpus(EngineSettings(data_parallel=2, tensor_parallel=2))
    with pytest.raises(UserError, match="8 GPUs are asked for, and this machine has 4 GPUs: set both .* they make 4"):
        check_gpus(EngineSettings(data_parallel=4, tensor_parallel=2))
    check_launcher(recipes() / "accelerate" / "cpu2.yaml", SelfPlayConfig(output_dir=tmp_path))


def test_adapters_take_defaults_in_python():
    assert SelfPlayConfig(lora={"rank": 8}).lora == LoraSettings(rank=8, alpha=32.0, target_modules="all-linear")


def test_a_table_without_results_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(
        call("table", "1"), "results/pocket/suite.json: no such file; make it with: tspin run --preset pocket; or"
    )


def test_results_of_another_model_are_kept(tmp_path, model_folder, data_file):
    mine = ["run", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out", "--method", "sft", *SMALL]
    assert call(*mine).exit_code == 0
    result = call(*mine, "--lr", "1e-3")
    assert_refused(result, "learning_rate is 5e-07 there, 0.001 here): choose another folder by "
                   "--out or --runs, or output_dir in Python, or delete this one")  # fmt: skip


def test_python_and_the_command_line_leave_the_same_files(tmp_path, model_folder, data_file, rows):
    """y0 and the first y′, which methods share, are in shared_dir: Python's is the run's folder unless it is given."""
    settings = {"iterations": 2, "max_new_tokens": 4, "batch_size": 4, "report_to": "none"}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ["run", "--model", model_folder, "--data", data_file, "--out", tmp_path / "cli", "--seed", 3, *flags]
    result = call(*command, "--methods", "spin,tspin")
    assert result.exit_code == 0, result.output
    args = SelfPlayConfig(output_dir=tmp_path / "python", method="tspin", seed=3, disable_tqdm=True, **settings)
    SelfPlayTrainer(str(model_folder), args=args, train_dataset=rows).train()
    of_python, of_command = _files(tmp_path / "python"), _files(tmp_path / "cli" / "tspin")
    shared = _files(tmp_path / "cli" / "shared")
    assert of_python.keys() == of_command.keys() | shared.keys()
    same = {name: content for name, content in of_python.items() if not name.endswith((".json", ".lock"))}
    exact = [name for name in same if not name.endswith("steps.parquet")]  # whose times differ
    assert [name for name in exact if same[name] != {**shared, **of_command}[name]] == []
    assert "iteration-1/model/model.safetensors" in exact and "proto.parquet" in exact


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
