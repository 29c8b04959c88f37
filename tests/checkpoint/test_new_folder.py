"""OUT appears whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import halfplate
from halfplate.checkpoint import folder as folder_module
from halfplate.checkpoint import write
from halfplate.checkpoint.folder import check_out, new_folder
from halfplate.errors import HalfplateError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ours(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    (folder / "halfplate.json").write_text(json.dumps({"text": text}))
    return folder


def test_a_new_folder_appears_at_the_end_only(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out, overwrite=False) as partial:
        (partial / "file").write_text("x")
        assert not out.exists()
        assert partial.parent == out.parent
    assert contents(out) == {"file": b"x"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("x"), HalfplateError("x")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, failure: BaseException, exists: bool) -> None:
    out = tmp_path / "out"
    before = contents(ours(out)) if exists else None
    with pytest.raises(type(failure)), new_folder(out, overwrite=True) as partial:  # noqa: PT012
        (partial / "file").write_text("half")
        raise failure
    assert (contents(out) if out.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])


def test_an_overwritten_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    (out / "left over").write_text("x")
    with new_folder(out, overwrite=True) as partial:
        (partial / "file").write_text("new")
        assert "left over" in contents(out)
    assert contents(out) == {"file": b"new"}
    assert list(tmp_path.iterdir()) == [out]


def test_the_old_folder_comes_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ours(tmp_path / "out")
    before = contents(out)
    rename = Path.rename

    def fail(self: Path, target: Any) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_what_may_be_written_to(tmp_path: Path, tiny_folder: Path) -> None:
    check_out(tmp_path / "absent", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", overwrite=False)
    with new_folder(tmp_path / "empty", overwrite=False) as partial:
        (partial / "file").write_text("x")
    assert contents(tmp_path / "empty") == {"file": b"x"}

    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(HalfplateError, match=r"file' exists and is not a folder"):
            check_out(tmp_path / "file", overwrite)
        with pytest.raises(HalfplateError, match="did not write, which --overwrite does not delete"):
            check_out(tiny_folder, overwrite)
    with pytest.raises(HalfplateError, match="exists; choose another name, or pass --overwrite"):
        check_out(ours(tmp_path / "ours"), overwrite=False)
    check_out(tmp_path / "ours", overwrite=True)


def test_a_saved_again_checkpoint_counts_as_ours(written: Any) -> None:
    one = written()
    (one.folder / "halfplate.json").unlink()
    check_out(one.folder, overwrite=True)


def test_a_link_is_followed(tmp_path: Path) -> None:
    ours(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"file": b"new"}


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_named(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    one = written()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(write, "write_record", fail)
    with pytest.raises(
        HalfplateError, match=r"out='.*full' could not be written .*the disk is full, free some space"
    ) as raised:
        one.write(tmp_path / "full")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "full").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_files_reach_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync = folder_module.sync
    rename = Path.rename
    monkeypatch.setattr(folder_module, "sync", lambda path: (events.append(path.name.rpartition(".")[2]), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1])
    with new_folder(tmp_path / "out", overwrite=False) as partial:
        (partial / "a").write_text("x")
        (partial / "b").write_text("x")
    assert events == ["a", "b", "partial", "rename", tmp_path.name.rpartition(".")[2]]


WRITE = """
import sys, time, json, pathlib
from halfplate.checkpoint.folder import new_folder
from halfplate.errors import HalfplateError
import torch
from safetensors.torch import save_file
try:
    with new_folder(pathlib.Path(sys.argv[1]), overwrite=False) as partial:
        (partial / "config.json").write_text("{}")
        print("started", flush=True)
        if sys.argv[2] == "wait":
            time.sleep(60)
        save_file({"a": torch.zeros(10**6)}, partial / "a.safetensors")
except HalfplateError as error:
    print(error)
    sys.exit(error.exit_status)
"""


def start(tmp_path: Path, mode: str, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(halfplate.__file__).parents[1])}
    command = [sys.executable, "-c", WRITE, str(tmp_path / "out"), mode]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_control_c_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "write", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)))
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "could not be written" in printed
    assert list(tmp_path.iterdir()) == []
