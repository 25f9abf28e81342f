"""One iteration: a value, and four steps that make its files.

    sample            policy, prompts                      → responses (Parquet)
    score_reference   responses                            → the reference's log-probabilities (Parquet)
    train             responses, reference                 → π_θt+1 (a checkpoint's folder)
    diagnose          responses, reference, π_θt+1         → log-likelihoods and rewards of every response (Parquet)

and three more that are looked at, of step 4: `score_tokens`, token by token, `score_held_out`, −log π(y) of rows that
are not trained on, and `measure`, signs of degeneration.

No log-probability is computed twice: y′ and y0 bring along that of the policy that drew them, where the sampler's
arithmetic is the trainer's; what iteration t − 1 found under the policy that it ended with, or under π_θ0, is taken
from its tables. What a loss contains is always by the trainer's own arithmetic.

Each step is a function from the value and its input files to one output file, which it writes to `target`. Algorithm 1
(tspin.selfplay) keeps the outputs as stages of a run's folder; `tspin sample`, `train`, `diagnose` and `tokens` take
single steps on files of the user's (tspin.experiment.steps).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from transformers import TrainerCallback

from tspin import canaries
from tspin.config import SelfPlayConfig
from tspin.data.encoding import Example, Examples
from tspin.data.mapped import column
from tspin.data.responses import Responses, read_responses, response_statistics, write_responses
from tspin.diagnostics import Logps, degeneration, held_out_nll, sample_table, summary, warnings
from tspin.engines.engine import Engine
from tspin.engines.here import FIRST_STEP, Training
from tspin.engines.launch import trains_in_bfloat16
from tspin.engines.trackers import Tracked
from tspin.errors import tell
from tspin.models import Policy, dtype_name
from tspin.objectives import Coefficients, Method
from tspin.runs.files import read_json, sha256, write_json
from tspin.runs.unfinished import Unfinished
from tspin.schema import LABELLED, PROTO, SYNTHETIC
from tspin.tokens import token_table
from tspin.triplets import Triplets, joined, make_triplets, reference_table, with_reference

Known = Mapping[str, np.ndarray]  # role → log π of responses, NaN where it is not known


@dataclass(frozen=True)
class Run:
    """What all iterations have in common: settings, encoded data, and where steps take place."""

    args: SelfPlayConfig
    examples: Examples
    engine: Engine

    @property
    def method(self) -> Method:
        return self.args.objective

    @property
    def iterations(self) -> int:
        """T; SFT is one round of training."""
        return self.args.iterations if self.method.self_play else 1

    @property
    def loading(self) -> dict[str, str]:
        """What a loaded model depends on besides its files."""
        return {name: str(value) for name, value in self.engine.loading.items()}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every number of the run follows from, besides its policies and responses."""
        return {"settings": self.args.computed(), "loading": self.loading, "data": self.examples.fingerprint}

    @property
    def decoding(self) -> dict[str, Any]:
        """What sampled responses follow from, besides policy, prompts and seed."""
        backend = {"backend": self.args.sampling_backend, "dtype": self.args.sampling_dtype}
        end = asdict(self.engine.turn_end)  # runs that share responses may end them otherwise
        return {"decoding": asdict(self.args.decoding), "end": end, "loading": self.loading, **backend}


@dataclass(frozen=True)
class Earlier:
    """What iteration t − 1 left of use to iteration t: its reference's and its diagnostics' table, where there are.

    steps: optimizer steps of all iterations until then.
    """

    reference: Path | None = None
    diagnostics: Path | None = None
    steps: int = 0


