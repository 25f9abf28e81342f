"""What an iteration tells of itself: its model card and the hub's evaluation results, in `card/` beside the checkpoint.

Beside, not in it: a checkpoint is sealed when it is trained, and the scores come later. SelfPlayTrainer's `save_model`
and `push_to_hub` put both into one place.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from transformers import PreTrainedModel

from tspin import __version__
from tspin.errors import UserError, reason, tell, unknown
from tspin.evaluation.harness import HUB_MODULES
from tspin.iteration import Run
from tspin.models import in_hub_cache
from tspin.runs.files import write_text
from tspin.schema import is_share
from tspin.states import IterationResult

CARD = "card"  # the folder
TEMPLATE = Path(__file__).with_name("card.md.j2")


def write_card(result: IterationResult, run: Run, source: str | PreTrainedModel) -> Path:
    """Write an iteration's card with what is known of it now; returns its folder.

    Scores are those of evaluation/scores.csv beside the checkpoint, if they are there. source: the initial policy.
    """
    folder = result.model_path.parent / CARD
    scores = _scores(result)
    # The checkpoint itself may be given up; its step log is of the same day.
    trained = next(path for path in (result.model_path, result.model_path.parent / "steps.parquet") if path.exists())
    name = f"{run.args.method}-iteration-{result.iteration}"
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["self-play", run.args.method, "tspin", "arxiv:2601.08198"],
        model_name=name,
        eval_results=[_eval_result(row) for row in scores] or None,
        **_origin(source),
    )
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        name=name,
        result=result,
        method=run.args.method,
        loss=run.method.formula,
        settings=run.args.computed() | {"iterations": run.iterations},
        defaults=type(run.args)(output_dir=run.args.output_dir).computed(),
        rows=len(run.examples),
        scores=scores,
        provenance=result.provenance,
        version=__version__,
        date=datetime.fromtimestamp(trained.stat().st_mtime, UTC).date().isoformat(),
    )
    write_text(folder / "README.md", str(card))
    return folder


def write_eval_results(result: IterationResult, benchmarks: Mapping[str, tuple[str, str]]) -> None:
    """Write `.eval_results/<benchmark>.yaml`, as the hub's leaderboards read it, in percent.

    benchmarks: name in the scores → the data set's id on the hub and the task's id in that one's eval.yaml: only who
    has registered a benchmark says so. Raises UserError for a benchmark without a score, or with one that is no share.
    """
    scores = {row["benchmark"]: row for row in reversed(_scores(result))}
    for name, (dataset, task) in benchmarks.items():
        if name not in scores:
            raise UserError(unknown("evaluated benchmark", name, scores))
        row = scores[name]
        if not is_share(name, row["metric"]):
            raise UserError(f"{name}: {row['metric']} is no share of problems, and a leaderboard takes percent")
        notes = f"{row['metric']}; lm-evaluation-harness, {row['n']} problems"
        entry = EvalResultEntry(dataset, task, round(float(row["value"]), 2), notes=notes)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        write_text(result.model_path.parent / CARD / ".eval_results" / f"{name}.yaml", text)


def push(result: IterationResult, repo_id: str, token: str | None, private: bool | None, message: str) -> str:
    """Upload a checkpoint and its card to a repository of the hub, made where there is none; returns its address.

    Raises UserError, one line, where the hub cannot be reached or refuses it.
    """
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        for folder in (result.model_path, result.model_path.parent / CARD):
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in HUB_MODULES):
            raise
        raise UserError(
            f"{repo_id}: could not be uploaded ({reason(error)}); nothing is lost, it is in {result.model_path}"
        ) from error
    return str(address)


def _origin(source: str | PreTrainedModel) -> dict[str, Any]:
    """base_model and license for the card's header, those that are known."""
    folder = Path(str(source if isinstance(source, str) else source.name_or_path))
    found: dict[str, Any] = {}
    if in_hub_cache(folder):
        found["base_model"] = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    if (folder / "README.md").is_file():
        try:
            found["license"] = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
        except (ValueError, yaml.YAMLError) as error:  # what others wrote ends no run
            tell(f"{folder / 'README.md'}: not read ({reason(error)}); the checkpoints' cards name no license")
    return found


def _scores(result: IterationResult) -> list[dict[str, Any]]:
    """The checkpoint's scores, {"benchmark", "metric", "value", "stderr", "n"} each; none before it is evaluated."""
    path = result.model_path.parent / "evaluation" / "scores.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    return [{str(name): value for name, value in row.items()} for row in rows]


def _eval_result(row: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=row["benchmark"],
        dataset_name=row["benchmark"],
        metric_type=row["metric"].split(",")[0],
        metric_name=row["metric"],
        metric_value=round(float(row["value"]), 6),
    )
