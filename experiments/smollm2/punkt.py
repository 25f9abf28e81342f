"""A sentence splitter for IFEval where NLTK's own cannot be downloaded: Punkt, trained on plain English text.

    python -m experiments.smollm2.punkt --text gsm8k_train.jsonl ifeval.jsonl --out punkt_tab

IFEval counts sentences in two of its 25 kinds of instructions; `tspin fetch smollm2 --take punkt_tab=punkt_tab` puts
the result where NLTK's would be. Scores may then differ from the original's in those two.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import nltk
from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

from tspin.data.files import read_rows
from tspin.runs.files import sha256, write_json
from tspin.runs.provenance import provenance


def write_punkt(texts: Iterable[str], out: Path) -> Path:
    """Train a splitter on texts and write it as NLTK's files. Returns their folder, out/english."""
    folder = out / "english"
    folder.mkdir(parents=True, exist_ok=True)
    nltk.data.path.append(str(out))  # NLTK writes nowhere else
    save_punkt_params(PunktTrainer("\n".join(texts)).get_params(), str(folder))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="JSONL: every text in every row is read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; english/ is made in it")
    arguments = parser.parse_args()
    rows = [row for path in arguments.text for row in read_rows(path)]
    texts = [value for row in rows for value in row.values() if isinstance(value, str)]
    folder = write_punkt(texts, arguments.out)
    write_json(arguments.out / "provenance.json", {**provenance(), "text": {p.name: sha256(p) for p in arguments.text}})
    print(f"wrote {folder}, from {len(texts):,} texts, and {arguments.out / 'provenance.json'}")


if __name__ == "__main__":
    main()
