"""Output works in any locale: what a stream cannot print is replaced, and what the user typed is read as UTF-8."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfplate.cli import VERBS, main
from halfplate.cli.streams import IN_ASCII

QUICK = ["--samples", "2", "--seq-len", "16", "--threads", "1"]
JUDGED = ["--windows", "1", "--seq-len", "16"]
PROMPT = "Café 中 × 🙂"
# C as it was before Python took it for UTF-8, which PYTHONUTF8=0 brings back.
PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def places(tiny_folder: Path, tmp_path: Path) -> dict[str, str]:
    """A model, a text and places to write to, whose names no single-byte encoding has all of."""
    folder = tmp_path / "modèle中"
    tiny_folder.rename(folder)
    text = tmp_path / "récit中.txt"
    text.write_text("Café 中 🙂 near the house, and Tom saw a bird. " * 30, encoding="utf-8")
    made = {name: str(tmp_path / f"{name}→中") for name in ("OUT", "DENSE", "PRUNED", "RECOVERED", "SWEPT")} | {
        "SAMPLED": str(tmp_path / "中→.jsonl")
    }
    sweep = tmp_path / "suite→中.yaml"
    sweep.write_text(
        f"model: {folder}\neval: {{text: {text}, windows: 1, seq_len: 16}}\n"
        "rows: [original, {name: quantisé中, method: rtn, core_dtype: int8}]\n",
        encoding="utf-8",
    )
    places = {"MODEL": str(folder), "TEXT": str(text), "REPORT": str(tmp_path / "rapport→中.html"), "SWEEP": str(sweep)}
    return places | made


COMMANDS = [
    ["plan", "MODEL", *QUICK, "--calibration", "TEXT"],
    ["compress", "MODEL", "-o", "OUT", "--method", "wanda", *QUICK, "--calibration", "TEXT"],
    ["inspect", "OUT"],
    ["eval", "OUT", "--against", "MODEL", "--text", "TEXT", *JUDGED],
    ["bench", "OUT", "--against", "MODEL", "--prompt", "4", "--new-tokens", "2"],
    ["sweep", "SWEEP", "-o", "SWEPT"],
    ["generate", "OUT", PROMPT, "--max-new-tokens", "8"],
    [
        "report",
        "OUT",
        "-o",
        "REPORT",
        "--against",
        "MODEL",
        "--text",
        "TEXT",
        *JUDGED,
        "--prompt",
        PROMPT,
        "--new-tokens",
        "2",
    ],
    ["sample", "MODEL", "-o", "SAMPLED", "--samples", "2", "--seq-len", "16"],
    ["prune", "MODEL", "-o", "PRUNED", "--keep", "0.9", *QUICK, "--calibration", "TEXT"],
    ["export", "OUT", "-o", "DENSE"],
    ["recover", "OUT", "--teacher", "MODEL", "-o", "RECOVERED", "--tokens", "16", "--text", "TEXT", "--seq-len", "16"],
    ["recipe", "show", "default"],
    ["methods"],
    ["doctor"],
    ["completion", "bash"],
    ["completion", "fish"],
    ["serve", "中→"],
    ["plan", "中→"],
    ["compress", "MODEL", "-o", "OUT"],
    ["eval", "OUT", "--text", "中→.txt"],
    ["generate", "OUT", PROMPT * 100],
    ["chat", "OUT"],
]
REFUSED = 6  # of these, the last


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_every_verb_prints_in_any_encoding(places, monkeypatch, encoding):
    assert {command[0] for command in COMMANDS} == set(VERBS)
    # The verbs that compute print with the same means as the others; one encoding is enough for them.
    quick = ("plan", "compress", "inspect", "generate", "export")
    commands = COMMANDS if encoding == "ascii" else [each for each in COMMANDS[:-REFUSED] if each[0] in quick]
    for number, command in enumerate(commands):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = main([places.get(word, word) for word in command])
        monkeypatch.undo()
        written = [stream.buffer.getvalue().decode(encoding) for stream in (out, err) if not stream.flush()]
        refused = number >= len(COMMANDS) - REFUSED
        assert status == (2 if refused else 0), (command, written)
        assert "Traceback" not in written[1]
        assert written[0] or refused or command[0] in ("export", "recover"), command
        if refused:
            assert written[1].count("halfplate: error: ") == 1
        if command[0] == "generate" and not refused:
            assert written[0].startswith(r"Caf\xe9 \u4e2d x" if encoding == "ascii" else r"Café \u4e2d ×"), written


def test_signs_of_ours_have_words_in_ascii():
    assert all(word.isascii() and len(sign) == 1 for sign, word in IN_ASCII.items())


@pytest.mark.slow
def test_a_process_in_the_plain_c_locale(places, tmp_path):
    plain = tmp_path / "model"
    Path(places["MODEL"]).rename(plain)
    out, named = tmp_path / "out", tmp_path / "café"
    named.symlink_to(plain)
    text = Path(places["TEXT"]).with_name("story.txt")
    text.write_bytes(Path(places["TEXT"]).read_bytes())
    code = """
import sys
from halfplate.cli import main
commands = " ".join(sys.argv[1:]).split(" / ")
for command in commands:
    print("status", main(command.split(" ")), file=sys.stderr)
"""
    commands = [
        f"compress {plain} -o {out} --method wanda {' '.join(QUICK)} --calibration {text}",
        f"generate {out} Café中× --max-new-tokens 1",
        f"inspect {out}",
        f"generate {named} x",
        f"compress {plain} -o {places['OUT']} --method wanda {' '.join(QUICK)}",
        f"inspect {named}",
        f"compress {plain} -o {tmp_path / 'other'} --method wanda {' '.join(QUICK)} --calibration {places['TEXT']}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *" / ".join(commands).split(" ")],
        capture_output=True,
        check=False,
        env=os.environ | PLAIN_C,
    )
    told = done.stderr.decode("ascii")
    assert [line for line in told.splitlines() if line.startswith("status")] == ["status 0"] * 3 + ["status 2"] * 4, (
        told
    )
    errors = [line for line in told.splitlines() if line.startswith("halfplate: error: ")]
    for line, argument in zip(errors, ("model", "out", "path", "calibration"), strict=True):
        assert f"error: {argument}='" in line
        assert "cannot be read as UTF-8" in line
        assert "LC_ALL=C.UTF-8" in line
    printed = done.stdout.decode("ascii")
    assert r"Caf\xe9\u4e2dx" in printed
    assert not any(Path(place).exists() for place in (places["OUT"], tmp_path / "other"))


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_names_that_are_no_utf8_are_refused_before_any_work(halfplate, tiny_folder, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    halfplate("compress", tiny_folder, "-o", name, *QUICK).refused(
        "out=", "cannot be read as UTF-8", "choose another name"
    )
    Path(name).mkdir()
    for command in (
        ["plan", name],
        ["compress", name, "-o", tmp_path / "out"],
        ["export", name, "-o", tmp_path / "out"],
    ):
        halfplate(*command).refused("cannot be read as UTF-8")
    assert list(Path(name).iterdir()) == []
