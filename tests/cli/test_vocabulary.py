"""A token that the tokenizer knows and the model does not is refused by name by every verb that reads text."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

QUICK = ["--samples", "2", "--seq-len", "16", "--threads", "1"]
JUDGED = ["--windows", "2", "--seq-len", "16"]
NAMED = (
    "token 320 ('<beyond>')",
    "the model has a vocabulary of 320 (tokens 0 to 319)",
    "use the model's own tokenizer",
)


@pytest.fixture
def places(halfplate, tiny_folder, tmp_path):
    """A dense model, its checkpoint and a text, whose tokenizers know a token that the text holds and the models do not."""
    sound, text, out = tmp_path / "sound.txt", tmp_path / "text.txt", tmp_path / "out"
    sound.write_text("Tom and Mia saw the bird. " * 30)
    text.write_text("Tom and <beyond> saw the bird. " * 30)
    assert (
        halfplate("compress", tiny_folder, "-o", out, "--method", "wanda", *QUICK, "--calibration", sound).status == 0
    )
    for folder in (tiny_folder, out):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<beyond>"])
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer.save_pretrained(folder)
    return {"MODEL": tiny_folder, "OUT": out, "TEXT": text, "SOUND": sound, "NEW": tmp_path / "new"}


COMMANDS = [
    (["compress", "MODEL", "-o", "NEW", "--method", "wanda", *QUICK, "--calibration", "TEXT"], "calibration="),
    (["eval", "MODEL", "--text", "TEXT", *JUDGED], "text="),
    (["eval", "OUT", "--against", "MODEL", "--text", "TEXT", *JUDGED], "text="),
    (["generate", "OUT", "Tom <beyond>"], "prompt='Tom <beyond>'"),
    (["generate", "MODEL", "Tom <beyond>", "--chat"], "prompt='Tom <beyond>'"),
    (["report", "OUT", "--against", "MODEL", "--text", "TEXT", *JUDGED], "text="),
    (
        [
            "report",
            "OUT",
            "--against",
            "MODEL",
            "--text",
            "SOUND",
            *JUDGED,
            "--new-tokens",
            "2",
            "--prompt",
            "<beyond>",
        ],
        "prompt='<beyond>'",
    ),
    (
        ["recover", "OUT", "--teacher", "MODEL", "-o", "NEW", "--tokens", "16", "--text", "TEXT", "--seq-len", "16"],
        "text=",
    ),
]


@pytest.mark.slow
def test_every_verb_that_reads_text_refuses_it(halfplate, places):
    for command, argument in COMMANDS:
        halfplate(*(places.get(word, word) for word in command)).refused(argument, *NAMED)
        assert not Path(places["NEW"]).exists()


@pytest.mark.slow
def test_text_without_it_is_taken(halfplate, places):
    for command in (
        ["compress", "MODEL", "-o", "NEW", "--method", "wanda", *QUICK, "--calibration", "SOUND"],
        ["eval", "OUT", "--text", "SOUND", *JUDGED],
        ["generate", "OUT", "Tom", "--max-new-tokens", "2"],
    ):
        assert halfplate(*(places.get(word, word) for word in command)).status == 0
    # bench and the model's own text take tokens of the vocabulary alone.
    assert halfplate("bench", places["OUT"], "--prompt", "4", "--new-tokens", "2", "--rounds", "1").status == 0


def test_the_server_says_so_at_its_start(halfplate, places, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    outcome = halfplate("serve", places["MODEL"])
    assert outcome.status == 2
    warnings = [line for line in outcome.err.splitlines() if "warning" in line]
    assert warnings == [
        "halfplate: warning: the tokenizer has 1 tokens beyond the model's vocabulary of 320: 320 ('<beyond>'); "
        "text that holds one cannot be read"
    ]
