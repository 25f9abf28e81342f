"""The command line: each command reads its arguments, calls one function, and prints what came out."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from tspin.errors import UserError
from tspin.runs.redaction import redacted
from tspin.runs.signals import stopping_at_once

DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Self-play fine-tuning: SFT, SPIN, T-SPIN and its ablations; evaluation; the paper's tables.",
)

Model = Annotated[str, typer.Option(help="a model folder, a hub name, or pocket")]
Data = Annotated[str, typer.Option("--data", help="prompt–completion rows: .jsonl, .parquet, a hub name, or pocket")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key.path=value on top of the config; repeatable")]
MethodName = Annotated[
    str, typer.Option(help="sft, spin, tspin, tspin_no_history, tspin_reference, dpo, simpo or space")
]
Offline = Annotated[
    Path | None, typer.Option(help="a folder made by `tspin fetch`: nothing else is read, no network is asked")
]
Launcher = Annotated[str | None, typer.Option(help="accelerate: train in the processes of --config")]
LauncherConfig = Annotated[
    Path | None, typer.Option("--config", help="with --launcher: a file of experiments/accelerate/, or your own")
]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="every random choice follows from it")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Errors that the user can put right become one line on stderr and exit code 2; signals, 128 and their number."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with stopping_at_once():
                function(*args, **kwargs)
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt as error:
            number = getattr(error, "number", signal.SIGINT)
            saved = getattr(error, "saved", "") or "finished stages are kept, nothing is half-written"
            sys.stderr.write(f"\ntspin: stopped by {signal.Signals(number).name}: {saved}; ")
            sys.stderr.write("the same command goes on from there\n")
            raise typer.Exit(128 + number) from None
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            fail(
                f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}): lower "
                "sampling_batch_size, evaluation.batch_size or micro_batch_tokens; finished stages are kept"
            )
        except (OSError, SafetensorError) as error:
            number = error_number(error)
            if number not in DISK_ERRORS:
                raise
            place = getattr(error, "filename", None) or "the output folder"
            fail(
                f"{place}: {os.strerror(number).lower()}; nothing was replaced: make room or choose another folder and "
                "run the same command again"
            )

    return guarded


def go_offline(folder: Path | None) -> None:
    """Use an offline folder from here on, before any of the hub's libraries is imported."""
    if folder is not None:
        from tspin.hub.offline import use_offline

        use_offline(folder)


def check_launcher_options(launcher: str | None, file: Path | None) -> None:
    """Raise UserError unless both are given, or neither."""
    if launcher not in (None, "accelerate"):
        raise UserError(f"--launcher {launcher}: there is one, accelerate")
    if (launcher is None) != (file is None):
        raise UserError("--launcher accelerate and --config FILE go together; experiments/accelerate/ has such files")


def ran_out_of_memory(error: BaseException) -> bool:
    """See tspin.devices, which is imported only when something went wrong."""
    from tspin.devices import out_of_memory

    return out_of_memory(error)


