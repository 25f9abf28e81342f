"""What a method's stages compute, draw, exchange and store, and the hours that takes: `Stage` by `Stage`.

P parameters, A of adapters. A token's forward pass takes 2 (P + A) FLOPs, its way back through the activations as much,
and with gradient checkpointing a second forward pass too; gradients of what is trained take 2 per parameter: 6 P and
8 P where all is trained, 4 P + 6 A and 6 P + 8 A of adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tspin.config import EvaluationSettings, RunSettings, coefficients_of
from tspin.errors import UserError
from tspin.evaluation.suites import load_suite
from tspin.objectives import METHODS
from tspin.planning import peaks
from tspin.planning.architectures import Shape
from tspin.planning.hardware import DISK, ENGINE_START, HASHING, PROCESS_START, Hardware
from tspin.schema import BASE, LABELLED, PROTO, ROLES, SYNTHETIC

DECODED_TOGETHER = 256  # sequences of a vLLM copy, its default
PASSED_TOGETHER = 16384  # tokens of prompts, likewise
WEIGHT = {"float32": 4, "bfloat16": 2}  # bytes
FACTS = Path(__file__).with_name("benchmarks.yaml")


class Lengths(NamedTuple):
    """Mean tokens of prompts, of y, and of y′ and y0."""

    prompt: int
    labelled: int
    drawn: int

    def of(self, role: str) -> int:
        """A response's."""
        return self.labelled if role == LABELLED else self.drawn


@dataclass(frozen=True)
class Stage:
    """One kind of work of a method, over all its iterations. hours: on the clock."""

    method: str
    stage: str
    tokens: int
    flops: float
    hours: float


