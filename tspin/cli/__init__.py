"""The command line: each command reads its arguments, calls one function, and prints what came out.

torch and what stands on it are imported by the commands that need them, so that `--help` does not wait for them.
"""

from importlib.metadata import entry_points

import typer

from tspin.cli.experiments import rerun, run, sweep
from tspin.cli.guard import Guarded
from tspin.cli.preparation import fetch, plan
from tspin.cli.steps import diagnose, evaluate, sample, tokens, train

app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Self-play fine-tuning: SFT, SPIN, T-SPIN and its ablations; evaluation; the paper's tables.",
)
for _command in (run, sweep, rerun, sample, train, diagnose, tokens, evaluate, fetch, plan):
    app.command()(_command)
# Those of other rooms (tables and figures) register themselves; nothing of theirs is imported here but the function.
for _entry in sorted(entry_points(group="tspin.commands"), key=lambda entry: entry.name):
    app.command(_entry.name)(_entry.load())


def main() -> None:
    """Entry point of the `tspin` command."""
    app()