def error_number(error: Exception) -> int:
    """The operating system's error number; safetensors gives it in its message alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else 0


def fail(line: str) -> None:
    """Print one line and exit with 2."""
    sys.stderr.write(f"tspin: {redacted(' '.join(line.split()))}\n".encode(errors="replace").decode())
    raise typer.Exit(2)


@app.command()
@command
def run(
    preset: Annotated[str | None, typer.Option(help="a preset of experiments/, or a YAML file")] = None,
    methods: Annotated[str, typer.Option(help="comma-separated; base is the initial policy")] = "base,sft,spin,tspin",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0",
    model: Annotated[str | None, typer.Option(help="your model folder or hub name (without --preset)")] = None,
    dataset: Annotated[str | None, typer.Option("--data", help="your prompt–completion data")] = None,
    method: Annotated[str, typer.Option(help="the method, with --model")] = "tspin",
    iterations: Annotated[int, typer.Option(help="T, with --model")] = 5,
    out: Annotated[Path, typer.Option(help="the run's folder, with --model")] = Path("runs/mine"),
    runs: Annotated[Path, typer.Option(help="checkpoints, responses, logs of presets")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="tidy numbers of presets")] = Path("results"),
    launcher: Launcher = None,
    launcher_config: LauncherConfig = None,
    settings: Set = None,
    offline: Offline = None,
) -> None:
    """Run Algorithm 1: a preset's methods with their evaluations, or one method on your model and data.

    Stopped at any moment, the same command goes on where it was.

    Example: tspin run --preset pocket --seeds 0,1

    Example: tspin run --model my-model --data my-data.jsonl --method tspin --iterations 3 --out runs/mine

    Example: tspin run --preset zephyr-7b --launcher accelerate --config experiments/accelerate/fsdp2.yaml
    """
    check_launcher_options(launcher, launcher_config)
    go_offline(offline)
    from tspin import config
    from tspin.experiment import preset as experiment

    if preset:
        name = Path(preset).stem
        loaded = config.load_config(preset, settings or [])
        experiment.run_experiment(
            name, loaded, split(methods), integers(seeds), runs, results, launcher=launcher_config
        )
        return
    if not (model and dataset):
        raise UserError("run needs --preset, or --model and --data")
    tree = {"model": {"path": model}, "data": {"path": dataset}, "iterations": iterations}
    loaded = config.build_config(tree, settings or [])
    seed, *others = integers(seeds)
    if others:
        raise UserError(f"--seeds {seeds}: one seed a run with --model; give each its own --out")
    experiment.quiet_libraries()
    trainer = experiment.build_trainer(loaded.for_method(method), out, seed, launcher_config)
    for result in trainer.iterate():
        typer.echo(f"iteration {result.iteration}: {experiment.describe(result)} → {result.model_path}", err=True)
        for text in result.warnings.values():
            typer.echo(f"warning: iteration {result.iteration}: {text}", err=True)


@app.command()
@command
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML: preset, methods, seeds, grid; see experiments/slurm/")],
    executor: Annotated[str, typer.Option(help="local or slurm")] = "local",
    profile: Annotated[
        Path | None, typer.Option(help="YAML: what to ask the queue for, the launcher, the offline folder")
    ] = None,
    jobs: Annotated[int, typer.Option(help="cells at once on this machine")] = 1,
    retry: Annotated[bool, typer.Option(help="run what failed again")] = False,
    wait: Annotated[bool, typer.Option(help="with slurm: until all have ended, or leave them in the queue")] = True,
    runs: Annotated[Path, typer.Option(help="checkpoints, responses, logs")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="tidy numbers, of a sweep without a grid")] = Path("results"),
) -> None:
    """Run methods × seeds × settings, each a run in a job of its own; what is finished is not run again.

    Exit code 1 when some failed: why, and the last lines of their logs, are printed.

    Example: tspin sweep experiments/slurm/zephyr-7b.yaml --executor slurm --profile experiments/slurm/h100.yaml
    """
    if executor not in ("local", "slurm"):
        raise UserError(f"--executor {executor}: local or slurm")
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    from rich.console import Console

    from tspin.experiment.grid import load_sweep, run_sweep

    loaded = load_sweep(file, profile, runs, results)
    cells = run_sweep(loaded, executor, jobs, retry, wait, Console(stderr=True).print)
    if cells["failed"]:
        failed, of = len(cells["failed"]), len(loaded.cells)
        sys.stderr.write(f"tspin: {failed} of {of} cells failed; --retry runs them again\n")
        raise typer.Exit(1)


@app.command()
@command
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

    Example: tspin rerun results/pocket/provenance.json --methods base,spin,tspin --seeds 0 --iterations 1
    """
    check_launcher_options(launcher, launcher_config)
    go_offline(offline)
    from rich.console import Console

    from tspin.experiment import preset as experiment
    from tspin.experiment import rerun as again

    console = Console(stderr=True)
    recorded = again.load_recorded(
        record, split(methods) if methods else None, integers(seeds) if seeds else None, iterations
    )
    found = again.differences(recorded.provenance)
    again.report(found, lambda line: console.print(line, markup=False))
    if strict and found:
        raise UserError(f"{record}: --strict, and {len(found)} things differ here ({', '.join(found)})")
    experiment.quiet_libraries()
    table = again.compare(recorded.folder, again.rerun(recorded, out, settings or [], launcher_config))
    console.print(again.shown(table))
    wrong = again.verdict(table, exact=exact)
    for line in wrong:
        console.print(line, markup=False)
    if wrong:
        raise typer.Exit(1)


