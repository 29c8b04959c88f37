"""A file appears whole or not at all."""

import pytest

from halfplate.storage.atomic import sync, whole_file


@pytest.mark.parametrize("durable", [False, True])
def test_it_takes_the_place_at_the_end(tmp_path, durable):
    file = tmp_path / "file"
    file.write_text("before")
    with whole_file(file, durable) as partial:
        partial.write_text("after")
        assert file.read_text() == "before"
        assert partial.parent == tmp_path
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "after")]
    sync(tmp_path)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_when_it_fails(tmp_path, error):
    file = tmp_path / "file"
    file.write_text("before")

    def fail(place):
        place.write_text("half")
        raise error

    with pytest.raises(error), whole_file(file) as partial:
        fail(partial)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]
