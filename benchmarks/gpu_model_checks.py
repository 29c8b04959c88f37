"""A tiny model through everything: compressed on the device, loaded there, generating, taken back and saved."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from gpu_session import Session

import halfplate
from halfplate.checkpoint.weights import read_headers
from halfplate.integrations import quantizer
from halfplate.runtime import accelerate, explain, restore
from halfplate.storage.tensor_file import read_tensors

TEXT = "One day a small bird sat in a big tree. The bird saw a red ball near the house, and it wanted to play. "
READS_SENTENCE_FIRST = (5, 18)  # older ones look for the weights before the quantizer can speak
RECIPE: dict[str, Any] = {"samples": 8, "seq_len": 32, "block_size": 16, "precision": "fp32"}
OPTIONS = {"iterations": 3, "grid_iterations": 2}


def release() -> tuple[int, ...]:
    """The installed transformers as two numbers."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def save_tiny(folder: Path) -> None:
    """A Llama of two blocks with a tokenizer of its own, in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)


@contextmanager
def any_transformers(session: Session) -> Iterator[None]:
    """Let Halfplate load with a transformers older than it asks for, and say so."""
    oldest = quantizer.OLDEST_TRANSFORMERS
    if release() < oldest:
        session.record.write(
            "note", f"transformers {transformers.__version__} is older than {oldest}; tried all the same"
        )
        quantizer.OLDEST_TRANSFORMERS = release()
    try:
        yield
    finally:
        quantizer.OLDEST_TRANSFORMERS = oldest


def readable(checkpoint: Path) -> Path:
    """`checkpoint`, or a copy without the sentence that a transformers before 5.18 takes for a file's name."""
    if release() >= READS_SENTENCE_FIRST:
        return checkpoint
    copy = checkpoint.with_name(checkpoint.name + "-readable")
    if not copy.exists():
        shutil.copytree(checkpoint, copy)
        config = json.loads((copy / "config.json").read_text())
        config.pop("transformers_weights", None)
        (copy / "config.json").write_text(json.dumps(config))
    return copy


def check_model(session: Session) -> None:
    """Compress, compare with the CPU, load in each way, run, generate, restore, dequantize, save."""
    with TemporaryDirectory(prefix="halfplate-gpu-") as scratch, any_transformers(session), torch.no_grad():
        folder = Path(scratch)
        save_tiny(folder / "dense")
        (folder / "text.txt").write_text(TEXT * 30)
        checkpoints: dict[str, Path] = {}
        for core in ("int4",) if session.tiny else ("bf16", "int4"):
            with session.part(f"compress {core} on {session.device.type}"):
                checkpoints[core] = _compressed(session, folder, core)
        for core, checkpoint in checkpoints.items():
            with session.part(f"load {core}"):
                _loaded(session, checkpoint, core)
            with session.part(f"device_map {core}"):
                _mapped(session, checkpoint, core)
            with session.part(f"generate {core}"):
                _generates(session, checkpoint, core)
            with session.part(f"restore and save {core}"):
                _restored(session, checkpoint, core, folder)
        with session.part("recipe on load"):
            _on_load(session, folder)


def _recipe(core: str, device: str, folder: Path) -> halfplate.Recipe:
    text = str(folder / "text.txt")
    return halfplate.Recipe(core_dtype=core, device=device, calibration=text, method_options=OPTIONS, **RECIPE)


def _compressed(session: Session, folder: Path, core: str) -> Path:
    """Compress on the CPU and on the device; returns the checkpoint of the device."""
    errors, files = [], []
    for device in ("cpu", session.device.type):
        out = folder / f"{core}-{len(files)}-{device}"
        summary = halfplate.compress(str(folder / "dense"), out, _recipe(core, device, folder), benchmark=False)
        errors.append({matrix["name"]: matrix["relative_error"] for matrix in summary["matrices"]})
        files.append(dict(read_tensors(read_headers(out))))
    apart = max(abs(errors[0][name] - errors[1][name]) for name in errors[0])
    bits = sum(torch.equal(files[0][name], files[1][name]) for name in files[0])
    said = f"at most {apart:.1e} apart; {bits} of {len(files[0])} tensors equal bit for bit"
    # Later blocks see what earlier ones gave, so that differences of the last bit grow.
    session.record.check(f"compress {core}: the errors of the CPU", apart <= 1e-3, said)
    return out


def _load(session: Session, checkpoint: Path, device: str, **options: Any) -> Any:
    return halfplate.load(readable(checkpoint), dtype=torch.float32, device=device, **options)


def _ids(session: Session, device: torch.device | str) -> torch.Tensor:
    return torch.arange(3, 35, device=device).reshape(2, 16)


