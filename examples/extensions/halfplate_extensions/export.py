"""An export to one numpy `.npz` file: every tensor of the model, with compressed matrices expanded to full size."""

from pathlib import Path

import numpy as np

from halfplate.checkpoint.loading import load_any
from halfplate.errors import HalfplateError
from halfplate.models.sources import is_compressed
from halfplate.storage.atomic import whole_file


def export_numpy(source: str, out: Path, overwrite: bool) -> str:
    """Write the tensors of a checkpoint or an original model as fp32 arrays (see `halfplate.exports.Exporter`)."""
    if out.suffix != ".npz":
        raise HalfplateError(f"out={str(out)!r} is not a .npz file; name one, e.g. model.npz")
    if out.exists() and not overwrite:
        raise HalfplateError(f"out={str(out)!r} exists; choose another name, or pass --overwrite to replace it")
    model, _ = load_any(source)
    if is_compressed(source):
        model = model.dequantize()
    arrays = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    with whole_file(out) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    return f"{out}: {len(arrays)} arrays of {source}"
