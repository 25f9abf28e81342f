"""Stages: whole or not there, made again only when their inputs changed."""

import errno
import fcntl
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from threading import Thread, Timer

import pytest

from tspin.errors import UserError
from tspin.runs import locks
from tspin.runs.claims import claim_folder
from tspin.runs.files import HOST, atomic_path, fingerprint, folder_fingerprint, read_json
from tspin.runs.locks import owned
from tspin.runs.provenance import _of_checkout, provenance
from tspin.runs.stages import DamagedStage, check_stage, run_stage, stage_record


def produce(text):
    def write(path):
        path.write_text(text)
        return {"length": len(text)}

    return write


def test_a_stage_runs_once_per_fingerprint(tmp_path):
    output = tmp_path / "out.txt"
    first = run_stage(output, {"seed": 1}, produce("one"))
    assert first.facts == {"length": 3} and first.fingerprint == fingerprint({"seed": 1})
    assert run_stage(output, {"seed": 1}, produce("two")) == first
    assert output.read_text() == "one"
    with pytest.raises(ZeroDivisionError):
        run_stage(output, {"seed": 3}, lambda target: 1 / 0)
    assert run_stage(output, {"seed": 1}, produce("two")) == first  # nothing has taken its place
    run_stage(output, {"seed": 2}, produce("two"))
    assert output.read_text() == "two"
    assert stage_record(output, {"seed": 1}) is None


def test_a_failing_stage_leaves_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk")

    with pytest.raises(OSError):
        run_stage(tmp_path / "out.txt", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_killed_before_its_record_runs_again(tmp_path):
    output = tmp_path / "out.txt"
    run_stage(output, {}, produce("one"))
    output.with_name("out.txt.stage.json").unlink()
    run_stage(output, {}, produce("two"))
    assert output.read_text() == "two"


def test_what_a_killed_process_left_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    orphan = tmp_path / f".out.txt.{HOST}.{process.pid}.tmp"
    orphan.mkdir()
    elsewhere = tmp_path / f".out.txt.0123abcd.{process.pid}.tmp"  # of another machine's process, which may be alive
    elsewhere.mkdir()
    (orphan / "half").write_text("half")
    run_stage(tmp_path / "out.txt", {}, produce("one"))
    assert not orphan.exists() and elsewhere.exists()


def test_folders_are_replaced_whole(tmp_path):
    for name in ("a", "b"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_belongs_to_one_config(tmp_path):
    claim_folder(tmp_path, {"training": {"lr": 1e-5, "epochs": 1}})
    claim_folder(tmp_path, {"training": {"epochs": 1, "lr": 1e-5}})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"training.lr is 1e-05 there, 3e-05 here"):
        claim_folder(tmp_path, {"training": {"lr": 3e-5, "epochs": 1}})
    assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "config.json")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("victim", ["out.txt", "out.txt.stage.json"])
def test_damage_is_found_kept_aside_and_made_again(tmp_path, capsys, victim):
    run_stage(tmp_path / "out.txt", {}, produce("something"))
    flip(tmp_path / victim)
    damaged = (tmp_path / victim).read_bytes()
    run_stage(tmp_path / "out.txt", {}, produce("something"))
    assert (tmp_path / "out.txt").read_text() == "something"
    assert (tmp_path / f"{victim}.damaged").read_bytes() == damaged
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(tmp_path / victim) in lines[0] and f"{victim}.damaged" in lines[0]


def test_an_output_that_is_gone_is_made_again(tmp_path):
    run_stage(tmp_path / "out", {}, produce("one"))
    (tmp_path / "out").unlink()
    with pytest.raises(DamagedStage):
        check_stage(tmp_path / "out")
    run_stage(tmp_path / "out", {}, produce("two"))
    assert (tmp_path / "out").read_text() == "two"


def test_files_beside_an_output_are_part_of_it(tmp_path, capsys):
    def both(path):
        (tmp_path / "log.txt").write_text("log")
        path.mkdir()
        (path / "large").write_text("large")

    run_stage(tmp_path / "out", {}, both, beside=["log.txt"], check=False)
    flip(tmp_path / "out" / "large")
    run_stage(tmp_path / "out", {}, both, beside=["log.txt"], check=False)  # compared by those who read it
    with pytest.raises(DamagedStage):
        check_stage(tmp_path / "out")
    run_stage(tmp_path / "out", {}, both, beside=["log.txt"], check=False)
    (tmp_path / "log.txt").unlink()
    run_stage(tmp_path / "out", {}, both, beside=["log.txt"], check=False)
    assert (tmp_path / "log.txt").read_text() == "log"
    check_stage(tmp_path / "out")


