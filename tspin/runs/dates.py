"""The day a run began, for chat templates that write today's date: a run that goes on tomorrow is the same run."""

from datetime import date
from pathlib import Path

from tspin.runs.files import read_json, write_json

FILE = "date.json"


def date_of_run(folder: Path) -> str:
    """The day that `record_date` wrote there, or today: an ISO date."""
    recorded = folder / FILE
    return str(read_json(recorded)["date"]) if recorded.exists() else date.today().isoformat()


def record_date(folder: Path, day: str) -> None:
    """Keep a run's day in its folder, unless one is there."""
    if not (folder / FILE).exists():
        write_json(folder / FILE, {"date": day})