def _close(model: Any, expected: torch.Tensor, session: Session) -> float:
    logits = model(_ids(session, model.device)).logits.float().cpu()
    return float((logits - expected).norm() / expected.norm())


def _reference(session: Session, checkpoint: Path) -> torch.Tensor:
    model = _load(session, checkpoint, "cpu", kernels=False)
    logits: torch.Tensor = model(_ids(session, "cpu")).logits
    return logits


def _loaded(session: Session, checkpoint: Path, core: str) -> None:
    expected = _reference(session, checkpoint)
    device = session.device.type
    plain = _close(_load(session, checkpoint, device, kernels=False), expected, session)
    session.record.check(f"load {core}, torch path: the logits of the CPU", plain <= 1e-4, f"{plain:.1e}")
    model = _load(session, checkpoint, device)
    fast = _close(model, expected, session)
    session.record.check(f"load {core}, fast path: the logits of the CPU", fast <= 0.03, f"{fast:.1e}")
    paths = {linear.path for linear in explain(model).linears}
    linears = sum("_proj" in linear.name for linear in explain(model).linears)
    session.record.check(f"explain {core} names every linear", linears == 14, f"{linears} of 14: {sorted(paths)}")


def _mapped(session: Session, checkpoint: Path, core: str) -> None:
    from transformers import AutoModelForCausalLM

    expected = _reference(session, checkpoint)
    for place in (session.device.type, "auto"):
        name = f"device_map={place!r} {core}"
        with session.part(name):
            model = AutoModelForCausalLM.from_pretrained(readable(checkpoint), device_map=place, dtype=torch.float32)
            off = _close(model, expected, session)
            kinds = sorted({type(module).__name__ for key, module in model.named_modules() if key.endswith("_proj")})
            session.record.check(f"{name}: the logits of the CPU", off <= 0.03, f"{off:.1e}, {', '.join(kinds)}")


def _generates(session: Session, checkpoint: Path, core: str) -> None:
    prompt = torch.arange(3, 11).reshape(1, 8)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = _load(session, checkpoint, "cpu", kernels=False).generate(prompt, **options)
    model = _load(session, checkpoint, session.device.type, kernels=False)
    found = model.generate(prompt.to(model.device), **options).cpu()
    session.record.check(f"generate {core}, torch path: the tokens of the CPU", torch.equal(found, expected))
    model = _load(session, checkpoint, session.device.type)
    for cache in ("dynamic", "static"):
        with session.part(f"generate {core}, {cache} cache"):
            extra = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
            found = model.generate(prompt.to(model.device), **options, **extra).cpu()
            same = int((found == expected).sum()) - 8
            session.record.check(
                f"generate {core}, fast path, {cache} cache",
                found.shape == expected.shape,
                f"{same} of 12 tokens as on the CPU",
            )


def _restored(session: Session, checkpoint: Path, core: str, folder: Path) -> None:
    """Whether what lies in the layout of the device is still what the files hold."""
    stored = dict(read_tensors(read_headers(checkpoint)))
    for name, kernels in (("torch path", False), ("fast path", True)):
        with session.part(f"save {core} from the {name}"):
            model = _load(session, checkpoint, session.device.type, kernels=kernels)
            out = folder / f"saved-{core}-{kernels}"
            model.save_pretrained(out)
            found = dict(read_tensors(read_headers(out)))
            equal = found.keys() == stored.keys() and all(torch.equal(found[key], stored[key]) for key in stored)
            session.record.check(f"save {core} from the {name}: the same tensors", equal)
    with session.part(f"restore {core}"):
        model = _load(session, checkpoint, session.device.type)
        restore(model)
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        equal = all(torch.equal(state[key], stored[key]) for key in stored)
        session.record.check(f"restore {core}: the same tensors", equal)
        accelerate(model)
    with session.part(f"dequantize {core}"):
        expected = _reference(session, checkpoint)
        model = _load(session, checkpoint, session.device.type)
        off = _close(model.dequantize(), expected, session)
        session.record.check(f"dequantize {core}: the logits of the CPU", off <= 1e-3, f"{off:.1e}")


def _on_load(session: Session, folder: Path) -> None:
    """`quantization_config=HalfplateConfig(recipe=...)` with the device as the recipe's."""
    from transformers import AutoModelForCausalLM

    recipe = _recipe("bf16", session.device.type, folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=halfplate.HalfplateConfig(recipe=recipe), device_map=session.device.type
    )
    logits = model(_ids(session, model.device)).logits
    session.record.check("recipe on load", bool(logits.isfinite().all()))
