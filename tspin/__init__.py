"""T-SPIN: self-play fine-tuning with triplets (NeurIPS 2025, arXiv 2601.08198).

`SelfPlayTrainer` and `SelfPlayConfig` are the Python interface; `tspin --help` the command line.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["SelfPlayConfig", "SelfPlayTrainer"]


def __getattr__(name: str) -> Any:
    # Loading torch takes seconds: only those who use the trainer wait for it.
    if name in __all__:
        from tspin import config, selfplay

        return selfplay.SelfPlayTrainer if name == "SelfPlayTrainer" else config.SelfPlayConfig
    raise AttributeError(f"module 'tspin' has no attribute {name!r}")
