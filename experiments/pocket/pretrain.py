"""Pre-train the pocket base model: a small Llama on *noisy* answers to the pocket tasks.

    python -m experiments.pocket.pretrain --out runs/pocket-base/scratch --log experiments/pocket/pretrain_log_1.csv
    python -m experiments.pocket.pretrain --start runs/pocket-base/scratch --out tspin/pocket/cold \\
        --log experiments/pocket/pretrain_log_2.csv --seed 7 --steps 900 --learning-rate 1e-3 \\
        --noise 0.1 --misconceptions 0.8

About 40 and 10 minutes on two CPU cores. Writes the model and its tokenizer, the losses as CSV, and the settings and
versions beside it as JSON. Noise is what makes self-play worth studying at this size: the base half knows each task, in
several wordings, and is often wrong, first at random, then by systematic mistakes (misconceptions.py). Weak and strong
bases for other studies are `--noise`, `--misconceptions` and `--steps` away. Nothing here reads the test or validation
pool but to keep their questions out.
"""

import argparse
import copy
import csv
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.pocket.misconceptions import MISCONCEPTIONS, mistaken, triggered
from tspin.pocket.tasks import LABEL_FORMAT, POOL_SEEDS, Problem, held_out_questions, seen_tasks, stream
from tspin.runs.files import atomic_path, write_json
from tspin.runs.provenance import provenance

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ '### Instruction: ' + message['content'] + '\n\n### Response: ' }}{% endif %}{% endfor %}"
)
PROMPT_FORMATS = {
    "### Instruction: {question}\n\n### Response: ": 0.8,
    "Q: {question}\nA: ": 0.1,
    "{question}\n\n": 0.1,
}
ANSWER_FORMATS = {
    "{answer}": 0.30,
    LABEL_FORMAT: 0.25,
    "Answer: {answer}": 0.20,
    "I think it is {answer}.": 0.15,
    "It must be {answer}, I guess.": 0.10,
}
ROW_TOKENS = 256  # documents are packed into rows of this length, end tokens between them
WARM_UP = 100  # steps
PROMPT_WEIGHT = 0.1  # names and numbers in questions are random: little is learnt by predicting them


def documents(noise: float, seed: int, misconceptions: float = 0.0) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) texts, tasks in turn, a share `noise` of the answers wrong at random.

    misconceptions: 0, or the share of mistaken answers on the questions that trigger a task's
    misconception (a tenth of it on the others); then only the tasks that have one are asked.
    """
    rng = random.Random(seed)
    tasks = list(MISCONCEPTIONS if misconceptions else seen_tasks())
    streams = {task: stream(task, POOL_SEEDS["pretraining"] + seed) for task in tasks}
    excluded = {task: held_out_questions("pretraining", task) for task in tasks}
    recent: dict[str, list[str]] = {task: [next(streams[task]).answer for _ in range(50)] for task in tasks}
    while True:
        for task in tasks:
            problem = next(item for item in streams[task] if item.question not in excluded[task])
            recent[task][rng.randrange(50)] = problem.answer
            answer = wrong_answer(problem, recent[task], rng) if rng.random() < noise else problem.answer
            if misconceptions and rng.random() < misconceptions * (1.0 if triggered(problem) else 0.1):
                answer = mistaken(problem)
            prompt = rng.choices(list(PROMPT_FORMATS), list(PROMPT_FORMATS.values()))[0]
            response = rng.choices(list(ANSWER_FORMATS), list(ANSWER_FORMATS.values()))[0]
            yield prompt.format(question=problem.question), response.format(answer=answer)


def wrong_answer(problem: Problem, others: list[str], rng: random.Random) -> str:
    """A near miss for half of the integer answers, else the answer of another question."""
    if problem.answer.lstrip("-").isdigit() and rng.random() < 0.5:
        return str(int(problem.answer) + rng.choice((-10, -2, -1, 1, 2, 10)))
    return rng.choice(others)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit a token of its own, so that numbers align by place."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" Response: ", "isolated"),  # the template's border is never merged with an answer
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def rows(source: Iterator[tuple[str, str]], tokenizer, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of packed (input_ids, loss weights), each (batch_size, ROW_TOKENS)."""
    ids: list[int] = []
    weights: list[float] = []
    size = batch_size * ROW_TOKENS
    while True:
        while len(ids) < size:
            prompts, responses = zip(*(next(source) for _ in range(256)), strict=True)
            encode = tokenizer.backend_tokenizer.encode_batch
            for prompt, response in zip(encode(list(prompts)), encode(list(responses)), strict=True):
                ids += [*prompt.ids, *response.ids, tokenizer.eos_token_id]
                weights += [PROMPT_WEIGHT] * len(prompt.ids) + [1.0] * (len(response.ids) + 1)
        yield torch.tensor(ids[:size]).view(batch_size, -1), torch.tensor(weights[:size]).view(batch_size, -1)
        ids, weights = ids[size:], weights[size:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--log", type=Path, help="CSV of the losses (default: OUT/../pretrain_log.csv)")
    parser.add_argument("--noise", type=float, default=0.3, help="share of pre-training answers that are wrong")
    parser.add_argument("--steps", type=int, default=3500, help="optimizer steps of --batch-size rows")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on from this model instead of from scratch")
    parser.add_argument("--texts", type=int, default=40_000, help="what a tokenizer is trained on, without --start")
    parser.add_argument("--misconceptions", type=float, default=0.0, help="share of mistakes on triggering questions")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        sample = documents(args.noise, seed=args.seed + 1_000_000)
        tokenizer = train_tokenizer(("".join(next(sample)) for _ in range(args.texts)), vocab_size=768)
        model = LlamaForCausalLM(llama_config(tokenizer))
    train(model, tokenizer, args)


def llama_config(tokenizer) -> LlamaConfig:
    """192 wide, 5 layers deep: 2.4M parameters with the pocket tokenizer."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        intermediate_size=512,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(model: LlamaForCausalLM, tokenizer, args: argparse.Namespace) -> None:
    """Train by AdamW on packed rows, warm-up and cosine; losses go to the log, the model to --out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps))),
    )
    log_path = args.log or args.out.parent / "pretrain_log.csv"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    batches = rows(documents(args.noise, args.seed, args.misconceptions), tokenizer, args.batch_size)
    start = time.monotonic()
    with log_path.open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "tokens", "loss", "response_loss", "learning_rate", "seconds"])
        for step in range(1, args.steps + 1):
            loss, response_loss, tokens = update(model, *next(batches))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 25 == 0 or step == args.steps:
                row = [step, step * tokens, f"{loss:.4f}", f"{response_loss:.4f}"]
                log.writerow([*row, f"{schedule.get_last_lr()[0]:.2e}", f"{time.monotonic() - start:.0f}"])
                file.flush()
                print(*row, f"{time.monotonic() - start:.0f}s", flush=True)
            if step % 500 == 0 or step == args.steps:
                save(model, tokenizer, args.out)
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    write_json(log_path.with_suffix(".json"), {**provenance(), "settings": settings})
    print(f"wrote {args.out}, {log_path} and {log_path.with_suffix('.json')}")


def update(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[float, float, int]:
    """Leave the clipped gradients of a batch's weighted loss; the loss, the mean loss of responses, the tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item(), losses[weights == 1.0].mean().item(), ids.numel()


def save(model: LlamaForCausalLM, tokenizer, folder: Path) -> None:
    """Write model and tokenizer whole. bfloat16 halves the file; training and evaluation load it as float32."""
    with atomic_path(folder) as temporary:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


if __name__ == "__main__":
    main()