@pytest.fixture
def other_owner(tmp_path):
    """A process that holds tmp_path."""
    hold = "with owned(Path(sys.argv[1])): print('held', flush=True); input()"
    hold = f"import sys; from pathlib import Path; from tspin.runs.locks import owned\n{hold}"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_has_one_owner_until_it_dies(tmp_path, other_owner):
    with pytest.raises(UserError, match=f"in use by process {other_owner.pid} "), owned(tmp_path):
        pass
    other_owner.kill()
    other_owner.wait()
    with owned(tmp_path), owned(tmp_path / "." / ""):  # its own folder, again
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def once_it_waits(monkeypatch, then) -> None:
    """Call a function, beside this thread, as soon as somebody says on stderr that it waits."""

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            if "; waiting for it" in text:
                Thread(target=then).start()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Heard())


def test_who_waits_says_so_once(tmp_path, other_owner, monkeypatch):
    once_it_waits(monkeypatch, other_owner.kill)
    with owned(tmp_path, wait=True):
        other_owner.wait()
    line = f"tspin: {tmp_path} is in use by process {other_owner.pid} on {socket.gethostname()}; waiting for it\n"
    assert sys.stderr.getvalue() == line


def test_a_forked_child_neither_shares_the_lock_nor_keeps_it(tmp_path):
    told, tell = os.pipe()
    with owned(tmp_path):
        child = os.fork()
        if not child:
            try:
                with owned(tmp_path):
                    os.write(tell, b"entered")
            except UserError as error:
                os.write(tell, str(error).encode())
            signal.pause()
        try:
            assert f"in use by process {os.getpid()} " in os.read(told, 1000).decode()
        finally:
            os.close(told)
            os.close(tell)
    try:  # the child lives on
        entered = "from pathlib import Path; from tspin.runs.locks import owned\nwith owned(Path(sys.argv[1])): pass"
        subprocess.run([sys.executable, "-c", f"import sys; {entered}", str(tmp_path)], check=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Holds argv[1] on another machine of a cluster, whose locks this one does not see; LEASE_SECONDS is argv[2].
ELSEWHERE = """
import fcntl, os, socket, sys
from pathlib import Path
from tspin.runs import locks
fcntl.flock = lambda descriptor, operation: None
socket.gethostname = lambda: "node7"
os.environ |= {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1"}
locks.LEASE_SECONDS, locks.BEAT_SECONDS = float(sys.argv[2]), float(sys.argv[2]) / 4
with locks.owned(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""
LEASE = 2.0


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A process on node7 that holds tmp_path."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(locks, "BEAT_SECONDS", LEASE / 4)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), str(LEASE)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_an_owner_on_another_machine_is_refused_though_its_lock_is_not_seen(tmp_path, elsewhere, monkeypatch):
    time.sleep(1.5 * LEASE)  # longer than a dead one's lease, were it not for its signs of life
    named = rf"in use by process {elsewhere.pid} on node7 \(Slurm job 4711, start 1\): wait .* takes over"
    with pytest.raises(UserError, match=named) as error, owned(tmp_path):
        pass
    assert "\n" not in str(error.value)
    once_it_waits(monkeypatch, lambda: print(file=elsewhere.stdin, flush=True))  # which ends it
    with owned(tmp_path, wait=True):
        assert "; waiting for it\n" in sys.stderr.getvalue()
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    assert not (tmp_path / ".owner").exists()  # after a good end


def test_an_owner_that_gives_no_sign_of_life_is_taken_over(tmp_path, elsewhere, capsys):
    elsewhere.kill()
    elsewhere.wait()
    with pytest.raises(UserError, match="in use by .* where it was killed, the same command takes over"):
        with owned(tmp_path):
            pass
    hours_ago = time.time() - 7200
    os.utime(tmp_path / ".owner", (hours_ago, hours_ago))
    start = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - start >= LEASE  # it was watched besides
    assert "has given no sign of life for 120 minutes; taking it over" in capsys.readouterr().err


def test_clocks_of_machines_may_differ(tmp_path, elsewhere, monkeypatch):
    """By a day: the file system's own counts."""
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 86400)
    with pytest.raises(UserError, match="in use by .* on node7"), owned(tmp_path):
        pass


