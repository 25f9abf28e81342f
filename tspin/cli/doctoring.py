"""`tspin doctor`: whether this machine computes what it should, before hours are spent on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspin.cli.guard import importing
from tspin.cli.options import (
    Launcher,
    LauncherConfig,
    Offline,
    Set,
    check_launcher_options,
    complete_presets,
)
from tspin.errors import UserError
from tspin.schema import BASE

if TYPE_CHECKING:
    from tspin.cli.asked import Asked


def doctor(
    preset: Annotated[
        str | None,
        typer.Option(help="a run's preset, to check what it needs too", autocompletion=complete_presets),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="or a run's file, likewise")] = None,
    settings: Set = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="a folder for the report, as Markdown and JSON, without names of people and places",
            show_default="on the terminal",
        ),
    ] = None,
    launcher: Launcher = None,
    launcher_config: LauncherConfig = None,
    offline: Offline = None,
) -> None:
    """Check this machine: versions, disk, memory, locks; layouts, samplers, processes and resumed trainings.

    Less than a minute on a CPU, about five on GPUs. Exit code 2 where a check failed; what cannot be tried is skipped.

    Example: tspin doctor --out doctor

    Example: tspin doctor --preset zephyr-7b --launcher accelerate --launcher-config fsdp2
    """
    check_launcher_options(launcher, launcher_config)
    asked = _asked(preset, config, settings, launcher_config)
    with importing():
        from tspin.config import build_config
        from tspin.doctor import examination
        from tspin.doctor.machine import Wanted

    wanted, folder = None, Path("runs")
    if asked is not None:
        folder = asked.out or asked.runs / asked.name
        folders = asked.folders if asked.out else {seed: folder / f"seed-{seed}" for seed in asked.seeds}
        methods = [method for method in asked.methods if method != BASE]
        built = build_config(asked.tree, asked.overrides, asked.source)
        wanted = Wanted(built, methods, folders, asked.launcher)
    found = []
    for one in examination.examine(examination.checks_of(wanted, folder)):
        found.append(one)
        typer.echo(f"{one['state']:<8} {one['name']}: {one['text']}", err=True)
    told = examination.report(found)
    if out is None:
        typer.echo(examination.markdown(told))
    else:
        typer.echo(f"wrote {' and '.join(map(str, examination.write(told, out)))}", err=True)
    if failed := [one["name"] for one in found if one["state"] == "failed"]:
        raise UserError(f"doctor: {len(failed)} of {len(found)} checks failed: {', '.join(failed)}")


def _asked(
    preset: str | None, config: Path | None, settings: list[str] | None, launcher: Path | None
) -> "Asked | None":
    """The run that is checked for; None without one. Raises UserError for settings of none."""
    from tspin.cli.asked import Given, ask

    if preset is None and config is None:
        if settings or launcher:
            raise UserError("doctor: --set and --launcher are a run's: name it by --preset or --config")
        return None
    return ask(Given(preset=preset, config=config, launcher=launcher, settings=settings or []))
