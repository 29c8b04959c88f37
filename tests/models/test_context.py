"""The longest text that a model takes."""

import pytest
import torch

from halfplate.models.context import positions


def test_a_configuration_says_it(tiny_model):
    assert positions(tiny_model("llama", max_position_embeddings=77)) == 77
    assert positions(tiny_model("bloom", max_position_embeddings=None)) is None


def test_positions_of_padding_hold_no_token(tiny_model):
    model = tiny_model("camembert", max_position_embeddings=40, pad_token_id=1, is_decoder=True)
    assert positions(model) == 38
    ids = torch.arange(3, 3 + 38)[None]
    assert model(input_ids=ids).logits.shape[1] == 38
    with pytest.raises(Exception, match="index"):
        model(input_ids=torch.arange(3, 3 + 39)[None])
