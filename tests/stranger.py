"""README.md, played line by line in an empty folder, as by someone who has just come: `python tests/stranger.py`.

Every line of its code blocks is run, and of the section of experiments/README.md on single steps, in order, with the
file of data that it shows and a model of one's own (a copy of the embedded one). Two things are not done in full:
`make` is asked whether it would work (it sets up an environment, and trains for minutes), and an experiment of a preset
gets fewer labels and problems (SMALLER). At the end the notebook that trains is run, from the same folder. The first
line that does not work ends it: exit code 1, and what it said.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SMALLER = [*("--iterations", "1", "--set", "data.labels=8", "--set", "evaluation.limit=1"), "--batch-size", "4"]
NOTEBOOK = "analysis/notebooks/train_and_look.ipynb"


class Broken(Exception):
    """A line of the README that does not work."""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of a Markdown text's code blocks."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(language: str, content: str) -> Iterator[list[str]]:
    """The commands of a block, as words; lines that go on are joined.

    Of a console they are after "$ ", and what a command says to type next is after "compare: ".
    """
    lines = content.replace("\\\n", " ").splitlines()
    if language == "console":
        lines = [line.removeprefix(start) for line in lines for start in ("$ ", "compare: ") if line.startswith(start)]
    yield from (words for line in lines if (words := shlex.split(line, comments=True)))


def play(words: list[str], folder: Path) -> None:
    """Run a command in the folder. Raises Broken."""
    told = shlex.join(words)
    where = folder
    if words[0] == "make":
        words, where = ["make", "--dry-run", *words[1:]], ROOT
    elif words[0] == "tspin":
        smaller = SMALLER if words[1] == "run" and "--preset" in words else []
        words = [sys.executable, "-c", "import sys; sys.argv[0] = 'tspin'; from tspin.cli import main; main()",
                 *words[1:], *smaller]  # fmt: skip
    done = subprocess.run(words, cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"$ {told}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"works: {told}", flush=True)


def prepare(folder: Path) -> None:
    """What the README takes for granted: data, a model, and the committed results of a checkout."""
    sys.path.insert(0, str(ROOT))
    from experiments.checks.example import write_sums
    from tspin.models import resolve

    write_sums(folder / "my-data.jsonl")
    shutil.copytree(resolve("pocket"), folder / "my-model")
    (folder / "results").mkdir()
    (folder / "results" / "reference").symlink_to(ROOT / "results" / "reference")


def main(folder: Path) -> None:
    """Play the README in an empty folder. Raises Broken at the first line that does not work."""
    prepare(folder)
    steps = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8").partition("## Single steps")[2]
    for language, content in blocks((ROOT / "README.md").read_text(encoding="utf-8") + steps.partition("\n## ")[0]):
        if language == "python":
            (folder / "mine.py").write_text(content)
            play([sys.executable, "mine.py"], folder)
            continue
        for words in commands(language, content):
            play(words, folder)
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    print(f"works: {NOTEBOOK}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        try:
            main(Path(temporary))
        except Broken as error:
            sys.exit(f"does not work: {error}")