@dataclass(frozen=True)
class Work:
    """A method's settings and what is known of its model, data and machines. adapters: their parameters, 0 without."""

    settings: RunSettings
    shape: Shape
    lengths: Lengths
    hardware: Hardware
    labels: int
    adapters: int = 0

    @property
    def training(self) -> Any:
        """Settings, see RunSettings."""
        return self.settings.training

    @property
    def sharded(self) -> bool:
        """Whether weights are spread over GPUs (FSDP); adapters are trained beside whole ones."""
        return self.hardware.all_gpus > 1 and not self.training.lora

    @property
    def compute(self) -> int:
        """Bytes of a number in training's products."""
        return WEIGHT[self.settings.model.dtype] if self.training.bf16 is False else 2

    @property
    def matrix(self) -> float | None:
        """Bytes of a weight in a layer's matrices, where they are cut to 4 bits."""
        return peaks.NF4 if self.training.lora and self.training.lora.quantize else None

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint; with adapters of the merged one and of them."""
        lora = self.training.lora
        weight = WEIGHT[lora.merged_dtype if lora else self.settings.model.dtype]
        return weight * self.shape.parameters + peaks.ADAPTER * self.adapters

    @property
    def disk(self) -> tuple[int, int]:
        """Bytes of checkpoints: of those that stay (keep_checkpoints), and beside them at most while it runs."""
        keep, earlier = self.training.keep_checkpoints, self.training.iterations - 1
        if keep == "all" or not earlier:
            return self.checkpoint * (1 + earlier), 0
        copies = earlier * WEIGHT["bfloat16"] * self.shape.parameters
        return self.checkpoint + {"last": 0, "best": self.checkpoint, "bfloat16": copies}[keep], self.checkpoint

    @property
    def samples_as_it_scores(self) -> bool:
        """Whether responses come with their log π, see tspin.engines.engine.Engine; `bf16: auto` is taken for true."""
        sampled = WEIGHT[self.training.sampling_dtype or self.settings.model.dtype]
        autocast = not self.sharded and self.compute != WEIGHT[self.settings.model.dtype]
        return self.training.sampling_backend == "transformers" and not autocast and sampled == self.compute

    def rounds(self, iteration: int) -> int:
        """How many y′ of a prompt an iteration trains on: its own, and with a history those of iterations before it."""
        return 1 + min(iteration, self.settings.data.history)

    def roles(self, iteration: int) -> list[str]:
        """Whose responses an iteration trains on: y0 only where it carries gradient, or is to be logged."""
        method, initial = METHODS[self.settings.method], self.training.proto_model is None
        wanted = method.gradient_roles(method.coefficients_at(iteration, coefficients_of(self.training), initial))
        monitored = method.self_play and self.training.monitor_proto
        return [role for role in ROLES if role in wanted or (role == PROTO and monitored)]

    def row(self, roles: Sequence[str]) -> int:
        """Tokens of one prompt with these responses: the prompt once, in the padded layout once for each."""
        prompts = len(roles) if self.training.layout == "padded" else 1
        return prompts * self.lengths.prompt + sum(map(self.lengths.of, roles))

    @property
    def longest_row(self) -> int:
        """Tokens, of the iteration with the most roles."""
        return max(self.row(self.roles(t)) for t in range(self.training.iterations))

    @property
    def trained_tokens(self) -> float:
        """Of all trainings and their epochs."""
        rows = sum(self.rounds(t) * self.row(self.roles(t)) for t in range(self.training.iterations))
        return self.training.num_train_epochs * self.labels * rows

    @property
    def fullest_row(self) -> int:
        """The same where prompt and responses have all the tokens that they may have: what memory is planned for."""
        training = self.training
        most = Lengths(training.max_prompt_length, training.max_completion_length, training.max_new_tokens)
        return replace(self, lengths=most).longest_row

    def micro_batches(self, row: int) -> int:
        """Of a step on one GPU, of prompts with rows of so many tokens; what is left over is one more."""
        tokens = max(self.training.micro_batch_tokens, row)  # a prompt is not cut
        return ceil(self.training.batch_size * row / (self.hardware.all_gpus * tokens))


def labels_of(settings: RunSettings, rows: int | None) -> int:
    """How many rows a method uses. Raises UserError where neither its config nor `rows` says it."""
    labels = settings.data.labels or rows
    if labels is None:
        raise UserError(f"{settings.method} uses all rows of {settings.data.path}: say how many they are with --rows")
    return labels


def stages(work: Work, first: bool = True) -> list[Stage]:
    """A method's work. first: whether y0 and the first y′ are its own to draw, which other methods then share."""
    method, scored = work.settings.method, scoring_passes(work)
    found = [_training(work)]
    if work.hardware.nodes > 1:
        found.append(Stage(method, "between machines", 0, 0.0, _exchange_seconds(work) / 3600))
    if scored:
        processes = min(work.training.engine.data_parallel, work.hardware.gpus)
        found.append(_forward(work, method, "scoring", sum(scored), processes))
    if METHODS[method].self_play:
        found.append(_sampling(work, first))
    evaluations = work.training.iterations
    if work.settings.evaluation:
        found.append(evaluation(work, method, evaluations))
    return [*found, *_files(work, len(scored))]


def _training(work: Work) -> Stage:
    shape, tokens = work.shape, work.trained_tokens
    through = 2 * (2 + work.training.gradient_checkpointing) * (shape.parameters + work.adapters)
    trained = work.adapters if work.training.lora else shape.parameters
    flops = tokens * (through + 2 * trained)
    hours = flops / (work.hardware.all_gpus * work.hardware.flops) / 3600
    return Stage(work.settings.method, "training", round(tokens), flops, hours)


def _exchange_seconds(work: Work) -> float:
    """Between machines, beside the arithmetic: FSDP gathers weights twice and adds gradients up once a micro-batch."""
    seen = sum(work.rounds(t) for t in range(work.training.iterations)) * work.labels
    steps = work.training.num_train_epochs * seen / work.training.batch_size
    if work.sharded:
        size = work.micro_batches(work.longest_row) * (2 * work.compute + peaks.SUMMED) * work.shape.parameters
    else:  # adapters' gradients are added up and brought back, once a step
        size = 2 * peaks.SUMMED * work.adapters
    return steps * work.hardware.exchange_seconds(size)


