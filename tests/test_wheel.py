"""The built wheel: what it holds, and that its commands work in an empty folder."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("accelerate", "presets", "slurm", "studies", "suites")


def call(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools writes into the folder that it builds from."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("tspin", "analysis", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, ".", cwd=source)
    (path,) = out.glob("*.whl")
    return path


def files(folder: str, pattern: str) -> set[str]:
    """The files below a folder of the repository, as paths from it."""
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob(pattern)}


def test_it_holds_the_packages_and_the_recipes(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    top = {name.split("/")[0] for name in names}
    assert top == {"tspin", "tspin_analysis", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    assert {f"tspin/{name}" for name in files("tspin", "*.py")} <= names
    assert "tspin/card.md.j2" in names
    read = set().union(*(files("analysis", f"*.{kind}") for kind in ("py", "csv", "j2", "css", "js")))
    assert {f"tspin_analysis/{name}" for name in read} <= names
    wanted = {f"tspin/recipes/{name}" for folder in RECIPES for name in files("experiments", f"{folder}/*.yaml")}
    recipes = {name for name in names if name.startswith("tspin/recipes/")}
    assert wanted <= recipes
    assert {Path(name).suffix for name in recipes} == {".yaml", ".md", ".sh"}


def test_its_commands_work_in_an_empty_folder(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # Its dependencies are those of the environment that runs the tests.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    empty, tspin = tmp_path / "empty", tmp_path / "venv" / "bin" / "tspin"
    empty.mkdir()
    where = "import tspin, tspin_analysis; print(tspin.__file__, tspin_analysis.__file__, sep='\\n')"
    assert all(Path(path).is_relative_to(site) for path in call(python, "-c", where, cwd=empty).split())
    assert "table" in call(tspin, "--help", cwd=empty)
    call(tspin, "run", "--preset", "pocket", "--methods", "base", "--set", "evaluation.limit=1", cwd=empty)
    assert "Table 1 (pocket)" in call(tspin, "table", "1", "--preset", "pocket", cwd=empty)
    assert (empty / "results" / "pocket" / "table1.md").is_file()
