"""Fine-tune a model on a preset's labels, for runs to start from: a preset's π_θ0.

    python -m experiments.pocket.finetune --out tspin/pocket/model --record experiments/pocket/finetune.json
    python -m experiments.pocket.finetune --out runs/pocket-starts/half --learning-rate 3e-5
    python -m experiments.pocket.finetune --preset smollm2-short --start HuggingFaceTB/SmolLM2-135M-Instruct \\
        --learning-rate 1e-4 --out runs/smollm2-starts/short

As the paper's Zephyr is fine-tuned on UltraChat before self-play begins: from `--start`, by the preset's `sft` (its
labels, its batches, its wording) but for the rate and the epochs, in float32. Two to five minutes on two CPU cores for
pocket; the preset says how long for others. The weights are stored as bfloat16. The record has the settings, versions,
seconds and the weights' checksum. How pocket's rate was chosen: README.md.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tspin.config import load_config
from tspin.experiment.preset import build_trainer
from tspin.hub.offline import use_offline
from tspin.models import load_model, load_tokenizer
from tspin.runs.files import atomic_path, folder_fingerprint, write_json
from tspin.runs.provenance import provenance


def fine_tune(preset: str, start: str, folder: Path, seed: int, overrides: Sequence[str]) -> Path:
    """The checkpoint, in `folder`, of one SFT of `start` on a preset's labels; overrides: as `tspin run --set`."""
    always = [f"model.path={start}", "bf16=false", "diagnostics=false"]
    trainer = build_trainer(load_config(preset, [*always, *overrides]).for_method("sft"), folder, seed)
    *_, last = trainer.iterate()
    return last.model_path


def main() -> None:
    """Fine-tune, store, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="pocket", help="whose labels and settings of sft are taken")
    parser.add_argument("--start", default="pocket-cold", help="what is fine-tuned, by model.path's names")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--record", type=Path, help="JSON; <out>.json when left out")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], help="other settings of the preset, key.path=value")
    parser.add_argument("--offline", type=Path, help="a folder of `tspin fetch` that has the start")
    args = parser.parse_args()
    if args.offline:
        use_offline(args.offline)
    start, made_by = time.monotonic(), provenance()  # before anything here is written over
    rates = [f"methods.sft.learning_rate={args.learning_rate}", f"methods.sft.num_train_epochs={args.epochs}"]
    with tempfile.TemporaryDirectory() as scratch:
        trained = fine_tune(args.preset, args.start, Path(scratch), args.seed, [*rates, *args.set])
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