def _forward(work: Work, method: str, name: str, tokens: float, gpus: int) -> Stage:
    flops = 2 * tokens * work.shape.parameters
    return Stage(method, name, round(tokens), flops, flops / (gpus * work.hardware.flops) / 3600)


def scoring_passes(work: Work) -> list[int]:
    """Tokens of each pass that computes log-probabilities beside training, of all iterations.

    Nothing that the sampler or an earlier iteration found is computed again (tspin.iteration).
    """
    settings, training, method = work.settings, work.training, METHODS[work.settings.method]
    shown = min(work.labels, training.diagnostics_prompts) if training.diagnostics else 0
    responses = ROLES if method.self_play else (LABELLED,)
    own, previous, passes = work.samples_as_it_scores, method.reference == "previous", []
    for t in range(training.iterations):
        roles, rounds = work.roles(t), work.rounds(t)
        drawn = own and not (t == 0 and settings.data.generated)  # y′, by π_θt
        initial = own and t == 0 and training.proto_model is None  # y0, by a policy that is still π_θt
        if method.uses_reference:
            kept = t > 0 and (shown == work.labels or not previous)  # by iteration t − 1, of all prompts
            known = {role: [kept or (role == PROTO and initial)] * rounds for role in roles}
            earlier = [kept, *[kept and not previous] * rounds][: rounds - 1]  # the history's
            known[SYNTHETIC] = [drawn and (previous or t == 0), *earlier]
            passes.append(_unknown_tokens(work, known, work.labels))
        stored = roles if method.uses_reference and (previous or t == 0) else []  # under π_θt, by the reference's pass
        before = {LABELLED: t > 0, SYNTHETIC: drawn, PROTO: t > 0 or initial}
        passes.append(_unknown_tokens(work, {role: [role in stored or before[role]] for role in responses}, shown))
        passes.append(shown * work.row(responses))  # under the trained policy
        passes += [min(shown, training.token_prompts) * work.row(responses)] * 2  # token by token, before and after
    return [tokens for tokens in passes if tokens]


def _unknown_tokens(work: Work, known: Mapping[str, Sequence[bool]], prompts: int) -> int:
    """Tokens of a pass over the roles of which something is unknown, in all rows where something is.

    known: role → of each round of rows, whether its log-probabilities are.
    """
    roles = [role for role, rounds in known.items() if not all(rounds)]
    rows = sum(not all(of) for of in zip(*known.values(), strict=True))
    return prompts * rows * work.row(roles) if roles else 0


def together(training: Any) -> int:
    """Sequences that one copy of the model decodes together."""
    return DECODED_TOGETHER if training.sampling_backend == "vllm" else training.sampling_batch_size


