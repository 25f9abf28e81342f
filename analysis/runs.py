"""Runs as people look at them: from a run's folder in runs/, or from a results folder, one seed or all of them.

run = load_run("runs/mine/tspin")                      # or "results/reference/pocket:tspin:10", or "…:tspin"
run.samples(1)                                         # a row a prompt: texts, gaps, lengths, at iteration 1
run.tokens(42)                                         # a row a token of y, y′, y0, at every iteration
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from tspin.errors import UserError
from tspin.schema import FIRST_RESPONSES, ONCE, PROTO, RESPONSE_NAMES, SYNTHETIC, averaged, gaps, misaligned, unit

from .entropy import nats
from .reading import read_evaluations, read_scores, read_settings, read_suite, read_table
from .samples import prompt_tokens, sample_rows

EMPTY = pd.DataFrame()


@dataclass(frozen=True)
class Run:
    """A run's tables; each has the columns `seed` and `iteration`, an empty one stands for what was not recorded.

    scores: label, value. outcomes: label, doc_id, value, problem by problem. steps: as logged. diagnostics:
    tspin.schema.DIAGNOSTICS. responses: prompt_id, text, the y′ that an iteration trains on; those of the policy that
    the last iteration ended with are one number further. token_logps: tspin.schema.TOKENS. prompts: prompt_id, prompt,
    labelled, and task where it is known. proto: prompt_id, text, of y0. costs: seconds, tokens, peak_bytes. warnings:
    name, of tspin.diagnostics; None where no iteration recorded whether there were any. unit: what the scores are in.
    averaged: the labels that Avg is of; None: all. settings: dotted name → value.
    """

    name: str
    method: str
    scores: pd.DataFrame
    steps: pd.DataFrame
    diagnostics: pd.DataFrame
    costs: pd.DataFrame
    responses: pd.DataFrame
    prompts: pd.DataFrame
    proto: pd.DataFrame = field(default_factory=pd.DataFrame)
    outcomes: pd.DataFrame = field(default_factory=pd.DataFrame)
    token_logps: pd.DataFrame = field(default_factory=pd.DataFrame)
    warnings: pd.DataFrame | None = None
    unit: str = "percent"
    averaged: Sequence[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def iterations(self) -> list[int]:
        """Those that anything is known of, in order."""
        tables = (self.diagnostics, self.scores, self.steps, self.costs)
        return sorted({int(t) for table in tables if len(table) for t in table["iteration"].unique()})

    def samples(self, iteration: int | None = None) -> pd.DataFrame:
        """A row per prompt (seed and iteration), as tspin_analysis.samples.sample_rows; of one iteration, or of all."""
        rows = self._samples
        return rows if iteration is None or rows.empty else rows[rows["iteration"] == iteration].reset_index(drop=True)

    def tokens(self, prompt_id: int, iteration: int | None = None) -> pd.DataFrame:
        """A row per token of a prompt's responses: iteration, role, place, token, before, after, change, in nats.

        Raises UserError where the run kept no single tokens of this prompt.
        """
        return prompt_tokens(self.name, self.token_logps, prompt_id, iteration)

    @cached_property
    def gaps(self) -> pd.DataFrame:
        """prompt_id, and reward and log-likelihood of y over y′ after training (tspin.schema.gaps)."""
        return gaps(self.diagnostics) if len(self.diagnostics) else self.diagnostics

    def average(self) -> pd.Series:
        """Avg by iteration: the mean over benchmarks (and seeds)."""
        return _mean_by_iteration(self.of_average(self.scores), "value")

    def of_average(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of `scores` or `outcomes` that Avg is of."""
        return table if self.averaged is None or table.empty else table[table["label"].isin(self.averaged)]

    def misaligned(self) -> pd.Series:
        """By iteration, the share of prompts where y has the higher reward and the lower log-likelihood."""
        table = self.gaps
        if len(table):
            table = table.dropna(subset=["reward", "log_likelihood"])  # a method without a reward, log π that is none
        return _mean_by_iteration(table.assign(misaligned=misaligned(table)) if len(table) else table, "misaligned")

    def entropy(self) -> pd.Series:
        """By iteration, the mean of −log π_θt(y′) in nats: its entropy where they are drawn at temperature 1."""
        return _mean_by_iteration(nats(self.diagnostics) if len(self.diagnostics) else EMPTY, "nats")

    def likelihood_gap(self) -> pd.Series:
        """By iteration, the mean of log π(y) − log π(y′) in nats."""
        return _mean_by_iteration(self.gaps, "log_likelihood")

    def length(self, role: str = SYNTHETIC) -> pd.Series:
        """By iteration, the mean tokens of a role's responses."""
        return _mean_by_iteration(self._of(role), "tokens")

    def finished(self, role: str = SYNTHETIC) -> pd.Series:
        """By iteration, the share of a role's responses that end, and were not cut."""
        return _mean_by_iteration(self._of(role), "finished")

    def _of(self, role: str) -> pd.DataFrame:
        return self.diagnostics[self.diagnostics["role"] == role] if len(self.diagnostics) else self.diagnostics

    @cached_property
    def _samples(self) -> pd.DataFrame:
        return sample_rows(self.diagnostics, self.prompts, self.responses, self.proto)


