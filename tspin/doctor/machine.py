"""This machine, and what a run would ask of it."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tspin.config import Config, SelfPlayConfig
from tspin.devices import accelerator_names, accelerators
from tspin.doctor.bench import Bench
from tspin.engines.scoring import check_gpus
from tspin.errors import UserError
from tspin.experiment.preset import training_arguments
from tspin.models import meta_model
from tspin.planning import checks
from tspin.planning.architectures import find_config
from tspin.planning.checks import Finding, Needs, needs_of
from tspin.runs.locks import owned

MOUNTS = Path("/proc/mounts")
OF_ONE_NODE = {"localflock", "noflock", "nolock", "local_lock=all", "local_lock=flock"}  # how mounts say it
ENTER = "import sys; from pathlib import Path; from tspin.runs.locks import owned\nwith owned(Path(sys.argv[1])): pass"


@dataclass(frozen=True)
class Wanted:
    """Runs to be checked for: their config and methods, the folder of each seed's, and their launcher."""

    config: Config
    methods: Sequence[str]
    folders: Mapping[int, Path]
    launcher: Path | None

    def arguments(self) -> list[SelfPlayConfig]:
        """Of each run. Raises UserError where this machine does not have the GPUs, or what the settings need."""
        runs = []
        for seed, folder in self.folders.items():
            for method in self.methods:
                settings = self.config.for_method(method)
                check_gpus(settings.training.engine)
                runs.append(training_arguments(settings, folder / method, seed, launcher=self.launcher))
        return runs

    def needs(self) -> Needs:
        """Raises UserError where the model's config cannot be had."""
        model = self.config.model
        shape = meta_model(find_config(model.path, model.revision, model.trust_remote_code), model.trust_remote_code)
        return needs_of(self.arguments(), sum(weight.numel() for weight in shape.parameters()), model.dtype)


def check_accelerators(bench: Bench) -> Finding:
    """Which there are."""
    names = accelerator_names()
    if not names:
        return Finding("accelerators", "ok", "none: the CPU computes")
    return Finding("accelerators", "ok", f"{accelerators()} × {', '.join(sorted(set(names)))}", {"names": names})


def check_versions(bench: Bench) -> Finding:
    """See tspin.planning.checks.check_versions."""
    return checks.check_versions()


def check_settings(wanted: Wanted) -> Finding:
    """GPUs, launcher, engine and model of a run. Raises UserError for what this machine does not have."""
    needs, runs = wanted.needs(), len(wanted.methods) * len(wanted.folders)
    text = f"{runs} runs ({', '.join(wanted.methods)}) of a model of {needs.policy / 1e9:.2f} GB can start here"
    return Finding("the run's settings", "ok", text)


def needs_checks(wanted: Wanted | None) -> list[Callable[[Bench], Finding]]:
    """Checks of disk, host memory and /dev/shm: of a run, or of the machine alone."""
    several = ["several processes"] if accelerators() > 1 else []
    alone = Needs(Path.cwd() / "runs", 0, 0, 0, 1, several)

    def on(check: Callable[[Needs], Finding]) -> Callable[[Bench], Finding]:
        def checked(bench: Bench) -> Finding:
            try:
                return check(wanted.needs() if wanted else alone)
            except UserError:
                return Finding(check.__name__, "skipped", "the run's settings are refused, see there")

        return checked

    return [on(check) for check in (checks.check_disk, checks.check_host_memory, checks.check_shared_memory)]


def check_locks(folder: Path) -> Finding:
    """Whether a folder there is held against a second command, on this machine and on others."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".tspin-doctor-", dir=place)
    except OSError as error:
        return Finding("locks", "warning", f"{place}: nothing can be written there ({error.strerror})")
    with temporary as inside, owned(Path(inside)):
        second = subprocess.run([sys.executable, "-c", ENTER, inside], capture_output=True, text=True)
    if "is in use by" not in second.stderr:
        return Finding("locks", "failed", f"{place}: a second command enters a folder that one is at work in")
    kind, options = _mount(place)
    if only := OF_ONE_NODE & set(options):
        how = f"{kind}, mounted with {', '.join(sorted(only))}"
        text = f"{place}: {how}: locks are of one machine; between several, signs of life decide"
        return Finding("locks", "warning", text)
    return Finding("locks", "ok", f"a second command is refused{f' ({kind})' if kind else ''}")


def _mount(place: Path) -> tuple[str, list[str]]:
    """The type and the options of the file system that a folder is on; empty where the system does not say."""
    try:
        rows = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return "", []
    holding = [row for row in rows if place.resolve().is_relative_to(row[1].replace("\\040", " "))]
    longest = max(holding, key=lambda row: len(row[1]), default=["", "", "", ""])
    return longest[2], longest[3].split(",")