@dataclass(frozen=True)
class Iteration:
    """One iteration as a value: what its steps start from. Their outputs are files.

    number: t, from 0. policy: π_θt. initial: π_θ0. folder: where a run keeps its outputs.
    responses: y′ (SYNTHETIC) and y0 (PROTO), role → Parquet file as read_responses reads it; none without self-play.
    history: the y′ of earlier iterations that it trains on too, each a file.
    drawn_by: role → the policy that drew the responses in the file, where that is known.
    earlier: what iteration t − 1 left.
    """

    run: Run
    number: int
    policy: Policy
    initial: Policy
    folder: Path
    responses: Mapping[str, Path]
    history: Sequence[Path] = ()
    drawn_by: Mapping[str, Policy] = field(default_factory=dict)
    earlier: Earlier = Earlier()

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the iteration's numbers follow from, for the fingerprints of its stages."""
        return {
            **self.run.inputs,
            "iteration": self.number,
            "policy": self.policy.fingerprint,
            "initial": self.initial.fingerprint,
            "responses": {role: sha256(path) for role, path in self.responses.items()},
            "history": [sha256(path) for path in self.history],
            "weights": "bfloat16" if trains_in_bfloat16(self.run.args) else "as loaded",  # while computing
        }

    @property
    def coefficients(self) -> Coefficients:
        """Those in force at this iteration."""
        return self.run.args.coefficients_at(self.number)

    @property
    def reference(self) -> Policy:
        """The policy in the loss of methods that have one."""
        return self.initial if self.run.method.reference == "initial" else self.policy

    @property
    def trained_roles(self) -> list[str]:
        """The sampled roles that training sees: y0 only where it carries gradient, or is to be logged."""
        wanted = self.run.method.gradient_roles(self.coefficients)
        return [role for role in self.responses if role != PROTO or self.run.args.monitor_proto or role in wanted]

    @cached_property
    def sampled(self) -> dict[str, Responses]:
        """role → the responses in its file."""
        return {role: read_responses(path) for role, path in self.responses.items()}

    def triplets(self, roles: Sequence[str]) -> Triplets:
        """The labelled responses with those of the sampled `roles`."""
        return make_triplets(self.run.examples, {role: self.sampled[role] for role in roles})

    def at(self, places: Sequence[int], roles: Sequence[str]) -> Triplets:
        """`triplets` of the prompts at these places, in their order."""
        return self.triplets(roles).select(places)

    def drawn_logps(self, policy: Policy, prompt_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Role → log π of responses to these prompts by the sampler of `policy`, which drew them; NaN where unknown.

        Only where the sampler's arithmetic is the trainer's.
        """
        roles = [role for role in self.responses if self.drawn_by.get(role) == policy]
        if not self.run.engine.samples_as_it_scores:
            return {}
        return {role: column(self.sampled[role].of(prompt_ids).dataset, "logp") for role in roles}

    def earlier_logps(self, name: str, prompt_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Role → a column of iteration t − 1's diagnostics, with its y′, where that is of exactly these prompts."""
        path = self.earlier.diagnostics
        parts = pd.read_parquet(path).groupby("role") if path else ()
        return {
            str(role): rows[name].to_numpy(dtype=float)
            for role, rows in parts
            if np.array_equal(rows["prompt_id"], prompt_ids)
        }

    @cached_property
    def known_reference(self) -> dict[str, np.ndarray]:
        """Role → the reference's log-probabilities that iteration t − 1 found, of all prompts: y, y0, its own y′.

        Those of its history follow, of a reference that is always π_θ0.
        """
        prompt_ids = self.run.examples.prompt_ids
        if self.run.method.reference == "previous":
            return self.earlier_logps("after", prompt_ids)
        if self.earlier.reference is None:
            return {}
        table = pd.read_parquet(self.earlier.reference)
        return {role: table[role].to_numpy() for role in table.columns.drop("prompt_id")}

    def with_history(self, roles: Sequence[str]) -> Triplets:
        """`triplets`, and after them the same with the y′ of each earlier iteration in `history`."""
        earlier = [{**self.sampled, SYNTHETIC: read_responses(path)} for path in self.history]
        return joined(
            [self.triplets(roles)]
            + [make_triplets(self.run.examples, {role: drawn[role] for role in roles}) for drawn in earlier]
        )


def sample(
    run: Run, policy: Policy, examples: Sequence[Example], seed: int, target: Path, of: str = "responses"
) -> dict[str, float]:
    """Step 1: write one response of `policy` per prompt to a Parquet file; returns response_statistics."""
    prompts = examples.prompts if isinstance(examples, Examples) else [e.prompt_ids for e in examples]
    labelled = examples.labelled if isinstance(examples, Examples) else [e.labelled for e in examples]
    responses = run.engine.sample(policy, prompts, seed=seed, description=of)
    write_responses(target, (example.prompt_id for example in examples), responses)
    return response_statistics(responses, labelled)


def take_generated(run: Run, target: Path) -> dict[str, float]:
    """Step 1 where the data brought iteration 0's y′ along: write them as `sample` does."""
    generated = run.examples.generated
    assert generated is not None
    write_responses(target, run.examples.prompt_ids, generated)
    return response_statistics(generated, run.examples.labelled)


def score_reference(iteration: Iteration, target: Path) -> None:
    """Step 2: write the reference's log-probabilities of all that is trained on: Parquet, prompt_id, a column per role.

    What iteration t − 1 found under the same policy is taken from there, and what the reference drew from its sampler.
    """
    triplets, count = iteration.with_history(iteration.trained_roles), len(iteration.run.examples)
    drawn = iteration.drawn_logps(iteration.reference, iteration.run.examples.prompt_ids)
    known = {}
    for role, values in {SYNTHETIC: np.empty(0), **drawn, **iteration.known_reference}.items():
        if role == SYNTHETIC:  # known are those of t − 1 and before it: the history's, which stands after y′ of t
            newest, earlier = drawn.get(role, np.full(count, np.nan)), iteration.known_reference.get(role, np.empty(0))
            values = np.concatenate([newest, earlier, np.full(len(triplets), np.nan)])[: len(triplets)]
        else:
            values = np.resize(values[:count], len(triplets))  # again for each y′ of the history
        known[role] = values
    keep = iteration.reference == iteration.policy  # training starts from it
    logps = iteration.run.engine.score(iteration.reference, triplets, "the reference", known=known, keep=keep)
    reference_table(triplets, logps).to_parquet(target, index=False)


def train(
    iteration: Iteration,
    reference: Path | None,
    target: Path,
    *,
    log_folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    unfinished: Unfinished | None = None,
    tracked: Tracked | None = None,
) -> dict[str, Any]:
    """Step 3: train from π_θt into the folder `target`; returns tspin.engines.here.train's facts.

    reference: step 2's file. log_folder: where the step log goes. unfinished: where a stopped training keeps its state.
    tracked: the run, for trackers.
    """
    run = iteration.run
    triplets = iteration.with_history(iteration.trained_roles)
    if reference:
        triplets = with_reference(triplets, pd.read_parquet(reference))
    training = Training(triplets, run.engine.tokenizer, run.args, iteration.number, target, log_folder, tracked)
    return run.engine.train(iteration.policy, training, callbacks, unfinished)


def diagnose(iteration: Iteration, reference: Path | None, trained: Policy, target: Path) -> dict[str, float]:
    """Step 4: write log π and reward of responses before and after training; returns tspin.diagnostics.summary.

    Of args.diagnostics_prompts prompts, evenly spread. reference: step 2's file; without, the reference's
    log-probabilities are computed where the method has one.
    """
    run = iteration.run
    places = run.engine.diagnosed(len(run.examples))
    if len(places) < len(run.examples):
        tell(f"diagnostics: of {len(places):,} of {len(run.examples):,} prompts, evenly spread (diagnostics_prompts)")
    triplets = iteration.at(places, list(iteration.responses))
    prompt_ids = run.examples.prompt_ids[places]
    earlier = {name: iteration.earlier_logps(name, prompt_ids) for name in ("after", "reference")}
    before, referred = before_training(
        iteration, triplets, stored_logps(reference, places),
        iteration.drawn_logps(iteration.policy, prompt_ids) | _without_synthetic(earlier["after"]),
        iteration.drawn_logps(iteration.reference, prompt_ids) | _without_synthetic(earlier["reference"]),
    )  # fmt: skip
    after = before if trained == iteration.policy else run.engine.score(trained, triplets, "the trained policy")
    table = sample_table(run.method, iteration.coefficients, triplets, before, after, referred)
    table.to_parquet(target, index=False)
    return summary(table)


def score_tokens(iteration: Iteration, trained: Policy, target: Path) -> None:
    """Write log π of each token before and after training, of the prompts that people look at (Parquet, TOKENS)."""
    run = iteration.run
    triplets = iteration.at(run.engine.looked_at(len(run.examples)), list(iteration.responses))
    before = after = run.engine.score_tokens(iteration.policy, triplets, "the policy before, by token")
    if trained != iteration.policy:
        after = run.engine.score_tokens(trained, triplets, "the trained policy, by token")
    pq.write_table(token_table(run.engine.tokenizer, triplets, before, after), target)


def score_held_out(run: Run, policy: Policy, examples: Examples, target: Path) -> dict[str, float | None]:
    """Write −log π(y) of labelled rows that are not trained on, as JSON; returns tspin.diagnostics.held_out_nll."""
    triplets = make_triplets(examples, {})
    nats = run.engine.score(policy, triplets, "held-out labels")[LABELLED]
    found = held_out_nll(nats, [len(ids) for ids in column(triplets.dataset, f"{LABELLED}/ids")])
    write_json(target, found)
    return found


def before_training(
    iteration: Iteration, triplets: Triplets, stored: Known, of_policy: Known, of_reference: Known
) -> tuple[Logps, Logps | None]:
    """log π_θt of the triplets' responses, and log π of the reference, None without: what is not known is computed.

    stored: by step 2. of_policy, of_reference: known of each otherwise.
    """
    engine, method = iteration.run.engine, iteration.run.method
    same = method.uses_reference and iteration.reference == iteration.policy
    before = engine.score(
        iteration.policy, triplets, "the policy before", known={**of_policy, **(stored if same else {})}
    )
    if same or not method.uses_reference:
        return before, before if same else None
    return before, engine.score(iteration.reference, triplets, "the reference", known={**of_reference, **stored})


def stored_logps(reference: Path | None, places: Sequence[int]) -> dict[str, np.ndarray]:
    """Role → step 2's log-probabilities of the prompts at these places; empty without its file."""
    table = pd.DataFrame() if reference is None else pd.read_parquet(reference).drop(columns="prompt_id")
    return {str(role): table[role].to_numpy()[places] for role in table}  # what follows is history


def _without_synthetic(logps: Known) -> dict[str, np.ndarray]:
    """Without y′, which is another one in each iteration."""
    return {role: values for role, values in logps.items() if role != SYNTHETIC}


def measure(
    iteration: Iteration, reference: Path | None, diagnostics: Path | None, changed: float | None, target: Path
) -> dict[str, float]:
    """Write measures of degeneration, canaries, and the warnings that follow from both, as JSON; returns the measures.

    reference, diagnostics: the files of steps 2 and 4. changed: the share of weights that training changed.
    """
    examples = iteration.run.examples
    responses = {role: sampled.of(examples.prompt_ids) for role, sampled in iteration.sampled.items()}
    table = None if diagnostics is None else pd.read_parquet(diagnostics)
    measures = degeneration(responses.get(SYNTHETIC, []), examples.labelled, responses.get(PROTO, []), table)
    watched = canaries_of(iteration, reference, table, measures, changed)
    told = {**warnings(measures), **canaries.told(watched)}
    write_json(target, {"measures": measures, "canaries": canaries.plain(watched), "warnings": told})
    return measures


def canaries_of(
    iteration: Iteration,
    reference: Path | None,
    table: pd.DataFrame | None,
    measures: Mapping[str, float],
    changed: float | None,
) -> dict[str, canaries.Canary]:
    """The canaries of an iteration that is trained (tspin.canaries). table: its diagnostics, if there are any."""
    run, method, prompt_ids = iteration.run, iteration.run.method, iteration.run.examples.prompt_ids
    same = method.uses_reference and iteration.reference == iteration.policy
    coarse = run.args.bf16 or trains_in_bfloat16(run.args) or dtype_name(run.engine.loading).endswith("float16")
    arithmetic = "bfloat16" if coarse else "float32"
    first = read_json(iteration.folder / FIRST_STEP)
    # An earlier iteration's y′, which has a prompt's number too, changes nothing where policy and reference are one.
    known = None if iteration.history and not same else table
    if known is not None and not np.isin(first["prompt_ids"], known["prompt_id"]).all():
        places = np.unique(pd.Index(prompt_ids).get_indexer(first["prompt_ids"]))
        known = scored_by_trainer(iteration, reference, places.tolist(), [LABELLED, *iteration.trained_roles])
    found = canaries.first_step(method, iteration.coefficients, first, known, arithmetic, same)
    if table is not None and SYNTHETIC in iteration.sampled:
        if SYNTHETIC in iteration.drawn_logps(iteration.policy, prompt_ids):  # the table's are the sampler's own then
            stored = None if same else reference
            table = scored_by_trainer(iteration, stored, run.engine.watched(len(prompt_ids)), [SYNTHETIC])
        drawn = iteration.sampled[SYNTHETIC]
        by_engine = run.args.sampling_backend == "vllm" or run.args.sampling_dtype == "bfloat16"
        responses = zip(drawn.prompt_ids.tolist(), drawn.of(drawn.prompt_ids), strict=True)
        found |= canaries.sampler(responses, table, "bfloat16" if coarse or by_engine else "float32")
    if "unfinished_share" in measures:
        found["ended"] = canaries.Canary(1 - measures["unfinished_share"], least=canaries.ENDED)
    if changed is not None:
        found["changed"] = canaries.Canary(changed, least=canaries.CHANGED)
    return found


def scored_by_trainer(
    iteration: Iteration, reference: Path | None, places: Sequence[int], roles: Sequence[str]
) -> pd.DataFrame:
    """The diagnostics, before the training alone, of some roles of a few prompts: nothing in them is the sampler's."""
    triplets = iteration.at(places, iteration.trained_roles).of(roles)
    before, referred = before_training(iteration, triplets, stored_logps(reference, places), {}, {})
    return sample_table(iteration.run.method, iteration.coefficients, triplets, before, before, referred)
