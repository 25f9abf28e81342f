"""What data, checkpoints and the environment must not reach: a program, or a file of results."""

import json
import pickle
import re
from pathlib import Path

import pytest
from test_cli import SMALL, assert_refused, call

from tspin.config import Config, build_config
from tspin.errors import UserError
from tspin.runs.redaction import redacted

ROOT = Path(__file__).resolve().parents[1]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_and_not_read(tmp_path, model_folder, data_file):
    sprung = tmp_path / "sprung"
    (model_folder / "model.safetensors").unlink()
    own = ["sample", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out.parquet", *SMALL]
    for name in ("pytorch_model.bin", "model.pt"):
        (model_folder / name).write_bytes(pickle.dumps(Trap(sprung)))
        assert_refused(call(*own), name, "safetensors")
        (model_folder / name).unlink()
    assert not sprung.exists() and not (tmp_path / "out.parquet").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path, model_folder, data_file):
    assert Config().model.trust_remote_code is False
    sprung = tmp_path / "sprung"
    settings = json.loads((model_folder / "config.json").read_text())
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (model_folder / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": auto}))
    (model_folder / "code.py").write_text(f"open({str(sprung)!r}, 'w')")
    own = ["sample", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out.parquet", *SMALL]
    assert_refused(call(*own), "could not be loaded")
    assert not sprung.exists()


def test_secrets_are_neither_written_nor_said(tmp_path, model_folder, data_file, monkeypatch):
    secrets = {name: f"s3cret-value-of-{name}" for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY",
               "MY_PASSWORD", "SOME_KEY")}  # fmt: skip
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    login = "https://me:hunter2-hunter2@example.org/model"
    monkeypatch.setattr("sys.argv", ["tspin", "run", *secrets.values(), login])
    from tspin.runs.provenance import provenance

    provenance.cache_clear()
    out = tmp_path / "run"
    own = ["run", "--data", data_file, "--out", out, "--method", "sft", *SMALL]
    said = [call(*own, "--model", model_folder).output]
    assert list(out.rglob("*.stage.json"))
    for value in [*secrets.values(), login]:
        failed = call("run", "--model", value, "--data", data_file, "--out", tmp_path / "failed", *SMALL)
        assert_refused(failed, "[redacted]")
        said.append(failed.output)
    provenance.cache_clear()
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file()) + "".join(said).encode()
    for value in [*secrets.values(), "hunter2-hunter2"]:
        assert value.encode() not in written
    assert redacted("a hf_" + "a" * 34) == "a [redacted]"


def test_the_lock_has_hashes_for_the_pinned_versions_and_no_hosts():
    lock = (ROOT / "requirements.lock").read_text()
    packages = re.split(r"\n(?=[a-zA-Z0-9])", lock)
    assert all("--hash=sha256:" in package for package in packages)
    assert "://" not in lock and "/tmp" not in lock
    locked = {re.sub("[-_.]+", "-", package.split("==")[0].split("[")[0].lower()): package for package in packages}
    for name, version in re.findall(r'"([A-Za-z0-9-]+)(?:\[[^]]*])?==([^"]+)"', _pinned()):
        assert locked[name.lower()].splitlines()[0].split("==")[1].split()[0] == version


def _pinned() -> str:
    project = (ROOT / "pyproject.toml").read_text()
    return project[project.index("dependencies = [") : project.index("lint = [")]


def test_a_token_is_no_setting(tmp_path, model_folder, data_file):
    own = ["run", "--model", model_folder, "--data", data_file, "--out", tmp_path / "run", *SMALL]
    assert_refused(call(*own, "--set", "hub_token=hf_1234"), "hub_token: a secret", "HF_TOKEN")
    with pytest.raises(UserError, match="include_num_input_tokens_seen: tokens are counted already"):
        build_config({"include_num_input_tokens_seen": "all"})  # a word in its name alone
    assert not (tmp_path / "run").exists()
