"""What a run has come to: each iteration's result, and the whole run's TrainerState in trainer_state.json."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerState

from tspin.errors import UserError
from tspin.models import Adapter, Policy
from tspin.runs.files import read_json, write_json
from tspin.schema import LABELLED

STATE = "trainer_state.json"
BEST = "best_iteration"  # among stateful_callbacks, so that transformers.TrainerState.load_from_json reads the file
HELD_OUT_NLL = "held_out_nll"


@dataclass(frozen=True)
class IterationResult:
    """What one iteration left: the checkpoint's folder, its fingerprint, and facts of its steps."""

    iteration: int
    model_path: Path
    fingerprint: str
    synthetic: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)  # what has gone too far, see tspin.iteration.measure
    held_out: dict[str, Any] = field(default_factory=dict)  # −log π(y) of eval_dataset, see tspin.diagnostics
    provenance: dict[str, Any] = field(default_factory=dict)  # of the training, see tspin.runs.provenance
    adapter: Adapter | None = None  # where adapters were trained

    @property
    def policy(self) -> Policy:
        """π_θt+1."""
        return Policy(str(self.model_path), self.fingerprint, self.adapter)

    @property
    def steps(self) -> pd.DataFrame:
        """The step log."""
        return pd.read_parquet(self.model_path.parent / "steps.parquet")

    def moved(self) -> dict[str, float]:
        """How much the iteration did: the highest learning rate logged, and the mean change of log π(y) in nats.

        That is by the diagnostics, NaN without them: rows of the step log are of other prompts each.
        """
        before, after = (
            self.diagnostics.get(f"log_likelihood_{when}/{LABELLED}", math.nan) for when in ("before", "after")
        )
        return {"learning_rate": float(self.steps["learning_rate"].max()), "labelled": float(after - before)}


def begun(folder: Path, rule: str) -> TrainerState:
    """The state of a run that has no iteration yet. Raises UserError where it was begun under another rule."""
    path = folder / STATE
    state = TrainerState(stateful_callbacks={BEST: {"rule": rule, "iteration": None}})  # type: ignore[arg-type]
    if not path.exists():
        write_state(folder, state)
    elif (there := read_json(path)["stateful_callbacks"][BEST]["rule"]) != rule:
        raise UserError(
            f"best_iteration: {folder} was begun with {there}, and now it is {rule}: the rule is fixed before a run; "
            "set it back or choose another folder"
        )
    return state


def advance(state: TrainerState, result: IterationResult, rule: str) -> None:
    """Add an iteration to a run's state: its log by global steps, and whether it is the best by the rule.

    rule: "held_out_nll", the least mean −log π(y) of the held-out rows, the earlier of equal ones, or "last".
    """
    before, mark = state.global_step, {"iteration": result.iteration}
    rows = result.steps.to_dict("records")
    for row in rows:
        kept = {str(name): value for name, value in row.items() if math.isfinite(value)}
        state.log_history.append({**kept, "step": before + int(row["step"]), **mark})
    state.global_step = state.max_steps = before + result.training["steps"]
    state.epoch += rows[-1]["epoch"]
    if result.held_out:
        scores = {f"eval_{name}": value for name, value in result.held_out.items() if value is not None}
        state.log_history.append({**scores, "step": state.global_step, **mark})
    metric = result.held_out["nll"] if rule == HELD_OUT_NLL else None
    if metric is None or state.best_metric is None or metric < state.best_metric:
        state.best_metric, state.best_global_step = metric, state.global_step
        state.best_model_checkpoint = str(result.model_path)
        state.stateful_callbacks = {BEST: {"rule": rule, **mark}}  # type: ignore[assignment]


def best_of(state: TrainerState) -> int:
    """The number of the best iteration until now."""
    kept: Any = state.stateful_callbacks
    number: int = kept[BEST]["iteration"]
    return number


def write_state(folder: Path, state: TrainerState) -> None:
    """Write trainer_state.json, whole or not at all."""
    write_json(folder / STATE, asdict(state))