def test_a_job_that_slurm_starts_again_takes_its_own_folder_over(tmp_path, elsewhere, monkeypatch, capsys):
    elsewhere.kill()
    elsewhere.wait()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with owned(tmp_path):
        assert "which Slurm has started again: this is it" in capsys.readouterr().err


def test_a_job_that_slurm_did_not_start_again_takes_nothing_over(tmp_path, elsewhere, monkeypatch):
    """The same start, or another job: two processes of one start are told apart by nothing else."""
    for job, count in (("4711", "1"), ("4712", "2")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        with pytest.raises(UserError, match="in use by .* on node7"), owned(tmp_path):
            pass


def test_an_owner_that_lost_its_folder_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    with owned(tmp_path):
        (tmp_path / ".owner").unlink()
        (tmp_path / ".owner").write_text("another's")
        time.sleep(1)
    assert "this command is not its only owner any more (owner-changed)" in capsys.readouterr().err
    assert (tmp_path / ".owner").read_text() == "another's"


def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_lease_that_its_owner_died_before_writing_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "UNWRITTEN_SECONDS", 0.5)
    lease = tmp_path / ".owner"
    for no_locks in (False, True):
        if no_locks:
            monkeypatch.setattr(locks, "_acquire_lock", without_locks)
        lease.touch()
        start = time.monotonic()
        with owned(tmp_path, wait=True):
            assert 0.5 <= time.monotonic() - start < 5 and "pid" in lease.read_text()
        assert not lease.exists()


def test_a_lease_that_is_being_written_is_its_owners(tmp_path, monkeypatch):
    """Another machine has made it, and its name comes a moment later."""
    lease = tmp_path / ".owner"
    with owned(tmp_path):
        text = lease.read_text()
    elsewhere = re.sub(r"(?m)^host=.*$", "host=elsewhere", text)
    lease.touch()
    writing = Timer(0.3, lambda: lease.write_text(elsewhere))
    writing.start()
    with pytest.raises(UserError, match="is in use by"), owned(tmp_path):
        pass
    writing.join()
    assert lease.read_text() == elsewhere


def test_an_owner_of_another_version_is_refused_in_a_line(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 3 * LEASE)
    with pytest.raises(UserError, match="node7 .*, a command of another version of tspin"), owned(tmp_path):
        pass


def test_a_full_disk_leaves_the_lock_alone_to_decide(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()

    def full(path, flags, *mode, real=os.open, **options):
        if ".owner" in str(path) and flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", full)
    with owned(tmp_path), owned(tmp_path):
        assert not (tmp_path / ".owner").exists()


def test_a_folder_that_cannot_be_written_to_is_not_locked(tmp_path, monkeypatch):
    def read_only(path, flags, mode=0o777, real=os.open):
        if str(path).endswith(".lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    with owned(tmp_path), owned(tmp_path):
        assert not (tmp_path / ".lock").exists()


def test_provenance_names_no_place_of_this_machine(monkeypatch):
    given = ["/home/me/bin/tspin", "run", "--offline", "/data/me/offline", "--out=/x/y", "runs/a"]
    monkeypatch.setattr(sys, "argv", given)
    assert provenance.__wrapped__()["command"] == "tspin run --offline offline --out=y runs/a"


def test_a_package_in_somebodys_repository_has_no_commit_of_theirs(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr("tspin.runs.provenance.REPOSITORY", tmp_path / "site-packages")
    assert _of_checkout("rev-parse", "--is-inside-work-tree") is None
    monkeypatch.setattr("tspin.runs.provenance.REPOSITORY", tmp_path.resolve())
    assert _of_checkout("rev-parse", "--is-inside-work-tree") == "true"


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with owned(tmp_path), owned(tmp_path):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "has no locks" in lines[0]


def test_fingerprints_are_of_names_and_contents_in_any_order(tmp_path):
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})
    seen = []
    for name in ("first", "second"):
        (tmp_path / name).write_text("the same")
        seen.append(folder_fingerprint(tmp_path))
        (tmp_path / name).unlink()
    assert len(set(seen)) == 2
