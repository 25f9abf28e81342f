"""The steps of an iteration one by one, on files: `tspin sample`, `train`, `diagnose`, `tokens` and `evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from tspin.cli.guard import importing
from tspin.cli.options import Data, MethodName, Model, Offline, Reference, Seed, Set, checked_settings, complete_suites
from tspin.errors import UserError


def sample(
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
    overrides = checked_settings(model, dataset, settings, "tspin")
    with importing():
        from tspin.experiment import steps

    facts = steps.sample_to_file(steps.Step(model, dataset, out, seed=seed, overrides=overrides))
    typer.echo(f"{out}: " + ", ".join(f"{name} {value:.3g}" for name, value in facts.items()))


def train(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="folder for the checkpoint")],
    method: MethodName = "tspin",
    iteration: Annotated[int, typer.Option(help="0-based; β is 0 at iteration 0")] = 0,
    synthetic: Annotated[Path | None, typer.Option(help="y′, from `tspin sample` with --model")] = None,
    proto: Annotated[Path | None, typer.Option(help="y0, from `tspin sample` with the initial model")] = None,
    history: Annotated[
        list[Path] | None, typer.Option(help="y′ of an earlier iteration, to train on too; repeatable")
    ] = None,
    reference: Reference = None,
    seed: Seed = 0,
    settings: Set = None,
    offline: Offline = None,
) -> None:
    """Train one iteration on responses in files.

    Example: tspin train --method tspin --model my-model --data my-data.jsonl --synthetic y1.parquet
    --proto y0.parquet --iteration 1 --out runs/step
    """
    overrides = checked_settings(model, dataset, settings, method, [synthetic, proto, *(history or [])])
    with importing():
        from tspin.experiment import steps

    step = steps.Step(
        model, dataset, out, method, iteration, seed, overrides,
        synthetic=synthetic, proto=proto, history=history or [], reference=reference,
    )  # fmt: skip
    facts = steps.train_from_files(step)
    typer.echo(f"{out}: {facts['steps']} steps, {facts['tokens']:,} tokens, {facts['training_seconds']:.0f} s")


def diagnose(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="Parquet: a row a prompt and role, see tspin/diagnostics.py")],
    method: MethodName = "tspin",
    iteration: Annotated[int, typer.Option(help="0-based, of the training that made --model")] = 0,
    before: Annotated[str | None, typer.Option(help="π_θt, which --model was trained from")] = None,
    reference: Reference = None,
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
    overrides = checked_settings(model, dataset, settings, method, [synthetic, proto])
    with importing():
        from tspin.experiment import steps

    step = steps.Step(
        model, dataset, out, method, iteration, seed, overrides,
        synthetic=synthetic, proto=proto, before=before, reference=reference,
    )  # fmt: skip
    for name, value in steps.diagnose_to_file(step).items():
        typer.echo(f"{name}: {value:.4g}")


def tokens(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="Parquet: a row a prompt and role; ids, pieces, before, after")],
    before: Annotated[
        str | None, typer.Option(help="π_θt, which --model was trained from; --model itself if none")
    ] = None,
    synthetic: Annotated[
        Path | None, typer.Option(help="y′, from `tspin sample`, or a run's synthetic.parquet")
    ] = None,
    proto: Annotated[Path | None, typer.Option(help="y0, likewise")] = None,
    settings: Set = None,
    offline: Offline = None,
) -> None:
    """Log-probability of every token of responses under any checkpoint, and under the one before it.

    Of evenly spread prompts, as many as `--set token_prompts=…` says.

    Example: tspin tokens --model runs/step --before my-model --data my-data.jsonl --synthetic y1.parquet
    --out tokens.parquet
    """
    overrides = checked_settings(model, dataset, settings, "tspin", [synthetic, proto])
    with importing():
        from tspin.experiment import steps

    step = steps.Step(model, dataset, out, overrides=overrides, synthetic=synthetic, proto=proto, before=before)
    typer.echo(f"{out}: of {steps.tokens_to_file(step)} prompts")


def evaluate(
    model: Model,
    suite: Annotated[
        str, typer.Option(help="a suite of experiments/suites, or a YAML file", autocompletion=complete_suites)
    ] = "pocket",
    out: Annotated[Path | None, typer.Option(help="CSV: benchmark, metric, value, stderr, n (shares: percent)")] = None,
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
    from tspin.hub.offline import check_model
    from tspin.names import SUITES
    from tspin.yaml_files import find_yaml

    find_yaml(suite, SUITES, "suite")
    check_model(model)
    with importing():
        from tspin.experiment import steps

    typer.echo(steps.evaluate_to_file(model, suite, out, batch_size, limit, dtype).to_string(index=False))
