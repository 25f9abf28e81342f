"""One run as comparisons read it: from its folder in runs/, or from the committed results of a preset."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tspin.errors import UserError

from . import reading as load
from .style import LABELLED, SYNTHETIC


@dataclass(frozen=True)
class Run:
    """A run's tables; every one has a column `iteration`, empty tables stand for what was not recorded.

    scores: label, value (percent). steps: as logged. samples: prompt_id, and the gaps of y over y′ after training,
    reward and log_likelihood. costs: seconds, tokens, peak_bytes. responses: prompt_id, text, of the policy that the
    iteration ended with. prompts: prompt_id, prompt, labelled. warnings: name, of tspin.guards; None where an earlier
    version, which had none, made the run.
    """

    name: str
    method: str
    scores: pd.DataFrame
    steps: pd.DataFrame
    samples: pd.DataFrame
    costs: pd.DataFrame
    responses: pd.DataFrame
    prompts: pd.DataFrame
    warnings: pd.DataFrame | None = None

    def average(self) -> pd.Series:
        """Avg by iteration: the mean over benchmarks, in percent."""
        if self.scores.empty:
            return pd.Series(dtype=float)
        return self.scores.groupby("iteration")["value"].mean()

    def misaligned(self) -> pd.Series:
        """By iteration, the share of prompts where y has the higher reward and the lower log-likelihood."""
        if self.samples.empty:
            return pd.Series(dtype=float)
        wrong = (self.samples["reward"] > 0) & (self.samples["log_likelihood"] < 0)
        return wrong.groupby(self.samples["iteration"]).mean()


def load_run(spec: str) -> Run:
    """A run by its folder, or `<results folder>:<method>:<seed>`, such as results/pocket:spin:0. Raises UserError."""
    folder = Path(spec)
    parts = spec.rsplit(":", 2)
    try:
        if (folder / "config.json").is_file() and any(folder.glob("iteration-*")):
            return _from_folder(folder)
        if len(parts) == 3 and parts[2].isdigit() and Path(parts[0]).is_dir():
            return _from_results(Path(parts[0]), parts[1], int(parts[2]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{spec}: one of its files is damaged ({reason}): the command that made it makes it anew"
        ) from error
    raise UserError(
        f"{spec}: no run; give a run's folder, such as runs/pocket/seed-0/spin, or a result, such as "
        "results/pocket:spin:0"
    )


def _from_results(folder: Path, method: str, seed: int) -> Run:
    preset, results = folder.name, folder.parent

    def own(table: pd.DataFrame) -> pd.DataFrame:
        rows = table[(table["method"] == method) & (table["seed"] == seed)]
        return rows.assign(iteration=rows["iteration"].fillna(0).astype(int))

    def optional(name: str) -> pd.DataFrame:
        path = folder / f"{name}.parquet"
        return load.parquet(name, preset, results) if path.is_file() else pd.DataFrame()

    scores = own(load.tabulated(preset, results))
    if scores.empty:
        found = load.evaluations(preset, results)[["method", "seed"]].drop_duplicates()
        known = ", ".join(f"{m}:{s}" for m, s in found.itertuples(index=False))
        raise UserError(f"{folder} has no run {method}:{seed}; it has: {known}")
    order = [column.label for column in load.suite(preset, results)]
    scores["label"] = pd.Categorical(scores["label"], order)
    tables = {name: optional(name) for name in ("steps", "diagnostics", "responses", "prompts")}
    kept = {name: own(table) if len(table) else table for name, table in tables.items() if name != "prompts"}
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    costs = [cost for cost in provenance["runs"] if (cost["method"], cost["seed"]) == (method, seed)]
    return Run(
        f"{folder}:{method}:{seed}",
        method,
        scores.sort_values(["iteration", "label"])[["iteration", "label", "value"]],
        kept["steps"], _gaps(kept["diagnostics"]), _costs(costs), kept["responses"], tables["prompts"],
        _warnings({cost["iteration"]: cost["warnings"] for cost in costs if "warnings" in cost}),
    )  # fmt: skip


def _from_folder(folder: Path) -> Run:
    iterations = sorted(int(path.name.split("-")[1]) for path in folder.glob("iteration-*"))

    def each(read: Callable[[Path], pd.DataFrame | None]) -> pd.DataFrame:
        tables = {t: read(folder / f"iteration-{t}") for t in iterations}
        found = [table.assign(iteration=t) for t, table in tables.items() if table is not None]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    def parquet(name: str) -> Callable[[Path], pd.DataFrame | None]:
        return lambda path: pd.read_parquet(path / name) if (path / name).is_file() else None

    def scores(path: Path) -> pd.DataFrame | None:
        record = path / "evaluation.stage.json"
        if not record.is_file():
            return None
        columns = json.loads(record.read_text(encoding="utf-8"))["inputs"]["suite"]["columns"]
        wanted = pd.DataFrame(columns)[["benchmark", "metric", "label"]]
        return wanted.merge(pd.read_csv(path / "evaluation" / "scores.csv"), on=["benchmark", "metric"])

    responses = each(parquet("synthetic.parquet"))
    if len(responses):  # what iteration t trained on as y′ came from the policy of iteration t − 1
        responses = responses.assign(iteration=responses["iteration"] - 1)
    last = each(parquet("examples.parquet"))
    costs = []
    for t in iterations:
        cost = {"iteration": t}
        for stage in ("model", "synthetic.parquet", "reference.parquet"):
            record = folder / f"iteration-{t}" / f"{stage}.stage.json"
            if record.is_file():
                content = json.loads(record.read_text(encoding="utf-8"))
                cost |= content["facts"] if stage == "model" else {f"{stage}_seconds": content["seconds"]}
        costs.append(cost)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
    prompts = folder / "prompts.parquet"
    return Run(
        str(folder), settings["method"], each(scores), each(parquet("steps.parquet")),
        _gaps(each(parquet("diagnostics.parquet"))), _costs(costs),
        pd.concat([responses, last], ignore_index=True),
        pd.read_parquet(prompts) if prompts.is_file() else pd.DataFrame(),
        _warnings({t: json.loads(path.read_text(encoding="utf-8"))["warnings"]
                   for t in iterations if (path := folder / f"iteration-{t}" / "guards.json").is_file()}),
    )  # fmt: skip


def _warnings(found: Mapping[int, Iterable[str]]) -> pd.DataFrame | None:
    rows = [{"iteration": t, "name": name} for t, names in found.items() for name in names]
    return pd.DataFrame(rows, columns=["iteration", "name"]) if found else None


def _gaps(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty or not {LABELLED, SYNTHETIC} <= set(table["role"]):
        return pd.DataFrame()
    wide = table.pivot(index=["iteration", "prompt_id"], columns="role", values=["reward_after", "after"])
    columns = {"reward": "reward_after", "log_likelihood": "after"}
    return pd.DataFrame({n: wide[c, LABELLED] - wide[c, SYNTHETIC] for n, c in columns.items()}).reset_index()


def _costs(costs: list[dict]) -> pd.DataFrame:
    rows = [
        {
            "iteration": cost["iteration"],
            "seconds": sum(v for k, v in cost.items() if k.endswith("_seconds") and v is not None),
            "tokens": cost.get("tokens"),
            "peak_bytes": cost.get("peak_memory_bytes"),
        }
        for cost in costs
    ]
    return pd.DataFrame(rows, columns=["iteration", "seconds", "tokens", "peak_bytes"]).sort_values("iteration")
