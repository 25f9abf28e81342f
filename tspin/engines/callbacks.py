"""What a training does beside its steps: a progress bar, states that are kept."""

from collections.abc import Callable

from tqdm.auto import tqdm
from transformers import TrainerCallback

from tspin.runs.signals import Asked


class AtTrainBegin(TrainerCallback):
    """Calls a function when training begins."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.function()


class KeepState(TrainerCallback):
    """Has the state kept every `every` steps, and at the end of the step in which a signal came, which is the last.

    asked: where a signal is noted; of processes that train together, what they agreed upon in the step.
    """

    def __init__(self, asked: Asked, every: int | None):
        self.asked = asked
        self.every = every

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if self.asked.number is not None:
            control.should_save = control.should_training_stop = True
        elif self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            control.should_save = True


class LogLastStep(TrainerCallback):
    """Has the last step logged whatever the logging interval, so that the log is of the whole training."""

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if control.should_training_stop:
            control.should_log = True

    on_epoch_end = on_step_end


class StepBar(TrainerCallback):
    """A progress bar over optimizer steps that shows the loss."""

    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.description, unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        self.bar.close()
