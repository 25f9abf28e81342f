"""Options that several commands share, what they mean, and what is wrong with them before anything is imported."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tspin.errors import UserError


def use_offline(folder: Path | None) -> Path | None:
    """Use an offline folder from here on: options are read before any of the hub's libraries is imported."""
    if folder is not None:
        from tspin.hub import offline

        offline.use_offline(folder)
    return folder


def _starting(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completion: of the known names, those that go on with what is typed; comma-separated, of the last of these."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in known() if name.startswith(last)]

    return complete


def _yaml_names(folder: str) -> list[str]:
    from tspin.yaml_files import yaml_names

    return yaml_names(folder)


def _methods() -> list[str]:
    from tspin.objectives import METHODS
    from tspin.schema import BASE

    return [BASE, *METHODS]


complete_presets = _starting(lambda: _yaml_names("experiments/presets"))
complete_suites = _starting(lambda: _yaml_names("experiments/suites"))
complete_studies = _starting(lambda: _yaml_names("experiments/studies"))
complete_launchers = _starting(lambda: _yaml_names("experiments/accelerate"))
complete_methods = _starting(_methods)

WHAT, WHERE, HOW = "What to run", "Where", "How it is executed"  # groups of options
Model = Annotated[str, typer.Option(help="a model folder, a hub name, or pocket")]
DATA = "a JSONL, CSV, Parquet … file, a folder, a hub name, or pocket; in any common format"
Data = Annotated[str, typer.Option("--data", help=DATA)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="key.path=value on top of the config; repeatable; --key value is the same"),
]
MethodName = Annotated[
    str,
    typer.Option(
        help="sft, spin, tspin, tspin_no_history, tspin_reference, dpo, simpo or space", autocompletion=complete_methods
    ),
]
Offline = Annotated[
    Path | None,
    typer.Option(
        callback=use_offline,
        help="a folder made by `tspin fetch`: nothing else is read, no network is asked",
        rich_help_panel=HOW,
    ),
]
Launcher = Annotated[
    str | None, typer.Option(help="accelerate: train in the processes of --launcher-config", rich_help_panel=HOW)
]
LauncherConfig = Annotated[
    Path | None,
    typer.Option(
        help="with --launcher: a file of experiments/accelerate/, by its name, or your own",
        rich_help_panel=HOW,
        autocompletion=complete_launchers,
    ),
]
Preset = Annotated[
    str, typer.Argument(help="a preset of experiments/, or a YAML file", autocompletion=complete_presets)
]
Reference = Annotated[str | None, typer.Option(help="π_θ0, for dpo from iteration 1 on")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="every random choice follows from it")]


def check_launcher_options(launcher: str | None, file: Path | None) -> None:
    """Raise UserError unless both are given, or neither."""
    if launcher not in (None, "accelerate"):
        raise UserError(f"--launcher {launcher}: there is one, accelerate")
    if (launcher is None) != (file is None):
        raise UserError(
            "--launcher accelerate and --launcher-config FILE go together; experiments/accelerate/ has such files"
        )
    if file is not None and not file.is_file():
        from tspin.yaml_files import find_yaml

        find_yaml(str(file), "experiments/accelerate", "launch file")


def checked_settings(
    model: str, dataset: str, overrides: list[str] | None, method: str, files: Iterable[Path | None] = ()
) -> list[str]:
    """`overrides` by their full keys. Raises UserError for what is wrong with them, or with what the options name.

    files: others that have to be there.
    """
    from tspin.names import check_config, expanded
    from tspin.objectives import find_method

    find_method(method)
    settings = expanded(overrides or [], [method])
    fields = check_config({"model": {"path": model}, "data": {"path": dataset}}, settings)
    for path in files:
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")
    check_sources(fields)
    return settings


def check_sources(fields: Mapping[str, Any]) -> None:
    """Raise UserError for a suite, a model's folder or a data file that a config names and that is not what it takes.

    fields: a config's, checked by tspin.names. Hub names are not asked for, and of a file the first row is read.
    """
    from tspin.hub.offline import check_model
    from tspin.names import SUITES
    from tspin.settings import DataSettings, EvaluationSettings, ModelSettings
    from tspin.yaml_files import find_yaml

    evaluation = EvaluationSettings(**fields.get("evaluation") or {})
    find_yaml(evaluation.suite, SUITES, "suite")
    check_model(ModelSettings(**fields.get("model") or {}).path)
    # `datasets` takes a second, which the others need not wait for.
    from tspin.data.sources import check_first_row

    data = DataSettings(**fields.get("data") or {})
    check_first_row(data.path, {str(role): name for role, name in data.columns.items()}, data.generated)
    if evaluation.held_out:
        check_first_row(evaluation.held_out)


def names(text: str) -> list[str]:
    """Comma-separated names, each once, blanks dropped."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def integers(text: str) -> list[int]:
    """Comma- or space-separated seeds, each once, which results/ keeps in 16 bits. Raises UserError."""
    try:
        values = [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        values = []
    if not values or not all(0 <= value < 2**15 for value in values):
        raise UserError(f"--seeds {text!r}: write whole numbers from 0 to {2**15 - 1}, separated by commas")
    return list(dict.fromkeys(values))
