"""Many runs: `tspin sweep` and `rerun`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tspin.cli.guard import importing
from tspin.cli.options import (
    Launcher,
    LauncherConfig,
    Offline,
    check_launcher_options,
    complete_studies,
    integers,
    names,
)
from tspin.errors import UserError


def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML, or its name in experiments/studies/, whose README has all keys",
            autocompletion=complete_studies,
        ),
    ],
    executor: Annotated[str, typer.Option(help="local or slurm")] = "local",
    profile: Annotated[
        Path | None, typer.Option(help="YAML: what to ask the queue for, the launcher, the offline folder")
    ] = None,
    jobs: Annotated[int, typer.Option(help="cells at once on this machine")] = 1,
    retry: Annotated[bool, typer.Option(help="run what failed again")] = False,
    wait: Annotated[bool, typer.Option(help="with slurm: until all have ended, or leave them in the queue")] = True,
    runs: Annotated[Path, typer.Option(help="checkpoints, responses, logs")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="tidy numbers, in PRESET/studies/")] = Path("results"),
    join: Annotated[
        Path | None, typer.Option(help="another machine's results folder: its cells are added, and nothing is run")
    ] = None,
) -> None:
    """Run methods × seeds × settings, each a run of its own; gather what is finished, which is not run again.

    Exit code 1 when some failed: why, and the last lines of their logs, are printed.

    Example: tspin sweep experiments/studies/map.yaml --jobs 2

    Example: tspin sweep experiments/studies/zephyr-7b.yaml --executor slurm --profile experiments/slurm/h100.yaml
    """
    if executor not in ("local", "slurm"):
        raise UserError(f"--executor {executor}: local or slurm")
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    from tspin.yaml_files import find_yaml

    find_yaml(str(file), "experiments/studies", "study")
    with importing():
        from rich.console import Console

        from tspin.experiment import gathering
        from tspin.experiment.grid import load_sweep
        from tspin.experiment.jobs import run_sweep

    loaded = load_sweep(file, profile, runs, results)
    if join is not None:
        sys.stderr.write(f"{gathering.join(loaded, join)}\n")
        return
    cells = run_sweep(loaded, executor, jobs, retry, wait, Console(stderr=True).print)
    if failed := len(cells["failed"]):
        sys.stderr.write(f"tspin: {failed} of {len(loaded.cells)} cells failed; --retry runs them again\n")
        raise typer.Exit(1)


def rerun(
    record: Annotated[Path, typer.Argument(help="provenance.json of a folder in results/")],
    methods: Annotated[str | None, typer.Option(help="comma-separated; all that were run when not given")] = None,
    seeds: Annotated[str | None, typer.Option(help="comma-separated; all that were run when not given")] = None,
    iterations: Annotated[int | None, typer.Option(help="of them, the first; all when not given")] = None,
    out: Annotated[Path, typer.Option(help="a folder for the runs and results of the rerun")] = Path("reruns"),
    strict: Annotated[bool, typer.Option(help="refuse where versions, hardware or the commit differ")] = False,
    exact: Annotated[bool, typer.Option(help="every number must be equal: for the record's own machine")] = False,
    launcher: Launcher = None,
    launcher_config: LauncherConfig = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value of what changes no number, such as engine.*")
    ] = None,
    offline: Offline = None,
) -> None:
    """Run again what results hold, from their provenance, and compare every number.

    Each Avg must lie within 3 standard errors of the record's; with --exact, every number must be equal, as they are on
    the same machine with the same versions. Exit code 1 when they do not.

    Example: tspin rerun results/reference/pocket/provenance.json --methods base,spin,tspin --seeds 10 --iterations 1
    """
    check_launcher_options(launcher, launcher_config)
    with importing():
        from rich.console import Console

        from tspin.experiment import rerun as again

    recorded = again.load_recorded(
        record, names(methods) if methods else None, integers(seeds) if seeds else None, iterations
    )
    differing = again.differences(recorded.provenance)
    console = Console(stderr=True)
    for name, (then, now) in differing.items():
        console.print(f"{name}: {then} on record, {now} here", markup=False)
    if strict and differing:
        raise UserError(f"{record}: --strict, and {len(differing)} things differ here ({', '.join(differing)})")
    table = again.compare(recorded.folder, again.rerun(recorded, out, settings or [], launcher_config))
    console.print(again.shown(table))
    if wrong := again.verdict(table, exact=exact):
        console.print(*wrong, sep="\n", markup=False)
        raise typer.Exit(1)
