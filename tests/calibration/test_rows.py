"""Rows of JSON: messages, rows without text, other fields, and the cure that an error names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfplate.calibration import calibration_tokens
from halfplate.calibration.documents import Text, check_source, read_text
from halfplate.calibration.rows import json_lines, json_values
from halfplate.errors import HalfplateError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Who is Tom?"}, {"role": "assistant", "content": "A boy."}]
SHARE_GPT = [{"from": "human", "value": "Who is Tom?"}, {"from": "gpt", "value": "A boy."}]


class Templated:
    """As much of a tokenizer as writes messages."""

    chat_template = TEMPLATE

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        from jinja2 import Template

        assert not tokenize
        return Template(self.chat_template).render(messages=messages)


def rows_file(folder: Path, *rows: Any, name: str = "a.jsonl") -> str:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"conversations": SHARE_GPT}])
def test_messages_are_written_by_the_chat_template(tmp_path: Path, row: Any) -> None:
    text = Text(rows_file(tmp_path, row))
    tokenizer: Any = Templated()
    assert list(text.documents(tokenizer)) == ["<user>Who is Tom?\n<assistant>A boy.\n"]
    assert text.facts() == {"messages": "chat template"}
    assert list(text.documents()) == ["Who is Tom?\n\nA boy."]
    assert text.facts() == {"messages": "contents only"}


def test_the_real_tokenizers_template_is_used(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    source = rows_file(tmp_path, {"messages": MESSAGES})
    assert read_text(source, tokenizer=tiny_tokenizer) == ["<user>Who is Tom?\n<assistant>A boy.\n"]


def test_a_template_that_refuses_is_named_with_the_line(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    source = rows_file(tmp_path, {"messages": MESSAGES})
    with pytest.raises(HalfplateError, match=r"line 1: the chat template .*roles must alternate"):
        read_text(source, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_without_text_are_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, None, {}, {"text": None}, {"messages": []}, {"text": ""}, {"text": "two"}]
    text = Text(rows_file(tmp_path, *rows, name=name))
    # An empty text is a document: the rows of WikiText count so.
    assert list(text.documents()) == ["one", "", "two"]
    assert text.facts() == {"skipped_rows": 4}


def test_the_protocol_says_what_was_passed_over(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    story = {"text": "Tom and Mia saw the bird near the house. " * 10}
    tokens = calibration_tokens(rows_file(tmp_path, story, None, story), model, tiny_tokenizer, 4, 16, seed=0)
    assert tokens.protocol()["skipped_rows"] == 1
    with pytest.raises(HalfplateError, match=r"windows\), and 2 rows without text"):
        calibration_tokens(rows_file(tmp_path, None, {"text": None}), model, tiny_tokenizer, 4, 16, seed=0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 3, "content": "one"}, "one"),
        ({"prompt": "one", "response": "two"}, "one\ntwo"),
        ({"instruction": "one", "input": "", "output": "two"}, "one\ntwo"),
        ({"question": "one", "answer": "two"}, "one\ntwo"),
        ({"body": "one", "n": 1}, "one"),
    ],
)
def test_the_cure_that_is_named_works(tmp_path: Path, name: str, row: Any, expected: str) -> None:
    source = rows_file(tmp_path, row, row, name=name)
    with pytest.raises(HalfplateError, match="name the field that does") as caught:
        read_text(source)
    cure = re.search(r"e\.g\. '(.*)'$", str(caught.value))
    assert cure is not None
    check_source(cure[1])
    assert read_text(cure[1]) == [expected, expected]


def test_a_row_of_no_text_at_all_has_no_such_cure(tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match="write each row with its text in a field 'text'"):
        read_text(rows_file(tmp_path, {"label": 3}))


def test_named_fields(tmp_path: Path) -> None:
    source = rows_file(
        tmp_path, {"a": "one", "b": None, "a+b": "both", "chat": SHARE_GPT}, {"a": None, "b": None, "chat": []}
    )
    assert read_text(f"{source}:a") == ["one"]
    assert read_text(f"{source}:b+a") == ["one"]
    assert read_text(f"{source}:chat") == ["Who is Tom?\n\nA boy."]
    with pytest.raises(HalfplateError, match=r"line 1 has no field 'c' \(fields: 'a', 'b', 'a\+b', 'chat'\)"):
        read_text(f"{source}:a+c")
    with pytest.raises(HalfplateError, match="does not exist"):
        check_source(f"{source}x:a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON, max_size=6), st.integers(1, 7), st.sampled_from([None, 1]), st.booleans())
def test_values_cut_anywhere_equal_json_itself(rows: list[Any], size: int, indent: int | None, lines: bool) -> None:
    if lines:
        # An array at the beginning would be taken for the array of the rows.
        rows = [row for row in rows if not isinstance(row, list | int | float)]
        text = "\n".join(json.dumps(row, indent=indent) for row in rows)
    else:
        text = json.dumps(rows, indent=indent)
    blocks = [text[at : at + size] for at in range(0, len(text), size)]
    assert [value for _, value in json_values(blocks, "text")] == rows


@given(st.lists(JSON, max_size=6), st.integers(1, 7))
def test_lines_cut_anywhere_equal_json_itself(rows: list[Any], size: int) -> None:
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    blocks = [text[at : at + size] for at in range(0, len(text), size)]
    found = list(json_lines(blocks, "text"))
    assert [value for _, value in found] == rows
    assert [place for place, _ in found] == [f"text, line {2 * index + 1}" for index in range(len(rows))]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"} {"text": "b"}]', "row 2 is not valid JSON"),
        ('[{"text": "a"}, ]', "row 2 is not valid JSON"),
        ('[{"text": "a"}', "ends inside its array"),
        ('[{"text": "a"}] more', "has more text after its array"),
        ("[" * 100_000, "row 1 is not valid JSON"),
        ('{"text": "a"} {"text"', "row 2 is not valid JSON"),
        ("[7]", "row 1 holds a int"),
    ],
)
def test_damaged_json_is_named_with_its_row(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(HalfplateError, match=expected) as caught:
        read_text(str(tmp_path / "a.json"))
    assert "\n" not in str(caught.value)


def test_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfplate.calibration.rows.MAX_ROW_CHARACTERS", 1000)
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text('{"text": "' + "x" * 2000)
        with pytest.raises(HalfplateError, match="is longer than"):
            read_text(str(tmp_path / name))
