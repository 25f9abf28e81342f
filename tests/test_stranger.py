"""The README works as it is written: see stranger.py."""

import pytest
import stranger


def test_every_line_of_the_readme_works(tmp_path, capsys):
    stranger.main(tmp_path)
    said = capsys.readouterr().out
    assert all(f"works: {start}" in said for start in ("make reproduce-table1", "tspin run --model", "tspin tokens"))
    assert (tmp_path / "runs" / "mine" / "tspin" / "iteration-1" / "model").is_dir()
    assert (tmp_path / "runs" / "mine" / "compare.html").is_file()
    assert (tmp_path / "committed.html").stat().st_size > 1_000_000


def test_a_line_that_does_not_work_is_told(tmp_path):
    (words,) = stranger.commands("console", "$ tspin compare \\\n    nothing nowhere  # a comment\nwhat it prints\n")
    assert words == ["tspin", "compare", "nothing", "nowhere"]
    with pytest.raises(stranger.Broken, match="tspin compare nothing nowhere\n.*nothing: no run"):
        stranger.play(words, tmp_path)
