"""The command line: each command reads its arguments, calls one function, and prints what came out.

torch and what stands on it are imported by the commands that need them, so that `--help` does not wait for them.
"""

from importlib.metadata import entry_points
from typing import Annotated

import typer

from tspin import __version__
from tspin.cli.doctoring import doctor
from tspin.cli.experiments import rerun, sweep
from tspin.cli.flags import Flagged
from tspin.cli.guard import Guarded
from tspin.cli.listing import settings
from tspin.cli.preparation import fetch, plan
from tspin.cli.running import run
from tspin.cli.steps import diagnose, evaluate, sample, tokens, train

app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Self-play fine-tuning: SFT, SPIN, T-SPIN and its ablations; evaluation; the paper's tables.",
)
for _command in (run, sweep, rerun, sample, train, diagnose, tokens, evaluate, fetch, plan, doctor, settings):
    app.command(cls=Flagged)(_command)
# Those of other rooms (tables and figures) register themselves; nothing of theirs is imported here but the function.
for _entry in sorted(entry_points(group="tspin.commands"), key=lambda entry: entry.name):
    app.command(_entry.name, cls=Flagged)(_entry.load())


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tspin {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `tspin` itself."""


def main() -> None:
    """Entry point of the `tspin` command."""
    app()
