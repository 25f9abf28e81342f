"""Fine-tune the pocket base on its labels: the pocket preset's π_θ0, and the map's half fine-tuned start.

    python -m experiments.pocket.finetune --out tspin/pocket/model --record experiments/pocket/finetune.json
    python -m experiments.pocket.finetune --out runs/pocket-starts/half --learning-rate 3e-5

As the paper's Zephyr is fine-tuned on UltraChat before self-play begins: one epoch over all 4,000 labels, from the cold
base, in float32, by the suite's own `sft`. Two to five minutes on two CPU cores. The weights are stored as bfloat16.
The record has the settings, versions, seconds and the weights' checksum. How the rate was chosen: README.md.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tspin import SelfPlayConfig, SelfPlayTrainer
from tspin.config import load_config
from tspin.data.sources import load_rows
from tspin.models import load_model, load_tokenizer
from tspin.runs.files import atomic_path, folder_fingerprint, write_json
from tspin.runs.provenance import provenance


def fine_tune(folder: Path, learning_rate: float, epochs: float, seed: int) -> Path:
    """The checkpoint of one SFT from the cold base, in `folder`; all else is as the preset has it."""
    given = load_config("pocket").for_method("sft").training.model_dump(exclude_unset=True)
    given |= {"output_dir": str(folder), "method": "sft", "learning_rate": learning_rate, "num_train_epochs": epochs}
    args = SelfPlayConfig(**{**given, "seed": seed, "bf16": False, "diagnostics": False})
    trainer = SelfPlayTrainer("pocket-cold", args=args, train_dataset=load_rows("pocket"))
    *_, last = trainer.iterate()
    return last.model_path


def main() -> None:
    """Fine-tune, store, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--record", type=Path, help="JSON; <out>.json when left out")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, made_by = time.monotonic(), provenance()  # before anything here is written over
    with tempfile.TemporaryDirectory() as scratch:
        trained = fine_tune(Path(scratch), args.learning_rate, args.epochs, args.seed)
        with atomic_path(args.out) as temporary:
            load_model(str(trained)).to(torch.bfloat16).save_pretrained(temporary)
            load_tokenizer(str(trained)).save_pretrained(temporary)
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path | None)}
    facts = {"settings": settings, "seconds": round(time.monotonic() - start), "model": folder_fingerprint(args.out)}
    record = args.record or args.out.with_suffix(".json")
    write_json(record, {**made_by, **facts})
    print(f"wrote {args.out} and {record}")


if __name__ == "__main__":
    main()
