"""Options that several commands share, what they mean, and what is wrong with them before anything is imported."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tspin.errors import UserError


def use_offline(folder: Path | None) -> Path | None:
    """Use an offline folder from here on: options are read before any of the hub's libraries is imported."""
    if folder is not None:
        from tspin.hub import offline

        offline.use_offline(folder)
    return folder


Model = Annotated[str, typer.Option(help="a model folder, a hub name, or pocket")]
DATA = "a JSONL, CSV, Parquet … file, a folder, a hub name, or pocket; in any common format"
Data = Annotated[str, typer.Option("--data", help=DATA)]
Set = Annotated[list[str] | None, typer.Option("--set", help="key.path=value on top of the config; repeatable")]
MethodName = Annotated[
    str, typer.Option(help="sft, spin, tspin, tspin_no_history, tspin_reference, dpo, simpo or space")
]
Offline = Annotated[
    Path | None,
    typer.Option(
        callback=use_offline, help="a folder made by `tspin fetch`: nothing else is read, no network is asked"
    ),
]
Launcher = Annotated[str | None, typer.Option(help="accelerate: train in the processes of --config")]
LauncherConfig = Annotated[
    Path | None, typer.Option("--config", help="with --launcher: a file of experiments/accelerate/, or your own")
]
Preset = Annotated[str, typer.Argument(help="a preset of experiments/, or a YAML file")]
Reference = Annotated[str | None, typer.Option(help="π_θ0, for dpo from iteration 1 on")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="every random choice follows from it")]


def check_launcher_options(launcher: str | None, file: Path | None) -> None:
    """Raise UserError unless both are given, or neither."""
    if launcher not in (None, "accelerate"):
        raise UserError(f"--launcher {launcher}: there is one, accelerate")
    if (launcher is None) != (file is None):
        raise UserError("--launcher accelerate and --config FILE go together; experiments/accelerate/ has such files")
    if file is not None and not file.is_file():
        from tspin.yaml_files import find_yaml

        find_yaml(str(file), "experiments/accelerate", "launch file")


def check_given(dataset: str, overrides: list[str] | None, method: str, files: Iterable[Path | None] = ()) -> None:
    """Raise UserError for an unknown setting or method, and where the data or one of the other files is missing."""
    from tspin.names import check_config
    from tspin.objectives import find_method

    find_method(method)
    check_config({}, overrides or [])
    for path in files:
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")
    from tspin.data.files import check_there  # `datasets`: a second, which the others need not wait for

    check_there(dataset)


def names(text: str) -> list[str]:
    """Comma-separated names, blanks dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """Comma- or space-separated seeds, which results/ keeps in 16 bits. Raises UserError."""
    try:
        values = [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        values = []
    if not values or not all(0 <= value < 2**15 for value in values):
        raise UserError(f"--seeds {text!r}: write whole numbers from 0 to {2**15 - 1}, separated by commas")
    return values
