"""Where a run's steps take place: in this process, in several under Accelerate, in vLLM. The settings say which."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tspin.config import SelfPlayConfig
from tspin.data.mapped import TypedRows
from tspin.data.responses import Response
from tspin.data.turns import TurnEnd, stops, turn_end
from tspin.devices import give_back
from tspin.engines import here
from tspin.engines.launch import launch_training, trains_in_bfloat16
from tspin.engines.scoring import score_in_processes, scoring_processes
from tspin.engines.vllm import Served, generate_tokens, require_vllm
from tspin.models import Policy, dtype_name, load_model
from tspin.runs.stages import check_stage
from tspin.runs.unfinished import Unfinished
from tspin.sampling import generation_settings, response_of, sample
from tspin.triplets import Triplets

WATCHED = 64  # responses whose log-probabilities vLLM gives, to be compared with the trainer's


class Engine:
    """Samples, scores and trains policies that are folders, each by the means that `args` name.

    loading: arguments of `from_pretrained` besides the folder. At most one policy stays in memory between two calls,
    and only where `score` is asked to keep it for the training that follows.

    Every method raises UserError where a model cannot be loaded or a process fails, and DamagedStage where a
    checkpoint of the run is no longer what was written.
    """

    def __init__(self, args: SelfPlayConfig, tokenizer: PreTrainedTokenizerBase, loading: Mapping[str, Any]):
        self.args = args
        self.tokenizer = tokenizer
        self.loading = dict(loading)
        self._kept: tuple[Policy, PreTrainedModel] | None = None

    @cached_property
    def turn_end(self) -> TurnEnd:
        """What closes a response."""
        return turn_end(self.tokenizer, self.args.rendering)

    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], *, seed: int, description: str = "sampling"
    ) -> Sequence[Response]:
        """One response per prompt, in the prompts' order; all backends stop at the same tokens (tspin.sampling.sample).

        prompts: token ids, special tokens included. Equal seeds give equal responses on one machine with one backend;
        between backends only greedy responses can be compared.
        """
        check_stage(Path(policy.folder))
        args, loading = self.args, dict(self.loading)
        if args.sampling_dtype is not None:
            loading["dtype"] = getattr(torch, args.sampling_dtype)
        if args.sampling_backend == "transformers":
            model = load_model(policy.folder, loading).to(args.device)  # type: ignore[arg-type]
            return sample(
                model, self.tokenizer, prompts, args.decoding, seed=seed, end=self.turn_end, description=description
            )
        require_vllm("sampling_backend", args.engine)
        stop = stops(self.tokenizer, generation_settings(policy.folder), self.turn_end)
        served = Served(policy.folder, dtype_name(loading), args.engine, bool(loading.get("trust_remote_code")))
        answers = generate_tokens(served, prompts, stop, decoding=args.decoding, seed=seed, watched=WATCHED)
        return TypedRows(answers, lambda ids, logps: response_of(ids, stop, self.tokenizer, logps))

    def score(self, policy: Policy, triplets: Triplets, of: str, *, keep: bool = False) -> dict[str, list[float]]:
        """log π of every response under a policy: role → nats, in the triplets' order, on as many GPUs as there are.

        of: names the policy on the bar. keep: leave it in memory, for `train` to go on with.
        """
        check_stage(Path(policy.folder))
        loading, autocast = self.loading, bool(self.args.bf16)
        if trains_in_bfloat16(self.args):  # π_θ and its reference should differ by training alone
            loading, autocast = {**loading, "dtype": torch.bfloat16}, False
        scoring = here.Scoring(self.tokenizer, self.args, of, autocast)
        processes = scoring_processes(self.args)
        if processes > 1:
            return score_in_processes(processes, policy.folder, loading, triplets, scoring)
        model = load_model(policy.folder, loading)
        if keep and self.args.launcher is None:
            self._kept = (policy, model)
        return here.score(model, triplets, scoring)

    def train(
        self,
        policy: Policy,
        training: here.Training,
        callbacks: Sequence[TrainerCallback] = (),
        unfinished: Unfinished | None = None,
    ) -> dict[str, Any]:
        """Train from a policy, into training.checkpoint; returns `tspin.engines.here.train`'s facts."""
        check_stage(Path(policy.folder))
        kept, self._kept = self._kept, None
        if self.args.launcher is not None:
            return launch_training(policy.folder, self.loading, training)
        model = kept[1] if kept and kept[0] == policy else load_model(policy.folder, self.loading)
        del kept
        return here.train(model, training, callbacks, unfinished)

    def release(self) -> None:
        """Hold no policy, and give the memory back: the next step may be another process's."""
        self._kept = None
        give_back()
