"""The warm-up: its first step has a share of the rate, and a run of another schedule is not gone on with."""

import json

import pytest
import torch
from transformers import Trainer

from tspin import SelfPlayConfig
from tspin.errors import UserError
from tspin.runs.claims import claim_folder
from tspin.trainer import TripletTrainer

RATES = {  # steps → the linear schedule's, as shares of the learning rate
    1: [1],
    2: [1, 1],
    3: [1, 1, 1 / 2],
    5: [1, 1, 3 / 4, 1 / 2, 1 / 4],
    11: [1 / 2, 1, *(left / 9 for left in range(9, 0, -1))],
}


def rates(steps: int, **settings) -> list[float]:
    trainer = object.__new__(TripletTrainer)
    trainer.args = SelfPlayConfig(learning_rate=0.5, use_cpu=True, **settings)
    trainer.lr_scheduler = None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = trainer.create_scheduler(steps, optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 0.5)
        assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]  # as logged
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", RATES)
def test_no_step_has_a_rate_of_0(steps):
    assert rates(steps) == pytest.approx(RATES[steps])


def test_other_shapes_and_no_warm_up():
    assert rates(4, lr_scheduler_type="constant_with_warmup", warmup_steps=4) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(3, warmup_steps=0) == pytest.approx([1, 2 / 3, 1 / 3])
    assert rates(20, lr_scheduler_type="cosine")[:3] == pytest.approx([1 / 2, 1, 1])


def test_there_is_one_warm_up(monkeypatch):
    """Schedule-free optimizers have their own, counted in steps, which Trainer would set to a share of them."""
    asked = (torch.optim.SGD, {"lr": 1.0, "warmup_steps": 0.1})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model=None: asked))
    kind, given = object.__new__(TripletTrainer).get_optimizer_cls_and_kwargs(None)
    assert kind is torch.optim.SGD and given == {"lr": 1.0, "warmup_steps": 0}


def test_a_state_of_the_schedule_goes_on():
    args = SelfPlayConfig(use_cpu=True, warmup_steps=3)

    def schedule():
        made = object.__new__(TripletTrainer)
        made.args, made.lr_scheduler = args, None
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return made.create_scheduler(10, optimizer)

    one, other = schedule(), schedule()
    one.optimizer.step()
    one.step()
    other.load_state_dict(one.state_dict())
    one.step()
    other.step()
    assert one.get_last_lr() == other.get_last_lr() == pytest.approx([1.0])


def test_a_run_that_began_at_0_is_refused(tmp_path):
    now = {"settings": SelfPlayConfig(use_cpu=True).computed()}
    before = {"settings": {name: value for name, value in now["settings"].items() if name != "warmup"}}
    claim_folder(tmp_path / "run", before)
    with pytest.raises(UserError, match="settings.warmup is not set there, 'from 1/w' here"):
        claim_folder(tmp_path / "run", json.loads(json.dumps(now, default=str)))
    assert "warmup" not in SelfPlayConfig(use_cpu=True, warmup_steps=0).computed()
