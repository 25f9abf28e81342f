"""A machine's part of a launched training: `python -m tspin.engines.node FOLDER`, which becomes `accelerate launch`."""

import json
import os
import signal
import sys
from pathlib import Path

from tspin.engines.workers import JOB
from tspin.runs.signals import SIGNALS


def main() -> None:
    folder = Path(sys.argv[1])
    # Signals that a training heeds are its processes' own affair: the launcher, to which they may come too, would end
    # them in the middle of a step. It inherits this, as they do, until they are ready.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if not (folder / JOB).exists():
        sys.exit(f"Error: {folder} is not to be seen from {os.uname().nodename}: keep runs where all machines see them")
    job = json.loads((folder / JOB).read_text())
    rank = os.environ["SLURM_PROCID"] if job["rank"] is None else str(job["rank"])
    command = ["-m", "accelerate.commands.launch", *job["arguments"], "--machine_rank", rank]
    os.execv(sys.executable, [sys.executable, *command, "-m", job["module"], job["folder"]])


if __name__ == "__main__":
    main()
