"""Files written tensor by tensor are those of the safetensors library, byte for byte, and damage is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfplate.storage.tensor_file import DamagedFile, TensorFileWriter, read_header, read_tensor, sha256_of

TENSORS = {
    'b.é"x': torch.randn(3, 5).bfloat16(),
    "a": torch.arange(7),
    "c": torch.arange(9, dtype=torch.uint8),
    "z": torch.randn(2).half(),
    "f": torch.randn(3, 3),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "d": torch.randn(2).double(),
    "i8": torch.zeros(3, dtype=torch.int8),
    "i32": torch.zeros(3, dtype=torch.int32),
}


def written(path, tensors=TENSORS):
    with TensorFileWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as file:
        return {name: file.write(name, tensor) for name, tensor in tensors.items()}


def test_the_bytes_of_the_library(tmp_path):
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    checksums = written(tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = read_header(tmp_path / "theirs")
    for name, tensor in TENSORS.items():
        assert torch.equal(read_tensor(found[name]), tensor)
        assert read_tensor(found[name]).dtype == tensor.dtype
        assert sha256_of(found[name]) == checksums[name]


def test_a_copy_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("halfplate.storage.tensor_file.PIECE", 7)
    checksums = written(tmp_path / "first")
    found = read_header(tmp_path / "first")
    with TensorFileWriter(tmp_path / "second", {n: (t.dtype, tuple(t.shape)) for n, t in TENSORS.items()}) as file:
        assert {name: file.copy(name, found[name]) for name in TENSORS} == checksums
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_a_file_cut_short(tmp_path, length):
    written(tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:length])
    with pytest.raises(DamagedFile, match="cut short"):
        read_header(tmp_path / "file")


def entry(start, end):
    return f'{{"dtype":"F32","shape":[{(end - start) // 4}],"data_offsets":[{start},{end}]}}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a":{entry(0, 8)},"b":{entry(0, 8)}}}', "'b' does not begin where"),
        (f'{{"a":{entry(0, 8)},"b":{entry(4, 8)}}}', "'b' does not begin where"),
        (f'{{"a":{entry(4, 8)}}}', "'a' does not begin where"),
        (f'{{"a":{entry(0, 4)}}}', "4 bytes in it belong to no tensor"),
        (f'{{"a":{entry(0, 4)},"a":{entry(0, 8)}}}', "occurs in it twice"),
        (f'{{"b":{entry(4, 8)},"none":{entry(4, 4)},"a":{entry(0, 4)}}}', None),
    ],
)
def test_tensors_follow_each_other_and_fill_the_file(tmp_path, header, message):
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    if message is None:
        assert read_header(path).keys() == load_file(path).keys()
        return
    with pytest.raises(DamagedFile, match=message):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    written(tmp_path / "file")
    found = read_header(tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:700])
    with pytest.raises(DamagedFile, match="it changed while it was read"):
        [read_tensor(stored) for stored in found.values()]