def load_run(spec: str | Path) -> Run:
    """A run by its folder, or `<results>:<method>:<seed>`, as results/reference/pocket:spin:10; without the seed, all.

    Raises UserError.
    """
    folder, parts = Path(spec), str(spec).split(":")
    try:
        if (folder / "config.json").is_file() and any(folder.glob("iteration-*")):
            return _from_folder(folder)
        for count in (2, 1):  # of the names after the folder's, which may have a colon itself
            place, names = Path(":".join(parts[:-count])), parts[len(parts) - count :]
            if len(parts) > count and (place / "suite.json").is_file() and (count == 1 or names[1].isdigit()):
                return _from_results(place, names[0], int(names[1]) if count == 2 else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{spec}: one of its files is damaged ({reason}): the command that made it makes it anew"
        ) from error
    inside = sorted(path.parent for path in folder.glob("*/config.json") if any(path.parent.glob("iteration-*")))
    if inside:
        raise UserError(f"{spec} holds runs, name one of them: {', '.join(map(str, inside))}")
    raise UserError(
        f"{spec}: no run; give a run's folder, such as runs/pocket/seed-0/spin, or a result, such as "
        "results/reference/pocket:spin:10"
    )


def _from_results(folder: Path, method: str, seed: int | None) -> Run:
    def of_run(table: pd.DataFrame) -> pd.DataFrame:
        rows = table[(table["method"] == method) & ((table["seed"] == seed) if seed is not None else True)]
        return rows.assign(iteration=rows["iteration"].fillna(0).astype(int))

    def optional(name: str) -> pd.DataFrame:
        return read_table(folder, name) if (folder / f"{name}.parquet").is_file() else pd.DataFrame()

    scores = of_run(read_scores(folder))
    if scores.empty:
        runs = read_evaluations(folder)[["method", "seed"]].drop_duplicates()
        known = ", ".join(f"{m}:{s}" for m, s in runs.itertuples(index=False))
        asked = method if seed is None else f"{method}:{seed}"
        raise UserError(f"{folder} has no run {asked}; it has: {known}")
    columns = read_suite(folder)
    labels = {column.benchmark: column.label for column in columns}
    scores["label"] = pd.Categorical(scores["label"], list(labels.values()))
    tables = {
        name: of_run(table) if len(table) else table
        for name, table in ((name, optional(name)) for name in ("steps", "diagnostics", "problems", "tokens"))
    }
    problems = tables["problems"]
    costs = [
        cost
        for cost in _json(folder / "provenance.json")["runs"]
        if cost["method"] == method and seed in (None, cost["seed"])
    ]
    prompts = optional("prompts")
    return Run(
        name=f"{folder}:{method}" + ("" if seed is None else f":{seed}"),
        method=method,
        scores=scores.sort_values(["iteration", "label"])[["seed", "iteration", "label", "value"]],
        outcomes=problems.assign(label=problems["benchmark"].map(labels)) if len(problems) else problems,
        steps=tables["steps"],
        diagnostics=tables["diagnostics"],
        costs=_costs(costs),
        responses=_drawn(optional("responses"), method, seed),
        prompts=prompts.drop(columns=["method", "seed", "iteration", "proto"], errors="ignore"),
        proto=_proto(prompts, seed),
        token_logps=tables["tokens"],
        warnings=_warnings((cost["iteration"], cost["warnings"]) for cost in costs if "warnings" in cost),
        unit=unit(column.named for column in columns),
        averaged=averaged((c.named for c in columns), set(problems["benchmark"]) if len(problems) else None),
        settings=_method_settings(read_settings(folder), method),
    )


