"""Methods trained on a model and data without an evaluation: your own, before there is a suite for them.

<folder>/shared/        y0, and y′ of iteration 0, for all methods
<folder>/<method>/      what a SelfPlayTrainer leaves in its output_dir, given that shared_dir
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tspin.config import Config
from tspin.experiment.preset import build_trainer, check_needs
from tspin.selfplay import IterationResult


def train_methods(
    config: Config, methods: Sequence[str], folders: Mapping[int, Path], launcher: Path | None = None
) -> Iterator[tuple[str, IterationResult]]:
    """Run what is missing of every method, of every seed in its folder. launcher: see tspin.experiment.preset.Where.

    Yields a title, "" where there is one run alone, with each iteration's result. Raises UserError before any work for
    settings, a model and data that do not fit together.
    """
    trainers = {
        (method, seed): build_trainer(config.for_method(method), folder, seed, launcher)
        for seed, folder in folders.items()
        for method in methods
    }
    check_needs(list(trainers.values()))
    for (method, seed), trainer in trainers.items():
        title = method if len(folders) == 1 else f"{method}, seed {seed}"
        for result in trainer.iterate():
            yield title if len(trainers) > 1 else "", result
