"""What stands around every command: libraries are quiet; errors and signals end in one line."""

import errno
import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup
from typer.exceptions import TyperException

from tspin.errors import UserError
from tspin.runs.redaction import redacted
from tspin.runs.signals import stopping_at_once

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # and those of Transformers
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
}


class Guarded(TyperGroup):
    """The group of all commands, each of which runs quietly and within `one_line_errors`."""

    def invoke(self, ctx: Any) -> Any:
        quiet_libraries()
        with one_line_errors():
            return super().invoke(ctx)


def quiet_libraries() -> None:
    """Leave the terminal to our progress bars: libraries that are imported from here on say only what is wrong.

    What the user's environment says of them stands.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("httpx", "lm_eval", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def importing() -> Iterator[None]:
    """What is imported inside for the first time is passed over by the garbage collector, then and for good.

    PyTorch, Transformers and what they stand on are a million objects that stay: looking through them again and again
    is a seventh of the time that their import takes, and a quarter of a second each time afterwards.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that the user can put right become one line on stderr and exit code 2; signals, 128 and their number."""
    try:
        with stopping_at_once():
            yield
    except typer.Exit:  # --help, and commands that end with a code of their own
        raise
    except UserError as error:
        fail(str(error))
    except TyperException as error:  # an option's value, an argument that is missing
        fail(error.format_message())
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        saved = getattr(error, "saved", "") or "finished stages are kept, nothing is half-written"
        sys.stderr.write(f"\ntspin: stopped by {signal.Signals(number).name}: {saved}; ")
        sys.stderr.write("the same command goes on from there\n")
        raise typer.Exit(128 + number) from None
    except (RuntimeError, MemoryError) as error:
        from tspin.devices import out_of_memory

        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(
            f"out of memory ({reason}): lower sampling_batch_size, evaluation.batch_size or "
            "micro_batch_tokens; finished stages are kept"
        )
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number not in DISK_ERRORS:
            raise
        place = getattr(error, "filename", None) or "the output folder"
        fail(
            f"{place}: {os.strerror(number).lower()}; nothing was replaced: make room or choose another folder and "
            "run the same command again"
        )


def fail(line: str) -> NoReturn:
    """Print one line and exit with 2."""
    sys.stderr.write(f"tspin: {redacted(' '.join(line.split()))}\n".encode(errors="replace").decode())
    raise typer.Exit(2)


def _error_number(error: Exception) -> int:
    """The operating system's error number; safetensors gives it in its message alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    number = re.search(r"os error (\d+)", str(error))
    return int(number[1]) if number else 0