def _copies(training: Any, backend: str, hardware: Hardware) -> tuple[int, int]:
    """Copies of the model that draw, and GPUs of each: those of engine, on one machine; Transformers has one of one."""
    if backend != "vllm":
        return 1, 1
    split = min(training.engine.tensor_parallel, hardware.gpus)
    return min(training.engine.data_parallel, hardware.gpus // split), split


def _sampling(work: Work, first: bool) -> Stage:
    """y′ of every iteration and, once, y0: those that the data did not bring, and no other method has drawn."""
    training, (prompt, _, response) = work.training, work.lengths
    shared = 1 + (not work.settings.data.generated)
    count = (training.iterations - 1 + (shared if first else 0)) * work.labels
    weight = WEIGHT[training.sampling_dtype or work.settings.model.dtype]
    copies, split = _copies(training, training.sampling_backend, work.hardware)
    seconds = _decoding_seconds(work, count, (prompt, response), weight, together(training), split) / copies
    tokens = count * (prompt + response)
    return Stage(work.settings.method, "sampling", tokens, 2.0 * tokens * work.shape.parameters, seconds / 3600)


def _decoding_seconds(work: Work, count: float, tokens: tuple[int, int], weight: int, batch: int, gpus: int) -> float:
    """Of one copy of the model on `gpus` GPUs. tokens: of a prompt and of its response.

    Prompts are arithmetic. Each further token of a batch reads all weights and the cache: the larger of that and its
    arithmetic counts.
    """
    prompt, response = tokens
    per_token = 2 * work.shape.parameters / (gpus * work.hardware.flops)
    read = weight * work.shape.parameters + batch * (prompt + response) * peaks.cache_bytes(work.shape, weight)
    step = max(read / (gpus * work.hardware.bandwidth), batch * per_token)
    return count * (prompt * per_token + response * step / batch)


@cache
def benchmark_facts() -> dict[str, dict[str, int]]:
    """Patterns of lm-eval's names → problems, prompt, drawn, as benchmarks.yaml has them."""
    facts: dict[str, dict[str, int]] = yaml.safe_load(FACTS.read_text(encoding="utf-8"))
    return facts


def evaluation(work: Work, method: str, count: int) -> Stage:
    """Of `count` checkpoints on the config's suite. A prompt is read once for all answers that are compared."""
    settings = work.settings.evaluation
    assert settings is not None
    weight = WEIGHT[settings.dtype or work.settings.model.dtype]
    vllm = settings.backend == "vllm"
    copies, split = _copies(work.training, settings.backend, work.hardware)
    batch, tokens, seconds = (DECODED_TOGETHER if vllm else settings.batch_size), 0, 0.0
    for prompts, prompt, drawn in _requests(settings):
        tokens += prompts * (prompt + drawn)
        seconds += _decoding_seconds(work, prompts, (prompt, drawn), weight, batch, split) / copies
    flops = 2.0 * count * tokens * work.shape.parameters
    return Stage(method, "evaluation", count * tokens, flops, count * seconds / 3600)


def _requests(settings: EvaluationSettings) -> list[tuple[int, int, int]]:
    """(requests, tokens of a prompt, tokens drawn) of each column."""
    found = []
    for column in load_suite(settings.suite).columns:
        of = next(of for name, of in benchmark_facts().items() if fnmatchcase(column.benchmark, name))
        limits = [limit for limit in (settings.limit, column.limit) if limit]
        problems = min([of["problems"], *limits])
        found.append((problems, of["prompt"], of["drawn"]))
    return found


def _files(work: Work, scored: int) -> list[Stage]:
    """Starts of processes, and checkpoints that are written, hashed, and read again, by each use of one.

    scored: passes that load a policy beside trainings, samplings and evaluations.
    """
    settings, training = work.settings, work.training
    iterations, size = training.iterations, work.checkpoint
    samplings = iterations + 1 if METHODS[settings.method].self_play else 0
    evaluations = iterations if settings.evaluation else 0
    engines = samplings if training.sampling_backend == "vllm" else 0
    engines += evaluations if settings.evaluation and settings.evaluation.backend == "vllm" else 0
    kept = iterations - 1 if samplings and _evaluates_as_it_samples(settings) else 0
    processes = iterations if work.hardware.all_gpus > 1 else 0
    processes += scored if min(training.engine.data_parallel, work.hardware.gpus) > 1 else 0
    engines, uses = engines - kept, iterations + samplings + evaluations + scored - kept
    starting = (processes + engines) * PROCESS_START.value + engines * ENGINE_START.value
    loading = uses * size * (1 / DISK.value + 1 / HASHING.value)
    saving = iterations * size * (1 / DISK.value + 1 / HASHING.value)
    return [
        Stage(settings.method, "starts, loading", 0, 0.0, (starting + loading) / 3600),
        Stage(settings.method, "saving, hashing", 0, 0.0, saving / 3600),
    ]


def _evaluates_as_it_samples(settings: RunSettings) -> bool:
    """Whether the engines that evaluated a checkpoint stay for what is drawn from it (tspin.engines.vllm.Serving)."""
    evaluation, training = settings.evaluation, settings.training
    if evaluation is None or {evaluation.backend, training.sampling_backend} != {"vllm"}:
        return False
    return (evaluation.dtype or settings.model.dtype) == (training.sampling_dtype or settings.model.dtype)


def base_evaluation(work: Work) -> list[Stage]:
    """Of the initial policy, once for all methods; nothing without a suite."""
    return [evaluation(work, BASE, 1)] if work.settings.evaluation else []
