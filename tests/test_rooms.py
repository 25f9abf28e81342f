"""The order of the rooms: pyproject.toml says it, import-linter reads every import, those inside functions too."""

from pathlib import Path

import grimp
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]


def test_imports_run_downwards_and_analysis_needs_no_torch(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out


def test_analysis_reads_by_what_the_ground_floor_says():
    graph = grimp.build_graph("tspin", "tspin_analysis", cache_dir=None)
    imports = graph.find_modules_that_directly_import
    reached = {module for module in graph.find_descendants("tspin") for importer in imports(module)
               if importer.split(".")[0] == "tspin_analysis"}  # fmt: skip
    ground = {"errors", "objectives", "schema", "runs", "yaml_files"}
    assert reached and {module.split(".")[1] for module in reached} <= ground
