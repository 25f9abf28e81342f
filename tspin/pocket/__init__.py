"""The embedded preset: a small Llama, and ten short verifiable tasks it half knows."""

from pathlib import Path

POCKET_MODEL = Path(__file__).parent / "model"
EMBEDDED = {"pocket": POCKET_MODEL, "pocket-cold": POCKET_MODEL.with_name("cold")}  # fine-tuned, and before that
