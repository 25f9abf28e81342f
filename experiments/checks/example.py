"""The README's worked example: the embedded model, twelve sums, and what the commands print.

    python -m experiments.checks.example

Writes results/example/my-data.jsonl, transcript.txt and provenance.json.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tspin.runs.files import write_json, write_text
from tspin.runs.provenance import provenance

DATA = "my-data.jsonl"
COMMANDS = [
    f"head -n 1 {DATA}",
    f"tspin run --model pocket --data {DATA} --methods spin,tspin --iterations 2 --out runs/mine "
    "--batch-size 4 --lr 3e-6",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/example"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_sums(arguments.out / DATA)
        shutil.copy(arguments.out / DATA, folder)
        text = "".join(transcript(command, Path(folder)) for command in COMMANDS)
    write_text(arguments.out / "transcript.txt", text)
    write_json(arguments.out / "provenance.json", provenance())
    print(text, end="")
    print(f"wrote {arguments.out / 'transcript.txt'}")


def write_sums(path: Path) -> None:
    """Twelve sums as JSON Lines, in TRL's columns."""
    sums = [(a, b) for a in range(3, 6) for b in range(4, 8)]
    lines = [json.dumps({"prompt": f"What is {a} + {b}?", "completion": f"The answer is {a + b}."}) for a, b in sums]
    write_text(path, "\n".join(lines) + "\n")


def transcript(command: str, folder: Path) -> str:
    """A command and what it left on the terminal, without progress bars. Raises CalledProcessError when it fails."""
    words = shlex.split(command)
    program = [str(Path(sys.executable).parent / words[0])] if words[0] == "tspin" else words[:1]
    done = subprocess.run([*program, *words[1:]], cwd=folder, capture_output=True, text=True, check=True)
    said = [line for line in re.split(r"[\r\n]+", done.stdout + done.stderr) if line.strip() and "%|" not in line]
    return "\n".join([f"$ {command}", *said]) + "\n"


if __name__ == "__main__":
    main()
