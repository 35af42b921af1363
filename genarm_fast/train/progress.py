"""What a run prints while it trains."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState


def progress_bar(show: bool) -> Progress:
    """Return a progress bar on stderr, so that stdout holds only results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not show
    )


class Narrator(TrainerCallback):
    """Shows steps and held-out metrics. Skips the evaluation after the last step: one on all held-out pairs follows."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("training", total=None, visible=False)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step, visible=True)
        self.began, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = False

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            line = (
                f"loss {logs['loss']:.3f}, accuracy {logs['train_accuracy']:.3f}, "
                f"{logs['pairs_per_second']:.1f} pairs/s, {logs['tokens_per_second']:.0f} tokens/s"
            )
            self.bar.update(self.task, description=f"training: {line}")
            if not self.bar.console.is_terminal:  # a log file shows no bar
                self.say(f"step {state.global_step}/{state.max_steps}: {line}, {self._left(state)} left")

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        self.say(
            f"step {state.global_step}/{state.max_steps}: held-out loss {metrics['eval_loss']:.3f}, "
            f"accuracy {metrics['eval_accuracy']:.3f} ± {metrics['eval_accuracy_stderr']:.3f}, "
            f"margin {metrics['eval_margin_mean']:.2f} nats"
        )

    def _left(self, state: TrainerState) -> timedelta:
        """Return the time left, estimated from the steps of this process, evaluations included."""
        each = (time.monotonic() - self.began) / max(1, state.global_step - self.first)
        return timedelta(seconds=round(each * (state.max_steps - state.global_step)))

    def say(self, line: str) -> None:
        if not self.bar.disable:
            self.bar.console.print(line, highlight=False)
