"""TrainingArguments' options that cannot work here, each refused in one line before anything is loaded."""

import json
from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments

from tspin import SelfPlayConfig
from tspin.config import OPERATIONAL, OURS, build_config
from tspin.engines.launch import plain_arguments
from tspin.errors import UserError
from tspin.experiment.preset import training_arguments
from tspin.options import BESIDE, OF_SEVERAL, UNUSABLE, UNUSABLE_VALUES, USED

BY_NAME = [
    ({"eval_strategy": "steps"}, "eval_strategy: no training here has an evaluation set"),
    ({"do_eval": True}, "do_eval: no training here has an evaluation set"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end: no training here has an evaluation set"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type=reduce_lr_on_plateau: no training here has"),
    ({"save_strategy": "best"}, "save_strategy=best: no training here has an evaluation set"),
    ({"push_to_hub": True}, r"push_to_hub: .*trainer\.push_to_hub\(\) uploads"),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed: a launch file says"),
    ({"fsdp": "full_shard"}, "fsdp: a launch file says"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: the objectives are of whole responses"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: with noise on the embeddings"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size: batch_size is part of the method"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length: micro-batches"),
    ({"optim": "galore_adamw_layerwise"}, "optim=galore_adamw_layerwise: it moves weights within a backward pass"),
    ({"optim": "apollo_adamw_layerwise", "optim_target_modules": ["q_proj"]}, "optim=apollo_adamw_layerwise: it moves"),
    ({"optim": "lomo"}, "optim=lomo: it moves weights within a backward pass"),
    ({"optim": "adalomo"}, "optim=adalomo: it moves weights within a backward pass"),
    ({"fp16": True}, "fp16: a gradient that overflows"),
    ({"save_only_model": True}, "save_only_model: a training could not go on"),
    ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint: the same command goes on"),
    ({"save_total_limit": 2}, "save_total_limit: only the newest state"),
    ({"average_tokens_across_devices": False}, "average_tokens_across_devices: a step's loss is a mean"),
    ({"eval_do_concat_batches": False}, "eval_do_concat_batches: no training here has an evaluation set"),
    ({"save_steps": 10}, "save_steps: does nothing without save_strategy=steps"),
    ({"trackio_space_id": "me/space"}, "trackio_space_id: does nothing without report_to=trackio"),
    ({"ddp_backend": "gloo"}, "ddp_backend: processes that train together exchange by NCCL on GPUs"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "gradient_checkpointing_kwargs: does nothing"),
]
BY_TRIAL = [  # what this environment lacks, and options without those that they need
    ({"report_to": "wandb"}, "report_to: Transformers finds no wandb here; install it, or choose of .*tensorboard"),
    ({"report_to": ["tensorboard", "nothing"]}, "report_to: Transformers finds no nothing here"),
    ({"optim": "adamw_8bit"}, "optim=adamw_8bit, .*bitsandbytes"),
    ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "optim=galore_adamw, .*galore_torch"),
    ({"adam_beta1": 0.5}, "adam_beta1: optim=rmsprop has none; its own are set by optim_args"),
    ({"optim": "sgd", "adam_epsilon": 1e-6}, "adam_epsilon: optim=sgd has none"),
    ({"optim_target_modules": ["q_proj"]}, "optim_target_modules: optim=rmsprop trains all weights alike"),
    ({"optim_args": "momentum=a lot"}, "optim=rmsprop, with optim_args as given: could not convert"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr, .*min_lr"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type=warmup_stable_decay, .*num_decay_steps"),
    ({"dataloader_persistent_workers": True}, "dataloader_num_workers=0, .*persistent_workers"),
    ({"ddp_static_graph": True}, "ddp_static_graph: does nothing without a launch file: --launcher accelerate"),
    ({"ddp_bucket_cap_mb": 10}, "ddp_bucket_cap_mb: does nothing without a launch file: --launcher accelerate"),
    ({"use_liger_kernel": True}, "use_liger_kernel: its package is not installed"),
    ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches: every process"),
]
GOOD = [
    {"report_to": "all"},
    {"optim": "adamw_torch", "adam_beta1": 0.5, "adam_epsilon": 1e-6},
    {"do_train": True, "remove_unused_columns": False},
    {"save_strategy": "steps", "save_steps": 10},
    {"report_to": "none"},
    {"optim": "adamw_torch_fused", "learning_rate": [1e-3, 1e-4]},
    {"optim": "adafactor"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
    {"train_sampling_strategy": "sequential"},
    {"eval_strategy": False, "include_num_input_tokens_seen": False, "label_smoothing_factor": 0.0},
    {"logging_strategy": False},  # a bare no in YAML
    {"save_strategy": "epoch"},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
]


@pytest.mark.parametrize("given, line", BY_NAME)
def test_what_no_training_can_follow_is_refused_as_a_preset_is_read(given, line):
    for make in (lambda: build_config(given), lambda: SelfPlayConfig(**given)):
        with pytest.raises(UserError, match=f"^{line}") as refused:
            make()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given, line", BY_TRIAL)
def test_what_is_missing_is_said_where_training_would_take_place(given, line):
    build_config(given)  # another machine may have it
    with pytest.raises(UserError, match=f"^{line}") as refused:
        SelfPlayConfig(**given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", GOOD)
def test_the_rest_stands_and_draws_no_random_number(given):
    state = torch.get_rng_state()
    SelfPlayConfig(**given)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_several_processes_have_a_use_for_reaches_them(tmp_path):
    """A preset is read before its launch file is known, and the processes are told that there is one."""
    given = {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 10, "ddp_broadcast_buffers": True,
             "ddp_static_graph": True, "accelerator_config": {"use_seedable_sampler": False}}  # fmt: skip
    assert given.keys() > set(OF_SEVERAL)
    settings = build_config({**given, "use_cpu": True}).for_method("spin")
    file = tmp_path / "two.yaml"
    file.write_text("{distributed_type: MULTI_CPU, num_processes: 1, use_cpu: true}")
    args = training_arguments(settings, tmp_path, seed=0, launcher=file)
    there = SelfPlayConfig(**json.loads(json.dumps(plain_arguments(args))))
    for name in OF_SEVERAL:
        assert getattr(there, name) == getattr(args, name) == given[name]
    assert there.accelerator_config == args.accelerator_config and not there.accelerator_config.use_seedable_sampler
    assert there.computed() == args.computed()
    file.write_text("{distributed_type: FSDP, fsdp_config: {fsdp_version: 2}}")
    with pytest.raises(UserError, match="^ddp_find_unused_parameters: does nothing under FSDP, as .*two.yaml has it"):
        training_arguments(settings, tmp_path, seed=0, launcher=file)


def test_every_option_of_the_installed_version_acts_or_is_refused():
    """One that a release adds is in no list: look what it does here, and enter it."""
    known = {field.name for field in fields(TrainingArguments)}
    ours = known & OURS
    assert known - ours - OPERATIONAL - USED.keys() == UNUSABLE.keys() - OPERATIONAL
    assert {*UNUSABLE, *USED, *BESIDE, *(name for name, _ in UNUSABLE_VALUES)} <= known
    assert not UNUSABLE.keys() & USED.keys()


def test_a_warm_up_ends_before_its_training():
    assert [SelfPlayConfig().get_warmup_steps(steps) for steps in (1, 2, 10, 11, 100)] == [0, 1, 1, 2, 10]
    assert [SelfPlayConfig(warmup_steps=5).get_warmup_steps(steps) for steps in (1, 5, 6)] == [0, 4, 5]
    assert SelfPlayConfig(warmup_steps=0).get_warmup_steps(3) == 0
