"""What comes before a run: `tspin fetch` and `plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspin.cli.guard import importing
from tspin.cli.options import Preset, Set
from tspin.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from tspin.planning.plan import Plan


def fetch(
    preset: Preset,
    out: Annotated[Path, typer.Option(help="the offline folder")] = Path("offline"),
    take: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=PATH or DATASET:CONFIG:SPLIT=PATH, in place of the hub's; repeatable"),
    ] = None,
    check: Annotated[bool, typer.Option(help="compare every checksum, fetch nothing")] = False,
    settings: Set = None,
) -> None:
    """Bring a preset's model, data and benchmarks into one folder, for `--offline` on machines without a network.

    Example: tspin fetch zephyr-7b --out offline && tspin run --preset zephyr-7b --offline offline
    """
    from tspin.names import check_preset, expanded

    overrides = expanded(settings or [])
    check_preset(preset, overrides)
    with importing():
        from tspin.config import load_config
        from tspin.hub.offline import lacking, verify
        from tspin.planning.needs import fetch_needed, needed

    config = load_config(preset, overrides)
    if check:
        wrong = verify(out)
        wrong += [line for item in needed(config) if (line := lacking(out, item))]
    else:
        wrong = fetch_needed(config, out, take or [], lambda line: typer.echo(line, err=True))
    for line in wrong[1:]:
        typer.echo(line, err=True)
    if wrong:
        what = "wrong with" if check else "missing from"
        raise UserError(f"{len(wrong)} things are {what} {out}, first: {wrong[0]}")
    typer.echo(f"{out}: everything that {preset} needs")


def plan(
    preset: Preset,
    gpus: Annotated[int, typer.Option(help="of a machine", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, a100-40, l40s or rtx4090")] = "h100",
    nodes: Annotated[int, typer.Option(help="machines", min=1)] = 1,
    network: Annotated[float, typer.Option(help="between machines, Gb/s of each", min=1)] = 400,
    utilisation: Annotated[float, typer.Option(help="share of the GPU's speed that is reached", min=0.01, max=1)] = 0.4,
    prompt_tokens: Annotated[int | None, typer.Option(help="mean; half of the maximum when left out")] = None,
    response_tokens: Annotated[int | None, typer.Option(help="mean, likewise")] = None,
    rows: Annotated[int | None, typer.Option(help="of the data, for methods that use all of it")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the plan there too")] = None,
    settings: Set = None,
) -> None:
    """Parameters, memory, tokens, hours and disk of a preset, and what to change where it does not fit.

    Example: tspin plan zephyr-7b --gpus 8 --gpu h100 --rows 200000
    """
    from tspin.names import check_preset, expanded

    overrides = expanded(settings or [])
    check_preset(preset, overrides)
    with importing():
        from rich.console import Console

        from tspin.config import load_config
        from tspin.planning.fitting import advice
        from tspin.planning.hardware import ASSUMPTIONS, Hardware
        from tspin.planning.plan import Data, as_dict, measured_error
        from tspin.planning.plan import plan as plan_for
        from tspin.runs.files import write_json

    config = load_config(preset, overrides)
    hardware = Hardware(gpus, gpu, utilisation, nodes, network)
    data = Data(prompt_tokens, response_tokens, rows)
    planned = plan_for(config, hardware, data)
    console = Console(highlight=False)
    machines = f"{nodes} × {gpus} × {gpu}" if nodes > 1 else f"{gpus} × {gpu}"
    console.print(f"{config.model.path}: {planned.shape.parameters:,} parameters; {machines}")
    console.print(_memory_table(planned), _work_table(planned), sep="\n")
    console.print(
        f"{planned.hours:.1f} hours, {planned.gpu_hours:,.0f} GPU-hours, one seed, at {utilisation:.0%} of the GPUs' "
        f"speed; {planned.disk / 1e9:.1f} GB of checkpoints"
    )
    console.print("Taken for granted: " + "; ".join(f"{each.text} ({each.source})" for each in ASSUMPTIONS))
    if nodes > 1:
        console.print("Training on several machines has been tried on stand-ins for them alone.")
    if error := measured_error():
        console.print(error)
    console.print(planned.problem or "Everything fits.", style="bold")
    console.print(advice(config, hardware, data), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, as_dict(planned))


def _memory_table(planned: "Plan") -> "Table":
    from rich.table import Table

    table = Table("memory per GPU", "part", "GiB", box=None, padding=(0, 2, 0, 0))
    for stage, parts in planned.memory.items():
        table.add_row(f"[bold]{stage}", "[bold]all", f"[bold]{sum(parts.values()) / 2**30:.2f}")
        for part, size in parts.items():
            table.add_row("", part, f"{size / 2**30:.2f}")
    return table


def _work_table(planned: "Plan") -> "Table":
    from rich.table import Table

    columns = ("method", "stage", "tokens", "PFLOPs", "hours", "GPU-hours")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for stage in planned.stages:
        done = (f"{stage.tokens:,}", f"{stage.flops / 1e15:,.1f}") if stage.tokens else ("", "")
        hours = (f"{stage.hours:.2f}", f"{stage.hours * planned.hardware.all_gpus:.1f}")
        table.add_row(stage.method, stage.stage, *done, *hours)
    return table