@app.command("sample")
@command
def sample_command(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="Parquet: prompt_id, text, ids, finished")],
    seed: Seed = 0,
    settings: Set = None,
    offline: Offline = None,
) -> None:
    """Sample one response a prompt.

    Example: tspin sample --model my-model --data my-data.jsonl --out proto.parquet --set temperature=0
    """
    go_offline(offline)
    from tspin import stages
    from tspin.experiment import preset as experiment

    experiment.quiet_libraries()
    facts = stages.sample_to_file(model, dataset, out, seed, settings or [])
    typer.echo(f"{out}: " + ", ".join(f"{name} {value:.3g}" for name, value in facts.items()))


@app.command()
@command
def train(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="folder for the checkpoint")],
    method: MethodName = "tspin",
    iteration: Annotated[int, typer.Option(help="0-based; β is 0 at iteration 0")] = 0,
    synthetic: Annotated[Path | None, typer.Option(help="y′, from `tspin sample` with --model")] = None,
    proto: Annotated[Path | None, typer.Option(help="y0, from `tspin sample` with the initial model")] = None,
    reference: Annotated[str | None, typer.Option(help="π_θ0, for dpo from iteration 1 on")] = None,
    seed: Seed = 0,
    settings: Set = None,
    offline: Offline = None,
) -> None:
    """Train one iteration on responses in files.

    Example: tspin train --method tspin --model my-model --data my-data.jsonl --synthetic y1.parquet
    --proto y0.parquet --iteration 1 --out runs/step
    """
    go_offline(offline)
    from tspin import stages
    from tspin.experiment import preset as experiment

    experiment.quiet_libraries()
    facts = stages.train_from_files(
        model, dataset, out, method, iteration, synthetic, proto, reference, seed, settings or []
    )
    typer.echo(f"{out}: {facts['steps']} steps, {facts['tokens']:,} tokens, {facts['training_seconds']:.0f} s")


@app.command("diagnose")
@command
def diagnose_command(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="Parquet: a row a prompt and role, see tspin/diagnostics.py")],
    method: MethodName = "tspin",
    iteration: Annotated[int, typer.Option(help="0-based, of the training that made --model")] = 0,
    before: Annotated[str | None, typer.Option(help="π_θt, which --model was trained from")] = None,
    reference: Annotated[str | None, typer.Option(help="π_θ0, for dpo from iteration 1 on")] = None,
    synthetic: Annotated[
        Path | None, typer.Option(help="y′, from `tspin sample`, or a run's synthetic.parquet")
    ] = None,
    proto: Annotated[Path | None, typer.Option(help="y0, likewise")] = None,
    seed: Seed = 0,
    settings: Set = None,
    offline: Offline = None,
) -> None:
    """Log-likelihood and reward of every response under a checkpoint, before and after its training.

    Example: tspin diagnose --model runs/step --before my-model --method spin --data my-data.jsonl
    --synthetic y1.parquet --out diagnostics.parquet
    """
    go_offline(offline)
    from tspin import stages
    from tspin.experiment import preset as experiment

    experiment.quiet_libraries()
    facts = stages.diagnose_to_file(
        model, dataset, out, method, iteration, before, reference, synthetic, proto, seed, settings or []
    )
    for name, value in facts.items():
        typer.echo(f"{name}: {value:.4g}")


