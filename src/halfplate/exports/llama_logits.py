"""Logits of llama.cpp, through llama-cpp-python, against those of the model that a GGUF file was made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.models import gguf
from halfplate.models.gguf_tensors import StoredTensor

LONGEST = 512  # tokens of the text that are compared
BLOCK = 32  # inputs that llama.cpp rounds together before a product with codes
SUPER_BLOCK = 256  # the same, before a product with a K type
Logits = NDArray[np.float32]


def check_installed(text: str) -> None:
    """Raise HalfplateError if llama-cpp-python is not installed. text: what its logits are asked for."""
    if find_spec("llama_cpp") is None:
        raise HalfplateError(
            f"verify_logits={text[:40]!r} needs llama.cpp; run `pip install llama-cpp-python` (it is compiled for minutes), or leave it out"
        )


def compare_logits(path: Path, model: Any, tensors: dict[str, StoredTensor], tokenizer: Any, text: str) -> str:
    """A sentence on the largest difference between llama.cpp's logits of `text` and the model's.

    llama.cpp rounds the inputs of a product to eight bits if the matrix has codes, and to F16 if it has F16. So its logits are
    compared with those of the file, read back, with inputs rounded in the same way, and with those of `model`.
    Raises HalfplateError if `text` has fewer than two tokens or more than fit the model, or if llama.cpp cannot read the file.
    """
    ids = tokenizer(text)["input_ids"][: min(LONGEST, model.config.max_position_embeddings)]
    if len(ids) < 2:
        raise HalfplateError(f"verify_logits={text!r} has {len(ids)} tokens, expected at least 2; give a longer text")
    theirs, plain = llama_logits(path, ids), _logits(model, ids)
    read, _ = gguf.load_model(path, path.name, gguf.read_config(path, path.name))
    with rounded_inputs(read, {key: stored.kind for key, stored in tensors.items()}):
        rounded = _logits(read, ids)
    largest = float(np.abs(plain).max()) or 1.0
    alike, apart = (float(np.abs(theirs - ours).max()) / largest for ours in (rounded, plain))
    same = int((theirs.argmax(-1) == plain.argmax(-1)).sum())
    return (
        f"logits of llama.cpp on {len(ids)} tokens differ by {alike:.1e} of the largest logit from the file with inputs rounded as llama.cpp does, "
        f"by {apart:.1e} from the model; the most probable token is the same at {same} of {len(ids)}"
    )


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Logits:
    found: Logits = (
        model(input_ids=torch.tensor([ids], dtype=torch.int64, device="cpu"), use_cache=False).logits[0].float().numpy()
    )
    return found


def llama_logits(path: Path, ids: list[int]) -> Logits:
    """llama.cpp's logits after each of `ids`, (tokens, vocabulary), with a cache in fp32; raises HalfplateError if it fails."""
    llama, _ = _library()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False  # those for AMX stop the process on some virtual machines
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise HalfplateError(f"llama.cpp cannot read {path.name}; update llama-cpp-python, or leave verify_logits out")
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(ids)
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    options.type_k = options.type_v = llama.GGML_TYPE_F32
    options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    state = llama.llama_init_from_model(model, options)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        if failed := llama.llama_decode(state, batch):
            raise HalfplateError(
                f"llama.cpp cannot compute with {path.name}: it failed with {failed}; update llama-cpp-python"
            )
        size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        found: Logits = np.ctypeslib.as_array(llama.llama_get_logits(state), (len(ids), size)).copy()
        return found
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(state)
        llama.llama_model_free(model)


@contextmanager
def rounded_inputs(model: nn.Module, kinds: dict[str, str]) -> Iterator[None]:
    """Context manager in which linears round their inputs as llama.cpp does for the type of their matrix.

    kinds: type of each tensor by its name; a head without one has that of the embedding.
    """
    embedding = next((kind for key, kind in kinds.items() if "embed_tokens" in key), "F32")
    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):
            kind = kinds.get(f"{name}.weight", embedding if name == "lm_head" else "F32")
            hooks.append(module.register_forward_pre_hook(lambda _, given, kind=kind: (_rounded(given[0], kind),)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(x: Tensor, kind: str) -> Tensor:
    if kind == "F32":
        return x
    if kind in ("F16", "BF16"):
        return x.to(torch.float16 if kind == "F16" else torch.bfloat16).to(x.dtype)
    if kind.endswith("_K"):
        blocks = x.reshape(*x.shape[:-1], -1, SUPER_BLOCK)
        # The value that is largest in size becomes −127, and its scale stays in fp32.
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scales = largest / -127
        codes = torch.where(scales != 0, blocks / scales, 0).round().clamp_max_(127)
        return (codes * scales).reshape(x.shape)
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, blocks / scales, 0).round()
    return (codes * scales.half().to(x.dtype)).reshape(x.shape)


@cache
def _library() -> tuple[Any, Any]:
    """llama_cpp, silent, and its log function, which has to live as long."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, None)
    llama_cpp.llama_backend_init()
    return llama_cpp, silence