def _proto(prompts: pd.DataFrame, seed: int | None) -> pd.DataFrame:
    """seed, prompt_id, text of results' y0, which are of one seed; none where another one is asked for."""
    if "proto" not in prompts:
        return pd.DataFrame()
    rows = prompts.loc[prompts["proto"].notna(), ["seed", "prompt_id", "proto"]].rename(columns={"proto": "text"})
    return rows if seed is None else rows[rows["seed"] == seed]


def _drawn(texts: pd.DataFrame, method: str, seed: int | None) -> pd.DataFrame:
    """seed, iteration, prompt_id, text of results' responses, by the iteration that trains on them.

    Results have them by the iteration whose policy drew them: the first y′, of all methods, is base's.
    """
    if texts.empty:
        return texts
    initial = (texts["method"] == "base") & (method not in ONCE)
    wanted = (initial | (texts["method"] == method)) & ((texts["seed"] == seed) if seed is not None else True)
    drawn = texts[wanted]
    started = drawn["iteration"].astype("Int64").fillna(0).astype(int) + 1
    return drawn.assign(iteration=started.where(~initial[wanted], 0))[["seed", "iteration", "prompt_id", "text"]]


def _from_folder(folder: Path) -> Run:
    numbered = ((re.fullmatch(r"iteration-(\d+)", path.name), path) for path in sorted(folder.iterdir()))
    iterations = {int(found[1]): path for found, path in numbered if found and path.is_dir()}
    iterations = dict(sorted(iterations.items()))
    config = _json(folder / "config.json")
    seed = int(config["settings"].get("seed", 0))

    def each(read: Callable[[Path], pd.DataFrame | None]) -> pd.DataFrame:
        tables = {t: read(path) for t, path in iterations.items()}
        recorded = [table.assign(seed=seed, iteration=t) for t, table in tables.items() if table is not None]
        return pd.concat(recorded, ignore_index=True) if recorded else pd.DataFrame()

    def parquet(name: str, columns: list[str] | None = None) -> pd.DataFrame:
        def read(path: Path) -> pd.DataFrame | None:
            return pd.read_parquet(path / name, columns=columns) if (path / name).is_file() else None

        return each(read)

    drawn = [parquet("synthetic.parquet", TEXT), parquet("examples.parquet", TEXT)]
    if len(drawn[1]):  # of the policy that an iteration ended with
        drawn[1]["iteration"] += 1
    method = config["settings"]["method"]
    first, proto = (_shared(folder, role) for role in (SYNTHETIC, PROTO))
    if first is not None and 0 in iterations and method not in ONCE:
        drawn.insert(0, pd.read_parquet(first, columns=TEXT).assign(seed=seed, iteration=0))
    prompts = pd.read_parquet(folder / "prompts.parquet") if (folder / "prompts.parquet").is_file() else pd.DataFrame()
    y0 = pd.DataFrame() if proto is None else pd.read_parquet(proto, columns=TEXT).assign(seed=seed)
    scores, outcomes = each(_scores), each(_outcomes)
    columns = scores[["benchmark", "metric", "label"]].drop_duplicates() if len(scores) else scores
    named = list(columns.itertuples(index=False, name=None))
    known = {benchmark for benchmark, _, label in named if label in set(outcomes["label"])} if len(outcomes) else None
    guards = {t: path / "guards.json" for t, path in iterations.items()}
    return Run(
        name=str(folder),
        method=method,
        scores=scores,
        outcomes=outcomes,
        steps=parquet("steps.parquet"),
        diagnostics=parquet("diagnostics.parquet"),
        costs=_costs([{"iteration": t, **_facts(path)} for t, path in iterations.items()]),
        responses=pd.concat(drawn, ignore_index=True).drop_duplicates(["iteration", "prompt_id"]),
        prompts=prompts,
        proto=y0,
        token_logps=parquet("tokens.parquet"),
        warnings=_warnings((t, _json(path)["warnings"]) for t, path in guards.items() if path.is_file()),
        unit=unit(named),
        averaged=averaged(named, known),
        settings=flat({**config["settings"], **{name: config[name] for name in MADE_FROM if name in config}}),
    )


