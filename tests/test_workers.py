"""Child processes: what they start ends with them, and log-probabilities are the same from several."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tspin import SelfPlayConfig
from tspin.data.encoding import encode_dataset
from tspin.data.responses import read_responses, write_responses
from tspin.engines.here import Scoring, score
from tspin.engines.machines import ByShell
from tspin.engines.scoring import score_in_processes
from tspin.engines.workers import Worker, run_workers
from tspin.errors import UserError
from tspin.models import Policy, load_model
from tspin.triplets import make_triplets

# A worker that starts a process of its own, as vLLM does, says which, and fails or waits.
STARTS = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(Path(sys.argv[2]) / "child").write_text(str(child.pid))
if sys.argv[1] == "fail":
    raise ValueError("Error: no such thing")
time.sleep(600)
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_workers_started_ends_with_them(tmp_path):
    def worker(name: str) -> Worker:
        return Worker(tmp_path / name, [sys.executable, "-c", STARTS, name], dict(os.environ))

    with pytest.raises(UserError, match=r"^work: .*no such thing"):
        run_workers("work", [worker("wait"), worker("fail")], [{}, {}])
    children = [int(path.read_text()) for path in tmp_path.glob("*/child")]
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 1 and not any(map(alive, children))


REFUSED = """
import sys
print("pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig", file=sys.stderr)
print("  Value error, max_model_len (65) is too much [type=value_error, ...]", file=sys.stderr)
sys.exit(1)
"""


def test_a_cause_that_stands_below_its_error_is_told(tmp_path):
    worker = Worker(tmp_path / "refused", [sys.executable, "-c", REFUSED], dict(os.environ))
    with pytest.raises(UserError, match=r"^vllm: Value error, max_model_len \(65\) is too much"):
        run_workers("vllm", [worker], [{}])


def test_no_secret_is_on_the_command_line_of_another_machine(tmp_path):
    given = {
        "HF_TOKEN": "hf_hidden",
        "HF_HOME": "/models",
        "TOKENIZERS_PARALLELISM": "false",
        "TSPIN_API_KEY": "hidden",
    }
    line = ByShell(tmp_path, ["python"], given, host="node2").arguments[-1]
    assert "HF_HOME=/models" in line and "TOKENIZERS_PARALLELISM=false" in line and "hidden" not in line


def test_log_probabilities_are_the_same_from_several_processes(tmp_path, model_folder, rows, tokenizer):
    args = SelfPlayConfig(output_dir=str(tmp_path / "run"), method="spin", bf16=False, use_cpu=True)
    examples = encode_dataset(rows, tokenizer, args)
    write_responses(tmp_path / "drawn.parquet", examples.prompt_ids, examples.labelled)
    triplets = make_triplets(examples, {"synthetic": read_responses(tmp_path / "drawn.parquet")})
    whole = score(load_model(str(model_folder)), triplets, Scoring(tokenizer, args))
    parts = score_in_processes(2, Policy(str(model_folder), ""), {}, triplets, Scoring(tokenizer, args, autocast=False))
    assert parts.keys() == whole.keys()
    for role, values in whole.items():
        np.testing.assert_allclose(parts[role], values, rtol=1e-5, err_msg=role)
    with pytest.raises(UserError, match=r"^scoring: "):
        score_in_processes(2, Policy(str(tmp_path), ""), {}, triplets, Scoring(tokenizer, args, autocast=False))
