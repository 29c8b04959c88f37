"""How much memory keys and values of a text may need."""

import pytest

from halfplate.errors import HalfplateError
from halfplate.runtime import limits


def test_texts_of_any_length_need_few_measurements(monkeypatch):
    asked = []
    monkeypatch.setattr(limits, "token_nbytes", lambda config, length: asked.append(length) or 100)
    for tokens in range(1, 3000):
        limits.check_generation(None, tokens, 1)
    assert set(asked) == {16, 64, 256, 1024}
    with pytest.raises(HalfplateError, match=r"max_tokens=\d+ after 5 tokens of prompt need"):
        limits.check_generation(None, 5, 10**15, "max_tokens")
