"""One iteration: a value, and four steps that make its files.

    sample            policy, prompts                      → responses (Parquet)
    score_reference   responses                            → the reference's log-probabilities (Parquet)
    train             responses, reference                 → π_θt+1 (a checkpoint's folder)
    diagnose          responses, reference, π_θt+1         → log-likelihoods and rewards of every response (Parquet)

Each step is a function from the value and its input files to one output file, which it writes to `target`. Algorithm 1
(tspin.selfplay) keeps the outputs as stages of a run's folder; `tspin sample`, `train` and `diagnose` take single steps
on files of the user's (tspin.experiment.steps).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from tspin import canaries
from tspin.config import SelfPlayConfig
from tspin.data.encoding import Example, Examples
from tspin.data.responses import Responses, read_responses, response_statistics, write_responses
from tspin.diagnostics import degeneration, sample_table, summary, warnings
from tspin.engines.engine import Engine
from tspin.engines.here import FIRST_STEP, Training
from tspin.engines.launch import trains_in_bfloat16
from tspin.models import Policy
from tspin.objectives import METHODS, Coefficients, Method
from tspin.runs.files import read_json, sha256, write_json
from tspin.runs.unfinished import Unfinished
from tspin.schema import PROTO, SYNTHETIC
from tspin.triplets import Triplets, joined, make_triplets, reference_table, with_reference


@dataclass(frozen=True)
class Run:
    """What all iterations have in common: settings, encoded data, and where steps take place."""

    args: SelfPlayConfig
    examples: Examples
    engine: Engine

    @property
    def method(self) -> Method:
        return METHODS[self.args.method]

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
        return {"decoding": asdict(self.args.decoding), "loading": self.loading, **backend}


@dataclass(frozen=True)
class Iteration:
    """One iteration as a value: what its steps start from. Their outputs are files.

    number: t, from 0. policy: π_θt. initial: π_θ0. folder: where a run keeps its outputs.
    responses: y′ (SYNTHETIC) and y0 (PROTO), role → Parquet file as read_responses reads it; none without self-play.
    history: the y′ of earlier iterations that it trains on too, each a file.
    """

    run: Run
    number: int
    policy: Policy
    initial: Policy
    folder: Path
    responses: Mapping[str, Path]
    history: Sequence[Path] = ()

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
        return self.run.method.coefficients_at(self.number, self.run.args.coefficients)

    @property
    def reference(self) -> Policy:
        """The policy in the loss of methods that have one."""
        return self.initial if self.run.method.reference == "initial" else self.policy

    @property
    def trained_roles(self) -> list[str]:
        """The sampled roles that training sees: y0 only where it carries gradient, or is to be logged."""
        wanted = self.run.method.gradient_roles(self.coefficients)
        return [role for role in self.responses if role != PROTO or self.run.args.monitor_proto or role in wanted]

    @property
    def scored_roles(self) -> list[str]:
        """The sampled roles that the reference scores: of y0 too where diagnostics ask for it; one pass serves both."""
        return list(self.responses) if self.run.args.diagnostics else self.trained_roles

    @cached_property
    def sampled(self) -> dict[str, Responses]:
        """role → the responses in its file."""
        return {role: read_responses(path) for role, path in self.responses.items()}

    def triplets(self, roles: Sequence[str]) -> Triplets:
        """The labelled responses with those of the sampled `roles`."""
        return make_triplets(self.run.examples, {role: self.sampled[role] for role in roles})

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
    """Step 2: write the reference's log-probabilities of all responses: Parquet, prompt_id and a column per role."""
    triplets = iteration.with_history(iteration.scored_roles)
    keep = iteration.reference == iteration.policy  # training starts from it
    logps = iteration.run.engine.score(iteration.reference, triplets, "the reference", keep=keep)
    reference_table(triplets, logps).to_parquet(target, index=False)


