"""The files of a sharded model are those of the safetensors library, cut where the next tensor would exceed the limit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from halfplate.storage.shards import INDEX, SINGLE, weight_map_of, write_shards
from halfplate.storage.tensor_file import sha256

TENSORS = {name: torch.arange(count, dtype=torch.float32) for name, count in {"b": 10, "a": 30, "d": 5, "c": 5}.items()}


def written(folder, limit):
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    return write_shards(entries, folder, limit, lambda file, name: file.write(name, TENSORS[name]))


@pytest.mark.parametrize(
    ("limit", "files"),
    [(10**9, [["b", "a", "d", "c"]]), (100, [["b"], ["a"], ["d", "c"]]), (1, [["b"], ["a"], ["d"], ["c"]])],
)
def test_each_file_has_the_tensors_that_fit(tmp_path, limit, files):
    assert written(tmp_path, limit) == {name: sha256(tensor) for name, tensor in TENSORS.items()}
    paths = sorted(tmp_path.glob("*.safetensors"))
    found = [load_file(path) for path in paths]
    assert [sorted(each) for each in found] == [sorted(each) for each in files]
    assert all(torch.equal(tensor, TENSORS[name]) for each in found for name, tensor in each.items())
    if len(files) == 1:
        assert [path.name for path in paths] == [SINGLE]
        assert not (tmp_path / INDEX).exists()
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    assert weight_map_of(index) == {name: path.name for path, each in zip(paths, found, strict=True) for name in each}


@pytest.mark.parametrize(
    "index", [None, [], {}, {"weight_map": {}}, {"weight_map": {"a": "../b.safetensors"}}, {"weight_map": {"a": 3}}]
)
def test_an_index_that_is_none_is_refused(index):
    with pytest.raises(ValueError, match="weight_map"):
        weight_map_of(index)
