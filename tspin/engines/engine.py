"""Where a run's steps take place: in this process, in several under Accelerate, in vLLM. The settings say which."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tspin.config import SelfPlayConfig
from tspin.data.mapped import TypedRows, spread
from tspin.data.responses import Response
from tspin.data.turns import TurnEnd, stops, turn_end
from tspin.devices import give_back, without_denormals
from tspin.engines import here
from tspin.engines.adapters import load_policy
from tspin.engines.launch import launch_scoring, launch_training, scores_in_shards, trains_in_bfloat16
from tspin.engines.scoring import score_in_processes, scoring_processes
from tspin.engines.vllm import Served, Serving, generate_tokens, require_vllm
from tspin.models import Policy, dtype_name
from tspin.runs.stages import check_stage
from tspin.runs.unfinished import Unfinished
from tspin.sampling import generation_settings, response_of, sample
from tspin.triplets import Triplets

WATCHED = 64  # responses whose log-probabilities by the sampler are compared with the trainer's


class Engine:
    """Samples, scores and trains policies that are folders, each by the means that `args` name.

    loading: arguments of `from_pretrained` besides the folder. At most one policy stays in memory between two calls,
    and only where `score` is asked to keep it for the training that follows.
    serving: vLLM's engines, which an evaluation may have left for `sample`.

    Every method raises UserError where a model cannot be loaded or a process fails, and DamagedStage where a
    checkpoint of the run is no longer what was written.
    """

    def __init__(self, args: SelfPlayConfig, tokenizer: PreTrainedTokenizerBase, loading: Mapping[str, Any]):
        self.args = args
        self.serving = Serving()
        self.tokenizer = tokenizer
        self.loading = {**loading, **({"quantize": args.lora.quantize} if args.lora and args.lora.quantize else {})}
        self._kept: tuple[Policy, PreTrainedModel] | None = None

    @property
    def folder(self) -> Path:
        """The run's, for what several machines are to see."""
        return Path(str(self.args.output_dir))

    @cached_property
    def turn_end(self) -> TurnEnd:
        """What closes a response."""
        return turn_end(self.tokenizer, self.args.rendering)

    @without_denormals()
    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], *, seed: int, description: str = "sampling"
    ) -> Sequence[Response]:
        """One response per prompt, in the prompts' order; all backends stop at the same tokens (tspin.sampling.sample).

        prompts: token ids, special tokens included. Equal seeds give equal responses on one machine with one backend;
        between backends only greedy responses can be compared.
        """
        check_stage(Path(policy.folder))
        args, loading = self.args, self._sampling
        if args.sampling_backend == "transformers":
            self.serving.release()
            model = load_policy(policy, loading, whole=True).to(args.device)  # type: ignore[arg-type]
            return sample(
                model, self.tokenizer, prompts, args.decoding, seed=seed, end=self.turn_end, description=description
            )
        require_vllm("sampling_backend")
        stop = stops(self.tokenizer, generation_settings(policy.folder), self.turn_end)
        trusted = bool(loading.get("trust_remote_code"))
        served = Served(policy.folder, dtype_name(loading), args.engine, trusted, policy.fingerprint)
        # A sample: vLLM's arithmetic is its own, so that nothing else needs them, and they are not for free.
        watched = set(self.watched(len(prompts)))
        answers = generate_tokens(
            served, prompts, stop, decoding=args.decoding, seed=seed, watched=watched, serving=self.serving
        )
        return TypedRows(answers, lambda ids, logps: response_of(ids, stop, self.tokenizer, logps))

    @property
    def samples_as_it_scores(self) -> bool:
        """Whether responses come with the log π that `score` gives them, up to rounding: one arithmetic for both."""
        loading, autocast = self._scoring
        same_type = dtype_name(self._sampling) == dtype_name(loading) and not autocast
        return self.args.sampling_backend == "transformers" and same_type

    def looked_at(self, count: int) -> list[int]:
        """Of which the log-probabilities of single tokens are kept: some of those `diagnosed`."""
        return spread(self.diagnosed(count), self.args.token_prompts) if self.args.token_prompts else []

    def diagnosed(self, count: int) -> list[int]:
        """Which of so many prompts diagnostics score."""
        return spread(range(count), self.args.diagnostics_prompts)

    def watched(self, count: int) -> list[int]:
        """Of which the sampler's and the trainer's log-probabilities are compared: some of those `diagnosed`."""
        return spread(self.diagnosed(count), WATCHED)

    def score(
        self,
        policy: Policy,
        triplets: Triplets,
        of: str,
        *,
        known: Mapping[str, np.ndarray] | None = None,
        keep: bool = False,
    ) -> dict[str, list[float]]:
        """log π of every response under a policy: role → nats, in the triplets' order, on as many GPUs as there are.

        of: names the policy on the bar. known: role → those that are known already, NaN where they are not: only the
        rest is computed. keep: leave the policy in memory, for `train` to go on with.
        """
        unknown = np.full(len(triplets), np.nan)
        logps = {role: np.array((known or {}).get(role, unknown), dtype=float) for role in triplets.roles}
        roles = [role for role, values in logps.items() if np.isnan(values).any()]
        if roles:
            rows = np.flatnonzero(np.isnan([logps[role] for role in roles]).any(axis=0))
            part = triplets.of(roles)
            scored = self._score(policy, part if len(rows) == len(part) else part.select(rows.tolist()), of, keep)
            for role in roles:
                logps[role][rows] = np.where(np.isnan(logps[role][rows]), scored[role], logps[role][rows])
        return {role: values.tolist() for role, values in logps.items()}

    @without_denormals()
    def _score(self, policy: Policy, triplets: Triplets, of: str, keep: bool) -> dict[str, list[float]]:
        check_stage(Path(policy.folder))
        self.serving.release()
        loading, scoring = self._scoring[0], self._scoring_of(of)
        if scores_in_shards(self.args, policy.folder, loading):
            return launch_scoring(policy, loading, triplets, scoring, self.folder)
        processes = scoring_processes(self.args)
        if processes > 1:
            return score_in_processes(processes, policy, loading, triplets, scoring)
        model = load_policy(policy, loading)
        if keep and self.args.launcher is None:
            self._kept = (policy, model)
        return here.score(model, triplets, scoring)

    @without_denormals()
    def score_tokens(self, policy: Policy, triplets: Triplets, of: str) -> dict[str, list[list[float]]]:
        """log π of every token of every response under a policy: role → of each triplet, nats a token.

        For the few prompts that people look at: in this process where it holds the model.
        of: names the policy on the bar.
        """
        check_stage(Path(policy.folder))
        self.serving.release()
        loading, scoring = self._scoring[0], self._scoring_of(of)
        if scores_in_shards(self.args, policy.folder, loading):
            return launch_scoring(policy, loading, triplets, scoring, self.folder, by_token=True)
        return here.score(load_policy(policy, loading), triplets, scoring, by_token=True)

    def _scoring_of(self, of: str) -> here.Scoring:
        return here.Scoring(self.tokenizer, self.args, of, self._scoring[1])

    @without_denormals()
    def train(
        self,
        policy: Policy,
        training: here.Training,
        callbacks: Sequence[TrainerCallback] = (),
        unfinished: Unfinished | None = None,
    ) -> dict[str, Any]:
        """Train from a policy, into training.checkpoint; returns `tspin.engines.here.train`'s facts."""
        check_stage(Path(policy.folder))
        self.serving.release()
        kept, self._kept = self._kept, None
        if self.args.launcher is not None:
            return launch_training(policy, self.loading, training, unfinished)
        model = kept[1] if kept and kept[0] == policy else load_policy(policy, self.loading)
        del kept
        return here.train(model, training, callbacks, unfinished)

    @property
    def _sampling(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` while sampling."""
        dtype = self.args.sampling_dtype
        return self.loading if dtype is None else {**self.loading, "dtype": getattr(torch, dtype)}

    @property
    def _scoring(self) -> tuple[dict[str, Any], bool]:
        """Arguments of `from_pretrained` while scoring, and whether it computes under autocast to bfloat16."""
        if trains_in_bfloat16(self.args):  # π_θ and its reference should differ by training alone
            return {**self.loading, "dtype": torch.bfloat16}, False
        return self.loading, bool(self.args.bf16)

    def release(self) -> None:
        """Hold no policy, and give the memory back: the next step may be another process's."""
        self._kept = None
        self.serving.release()
        give_back()
