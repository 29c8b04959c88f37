"""The script of the GPU on tiny shapes on the CPU: every section that needs no CUDA really runs."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "random_weights",
    *(
        f"gpu_{part}"
        for part in ("record", "session", "timing", "checks", "model_checks", "linears", "decode", "solver")
    ),
    "gpu_sections",
    "gpu",
)
SECTIONS = (
    *("device", "ceilings", "formats", "semi_structured", "solver", "model", "decode_linears", "prefill_linears"),
    *("decode_models", "solve_times", "compress"),
)


@pytest.fixture(scope="module")
def scripts():
    """The modules of the script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def session(scripts, tmp_path):
    """A session on the CPU with tiny shapes and a minute of time."""
    record = scripts.gpu_record.Record(tmp_path)
    return scripts.gpu_session.Session(record, torch.device("cpu"), True, time.monotonic() + 60)


def entries(session):
    return [json.loads(line) for line in session.record.lines.read_text().splitlines()]


def section(scripts, run, name="tried", least=0.0, most=30.0):
    return scripts.gpu_session.Section(name, run, least, most)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_on_the_cpu(scripts, session, name):
    (found,) = [one for one in scripts.gpu_sections.sections() if one.name == name]
    assert scripts.gpu_session.run_sections(session, [found]) is None
    told = entries(session)
    assert told[-1]["kind"] == "section"
    assert told[-1]["state"] == "done", told[-1]["text"]
    assert not [entry["text"] for entry in told if entry["kind"] == "check" and entry["passed"] is False]
    assert not session.record.failed


def test_there_is_no_other_section(scripts):
    assert tuple(one.name for one in scripts.gpu_sections.sections()) == SECTIONS


def test_a_section_that_fails_stops_no_other(scripts, session):
    def broken(session):
        with session.part("half"):
            raise ValueError("of two lines\nof text")
        with session.part("lacking"):
            raise scripts.gpu_session.Absent("no kernel yet")
        session.record.measured("figure", 1.5, "s")
        raise RuntimeError("the rest")

    after = section(scripts, lambda session: session.record.check("runs", True), "after")
    scripts.gpu_session.run_sections(session, [section(scripts, broken), after])
    told = entries(session)
    assert [entry.get("passed") for entry in told if entry["kind"] == "check"] == [False, None, True]
    assert [entry["state"] for entry in told if entry["kind"] == "section"] == ["error", "done"]
    assert session.record.failed
    summary = session.record.summary()
    assert "1 checks passed, 1 failed, 1 have nothing to check yet" in summary
    assert "ValueError: of two lines of text" in summary
    assert "tried: error: RuntimeError: the rest" in summary


def test_time_cuts_a_section_off_and_what_it_wrote_counts(scripts, session):
    def slow(session):
        session.record.goal("compress_8b", 12.0)
        with session.part("endless"):
            while True:
                time.sleep(0.01)

    late = section(scripts, slow, "late", least=1e6)
    session.tiny = False
    scripts.gpu_session.run_sections(session, [section(scripts, slow, most=0.2), late])
    states = {entry["text"].split(":")[0]: entry["state"] for entry in entries(session) if entry["kind"] == "section"}
    assert states == {"tried": "cut off", "late": "skipped"}
    assert "at most 30 min | 12 min | yes" in session.record.summary()


def test_a_last_line_that_was_cut_off_is_left_out(scripts, session):
    session.record.goal("prefill_4096", 1.0, "by hand")
    with session.record.lines.open("a") as file:
        file.write('{"kind": "goal", "na')
    assert "at least 1.25× | 1× (by hand) | no" in session.record.summary()


def test_every_goal_is_in_the_summary(scripts, session):
    assert session.record.summary().count("not measured") == len(scripts.gpu_record.GOALS)


def test_wrong_sections_and_a_missing_gpu_are_refused_in_words(scripts, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *arguments])
        return scripts.gpu.main()

    monkeypatch.setattr(scripts.gpu, "build_native", lambda out: "not built here")
    assert run("--device", "cpu", "--only", "nothing") == 2
    assert "nothing is no section; there are device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run() == 2
    assert "--device cpu --tiny" in capsys.readouterr().err
    assert run("--device", "cpu", "--tiny", "--only", "device") == 0
    assert "not measured" in capsys.readouterr().out