@app.command()
@command
def evaluate(
    model: Model,
    suite: Annotated[str, typer.Option(help="a suite of experiments/suites, or a YAML file")] = "pocket",
    out: Annotated[Path | None, typer.Option(help="CSV: benchmark, metric, value, stderr, n (percent)")] = None,
    batch_size: Annotated[int, typer.Option(help="prompts decoded together", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="problems a benchmark, for trials", min=1)] = None,
    dtype: Annotated[
        str, typer.Option(help="of the weights: float32, or bfloat16 for large models on GPUs")
    ] = "float32",
    offline: Offline = None,
) -> None:
    """Evaluate a model with lm-evaluation-harness.

    Example: tspin evaluate --model runs/pocket/seed-0/tspin/iteration-4/model --suite pocket --out scores.csv
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: float32 or bfloat16")
    go_offline(offline)
    from tspin import stages
    from tspin.experiment import preset as experiment

    experiment.quiet_libraries()
    typer.echo(stages.evaluate_to_file(model, suite, out, batch_size, limit, dtype).to_string(index=False))


@app.command("fetch")
@command
def fetch_command(
    preset: Annotated[str, typer.Argument(help="a preset of experiments/, or a YAML file")],
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
    from tspin import config
    from tspin.experiment import preset as experiment
    from tspin.hub import fetch
    from tspin.hub import offline as hub

    experiment.quiet_libraries()
    loaded = config.load_config(preset, settings or [])
    if check:
        wrong = hub.verify(out)
        wrong += [f"{item}: not fetched" for item in fetch.needed(loaded) if not fetch.is_there(out, item)]
        what = "wrong with"
    else:
        wrong = fetch.fetch(loaded, out, take or [], lambda line: typer.echo(line, err=True))
        what = "missing from"
    for line in wrong[1:]:
        typer.echo(line, err=True)
    if wrong:
        raise UserError(f"{len(wrong)} things are {what} {out}, first: {wrong[0]}")
    typer.echo(f"{out}: everything that {preset} needs")


@app.command("plan")
@command
def plan_command(
    preset: Annotated[str, typer.Argument(help="a preset of experiments/, or a YAML file")],
    gpus: Annotated[int, typer.Option(help="how many", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, a100-40, l40s or rtx4090")] = "h100",
    utilisation: Annotated[float, typer.Option(help="share of the GPU's speed that is reached", min=0.01, max=1)] = 0.4,
    prompt_tokens: Annotated[int | None, typer.Option(help="mean; half of the maximum when left out")] = None,
    response_tokens: Annotated[int | None, typer.Option(help="mean, likewise")] = None,
    rows: Annotated[int | None, typer.Option(help="of the data, for methods that use all of it")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the plan there too")] = None,
    settings: Set = None,
) -> None:
    """Parameters, memory, tokens, hours and disk of a preset, and the first thing that will not fit.

    Example: tspin plan zephyr-7b --gpus 8 --gpu h100 --rows 200000
    """
    from rich.console import Console
    from rich.table import Table

    from tspin import config
    from tspin.experiment import preset as experiment
    from tspin.planning import plan
    from tspin.runs.stages import write_json

    experiment.quiet_libraries()
    loaded = config.load_config(preset, settings or [])
    found = plan.plan(
        loaded,
        gpus=gpus,
        gpu=gpu,
        utilisation=utilisation,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        rows=rows,
    )
    console = Console(highlight=False)
    console.print(f"{loaded.model.path}: {found.shape.parameters:,} parameters; {gpus} × {gpu}")
    memory = Table("memory a GPU", "part", "GiB", box=None, padding=(0, 2, 0, 0))
    for stage, parts in found.memory.items():
        memory.add_row(f"[bold]{stage}", "[bold]all", f"[bold]{sum(parts.values()) / 2**30:.2f}")
        for part, size in parts.items():
            memory.add_row("", part, f"{size / 2**30:.2f}")
    work = Table("method", "stage", "tokens", "PFLOPs", "hours", box=None, padding=(0, 2, 0, 0))
    for one in found.stages:
        work.add_row(one.method, one.stage, f"{one.tokens:,}", f"{one.flops / 1e15:,.1f}", f"{one.hours:.2f}")
    hours = sum(one.hours for one in found.stages)
    console.print(memory, work, sep="\n")
    console.print(f"{hours:.1f} hours at {utilisation:.0%} of the GPUs' speed, evaluation not counted; ", end="")
    console.print(f"{found.disk / 1e9:.1f} GB of checkpoints")
    if error := plan.measured_error():
        console.print(error)
    console.print(found.problem or "Everything fits.", style="bold")
    if json_file is not None:
        write_json(json_file, plan.as_dict(found))


def split(text: str) -> list[str]:
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


# Commands of other rooms (tables and figures in analysis/) register themselves; nothing of theirs is
# imported here but the function.
for _entry in sorted(entry_points(group="tspin.commands"), key=lambda entry: entry.name):
    app.command(_entry.name)(command(_entry.load()))


def main() -> None:
    """Entry point of the `tspin` command."""
    app()