TEXT = ["prompt_id", "text"]
MADE_FROM = ("data", "policy", "loading")  # of a run's config.json, besides its settings


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A tree of settings as dotted names → values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        found |= flat(value, name) if isinstance(value, Mapping) and value else {name: value}
    return found


def _method_settings(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings of one method's runs: what is common to all, and over it what holds for the method alone."""
    common = {name: value for name, value in config.items() if name != "methods"}
    own = {name: value for name, value in config.get("methods", {}).get(method, {}).items() if value != {}}
    return {"method": method, **flat(common), **flat(own)}


def _shared(folder: Path, role: str) -> Path | None:
    """A file of responses that methods share: in the run's folder or beside it, by its own name or the usual one."""
    own = _json(folder / RESPONSE_NAMES).get(role) if (folder / RESPONSE_NAMES).is_file() else None
    names = [name for name in (own, FIRST_RESPONSES[role]) if name]
    paths = [place / name for name in names for place in (folder, folder.parent / "shared")]
    return next((path for path in paths if path.is_file()), None)


def _columns(iteration: Path) -> pd.DataFrame:
    record = _json(iteration / "evaluation.stage.json")
    return pd.DataFrame(record["inputs"]["suite"]["columns"])[["benchmark", "metric", "label"]]


def _scores(iteration: Path) -> pd.DataFrame | None:
    if not (iteration / "evaluation.stage.json").is_file():
        return None
    return _columns(iteration).merge(pd.read_csv(iteration / "evaluation" / "scores.csv"), on=["benchmark", "metric"])


def _outcomes(iteration: Path) -> pd.DataFrame | None:
    if not (iteration / "evaluation.stage.json").is_file():
        return None
    samples = pd.read_parquet(iteration / "evaluation" / "samples.parquet", columns=["benchmark", "metric", "value"])
    kept = _columns(iteration).merge(samples, on=["benchmark", "metric"])
    return kept.assign(doc_id=kept.groupby("label").cumcount())[["label", "doc_id", "value"]]


def _facts(iteration: Path) -> dict[str, Any]:
    """What an iteration's training recorded, and the seconds of the other stages."""
    facts: dict[str, Any] = {}
    for stage in ("model", "synthetic.parquet", "reference.parquet"):
        record = iteration / f"{stage}.stage.json"
        if record.is_file():
            content = _json(record)
            facts |= content["facts"] if stage == "model" else {f"{stage}_seconds": content["seconds"]}
    return facts


def _costs(costs: list[dict[str, Any]]) -> pd.DataFrame:
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


def _warnings(names: Iterable[tuple[int, Iterable[str]]]) -> pd.DataFrame | None:
    """names: iteration and the warnings of each iteration (and seed) that recorded whether there were any."""
    recorded = list(names)
    rows = [{"iteration": t, "name": name} for t, told in recorded for name in told]
    return pd.DataFrame(rows, columns=["iteration", "name"]) if recorded else None


def _mean_by_iteration(table: pd.DataFrame, column: str) -> pd.Series:
    return table.groupby("iteration")[column].mean() if len(table) else pd.Series(dtype=float)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