def train(
    iteration: Iteration,
    reference: Path | None,
    target: Path,
    *,
    log_folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """Step 3: train from π_θt into the folder `target`; returns tspin.engines.here.train's facts.

    reference: step 2's file. log_folder: where the step log goes. unfinished: where a stopped training keeps its state.
    """
    run = iteration.run
    triplets = iteration.with_history(iteration.trained_roles)
    if reference:
        triplets = with_reference(triplets, pd.read_parquet(reference))
    training = Training(triplets, run.engine.tokenizer, run.args, iteration.number, target, log_folder)
    return run.engine.train(iteration.policy, training, callbacks, unfinished)


def diagnose(iteration: Iteration, reference: Path | None, trained: Policy, target: Path) -> dict[str, float]:
    """Step 4: write log π and reward of every response before and after training; returns tspin.diagnostics.summary.

    reference: step 2's file; without, the reference's log-probabilities are computed where the method has one.
    """
    run, method = iteration.run, iteration.run.method
    triplets = iteration.triplets(list(iteration.responses))
    referred = None
    if reference is not None:
        table = pd.read_parquet(reference)
        referred = {role: table[role].tolist()[: len(triplets)] for role in triplets.roles}  # what follows is history
    elif method.uses_reference:
        referred = run.engine.score(iteration.reference, triplets, "the reference")
    before = referred if referred and iteration.reference == iteration.policy else None
    before = before or run.engine.score(iteration.policy, triplets, "the policy before")
    after = before if trained == iteration.policy else run.engine.score(trained, triplets, "the trained policy")
    table = sample_table(method, iteration.coefficients, triplets, before, after, referred)
    table.to_parquet(target, index=False)
    return summary(table)


def measure(iteration: Iteration, diagnostics: Path | None, changed: float | None, target: Path) -> dict[str, float]:
    """Write measures of degeneration, canaries, and the warnings that follow from both, as JSON; returns the measures.

    changed: the share of weights that training changed.
    """
    examples = iteration.run.examples
    responses = {role: sampled.of(examples.prompt_ids) for role, sampled in iteration.sampled.items()}
    table = None if diagnostics is None else pd.read_parquet(diagnostics)
    measures = degeneration(responses.get(SYNTHETIC, []), examples.labelled, responses.get(PROTO, []), table)
    watched = canaries_of(iteration, table, measures, changed)
    told = {**warnings(measures), **canaries.told(watched)}
    write_json(target, {"measures": measures, "canaries": canaries.plain(watched), "warnings": told})
    return measures


def canaries_of(
    iteration: Iteration, table: pd.DataFrame | None, measures: Mapping[str, float], changed: float | None
) -> dict[str, canaries.Canary]:
    """The canaries of an iteration that is trained (tspin.canaries). table: its diagnostics, if there are any."""
    run, method = iteration.run, iteration.run.method
    same = method.uses_reference and iteration.reference == iteration.policy
    coarse = run.args.bf16 or trains_in_bfloat16(run.args) or "bfloat16" in run.loading.get("dtype", "")
    first = read_json(iteration.folder / FIRST_STEP)
    # An earlier iteration's y′, which has a prompt's number too, changes nothing where policy and reference are one.
    logps = None if iteration.history and not same else table
    arithmetic = "bfloat16" if coarse else "float32"
    found = canaries.first_step(method, iteration.coefficients, first, logps, arithmetic, same)
    if table is not None and SYNTHETIC in iteration.sampled:
        drawn = iteration.sampled[SYNTHETIC]
        by_engine = run.args.sampling_backend == "vllm" or run.args.sampling_dtype == "bfloat16"
        responses = zip(drawn.prompt_ids.tolist(), drawn.of(drawn.prompt_ids), strict=True)
        found |= canaries.sampler(responses, table, "bfloat16" if coarse or by_engine else "float32")
    if "unfinished_share" in measures:
        found["ended"] = canaries.Canary(1 - measures["unfinished_share"], least=canaries.ENDED)
    if changed is not None:
        found["changed"] = canaries.Canary(changed, least=canaries.CHANGED)
    return found
