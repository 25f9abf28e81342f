"""`tspin run`: the methods of a preset with their evaluations, or methods on your own model and data."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspin.cli.guard import importing
from tspin.cli.options import (
    DATA,
    WHAT,
    WHERE,
    Launcher,
    LauncherConfig,
    Offline,
    Set,
    check_launcher_options,
    complete_methods,
    complete_presets,
    integers,
    names,
)

if TYPE_CHECKING:
    from tspin.cli.asked import Asked


PresetName = Annotated[
    str | None,
    typer.Option(help="a preset of experiments/, by its name", rich_help_panel=WHAT, autocompletion=complete_presets),
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="the run's file: YAML, with the keys of a preset", rich_help_panel=WHAT)
]
Model = Annotated[
    str | None, typer.Option(help="your model folder or hub name; the file's when left out", rich_help_panel=WHAT)
]
Data = Annotated[str | None, typer.Option("--data", help=f"{DATA}; the file's when left out", rich_help_panel=WHAT)]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--methods",
        "--method",
        help="comma-separated; base is the initial policy",
        show_default="base,sft,spin,tspin; without a suite: the file's, or tspin",
        rich_help_panel=WHAT,
        autocompletion=complete_methods,
    ),
]
Seeds = Annotated[
    list[str] | None,
    typer.Option("--seeds", "--seed", help="comma-separated", show_default="0", rich_help_panel=WHAT),
]
Iterations = Annotated[
    int | None, typer.Option(help="T", show_default="the file's, or 5", min=1, max=127, rich_help_panel=WHAT)
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="the run's folder, where nothing is evaluated",
        show_default="runs/mine, or the file's name in runs",
        rich_help_panel=WHERE,
    ),
]
Runs = Annotated[
    Path | None,
    typer.Option(help="checkpoints, responses, logs of what is evaluated", show_default="runs", rich_help_panel=WHERE),
]
Results = Annotated[Path | None, typer.Option(help="tidy numbers of it", show_default="results", rich_help_panel=WHERE)]


def run(
    preset: PresetName = None,
    config: ConfigFile = None,
    model: Model = None,
    dataset: Data = None,
    methods: Methods = None,
    seeds: Seeds = None,
    iterations: Iterations = None,
    settings: Set = None,
    out: Out = None,
    runs: Runs = None,
    results: Results = None,
    launcher: Launcher = None,
    launcher_config: LauncherConfig = None,
    offline: Offline = None,
) -> None:
    """Run Algorithm 1: a preset's methods with their evaluations, or methods on your model and data.

    Stopped at any moment, the same command goes on where it was. Every setting is a flag too, such as
    --learning-rate 1e-5 or --temperature 0: `tspin settings` lists them.

    Example: tspin run --preset pocket --seeds 0,1

    Example: tspin run --model my-model --data my-data.jsonl --methods spin,tspin --iterations 3 --out runs/mine

    Example: tspin run --preset zephyr-7b --launcher accelerate --launcher-config fsdp2
    """
    check_launcher_options(launcher, launcher_config)
    from tspin.cli.asked import Given, ask

    chosen = None if methods is None else names(",".join(methods))
    drawn = None if seeds is None else integers(",".join(seeds))
    given = Given(
        preset, config, model, dataset, chosen, drawn, iterations, out, runs, results, launcher_config, settings or []
    )
    carry_out(ask(given))


def carry_out(asked: "Asked") -> None:
    """Do what was asked for."""
    with importing():
        from tspin.config import build_config
        from tspin.experiment.alone import train_methods
        from tspin.experiment.preset import Where, describe, run_experiment

    config = build_config(asked.tree, asked.overrides, asked.source)
    if asked.out is None:
        where = Where(asked.runs, asked.results, launcher=asked.launcher)
        run_experiment(asked.name, config, asked.methods, asked.seeds, where)
        return
    for title, result in train_methods(config, asked.methods, asked.folders, asked.launcher):
        step = f"{title}, iteration {result.iteration}" if title else f"iteration {result.iteration}"
        typer.echo(f"{step}: {describe(result)} → {result.model_path}", err=True)
        for text in result.warnings.values():
            typer.echo(f"warning: {step}: {text}", err=True)
    for line in what_next(asked):
        typer.echo(line, err=True)


def what_next(asked: "Asked") -> Iterator[str]:
    """Commands that show what a run left: the first method beside each of the others, or the only one by itself."""
    first, *others = asked.methods
    for folder in asked.folders.values():
        for other in others:
            page = folder / ("compare.html" if len(others) == 1 else f"compare-{first}-{other}.html")
            command = ["tspin", "compare", folder / first, folder / other, "--out", page]
            yield f"compare: {shlex.join(map(str, command))}"
        if not others:
            yield f"look: {shlex.join(['tspin', 'inspect', str(folder / first)])}"
