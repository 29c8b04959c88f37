"""Matching the stored tensors with the model: all are used or reported, and missing tensors and wrong shapes are errors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from halfplate.errors import HalfplateError
from halfplate.models.conv1d import shapes_in_files
from halfplate.models.experts import expert_tensors
from halfplate.models.experts.stored import joined_names
from halfplate.models.linears import find_blocks
from halfplate.storage.tensor_file import KINDS, PIECE, DamagedFile, StoredTensor, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Heads for multi-token prediction, which generating one token at a time does not use.
FURTHER_TOKENS = re.compile(r"(^|\.)(mtp|mtp_layers|nextn\w*|medusa\w*|multi_token\w*)\.")
FURTHER = "which predict further tokens; they are copied as they are"
COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids)$")
MASKS = re.compile(r"(attn|attention)\.(bias|masked_bias|causal_mask)$")
# Tensor names of peft: LoRA and its variants, and the weights of the base layers.
ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)\.")
LAYER_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
NAMED_AT_ONCE = 3


@dataclass(frozen=True)
class Matched:
    """The tensors of a model among those of its files.

    found: those that can be read one by one, by their name in the model.
    made: names in the model of those that a conversion of transformers makes.
    extra: stored names that the model does not have, with the names after renaming.
    misshapen: tensors of all experts of a layer with another shape than the model's, by name: both shapes.
    """

    found: Mapping[str, StoredTensor]
    made: Collection[str]
    extra: Mapping[str, str]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def names_in_model(model: PreTrainedModel, names: Collection[str]) -> dict[str, tuple[str, str | None]]:
    """The name in the model of each stored name, and the conversion of its values, as transformers defines them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix, meta = model.base_model_prefix, {**model.state_dict(), **joined_names(model)}
    found: dict[str, tuple[str, str | None]] = {}
    # In the order of transformers, because a renaming may depend on earlier names.
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if renamed not in meta and name in meta:
            # The name is already that of the model, and a rule for older files has changed it.
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        found[name] = renamed, pattern
    return found


def converters_by_pattern(model: PreTrainedModel) -> dict[str, Any]:
    """The conversions of transformers for tensors that match a pattern of `names_in_model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    return {pattern: converter for converter in converters for pattern in converter.source_patterns}


def match(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> Matched:
    """Find the tensors of a model among the stored `tensors`; the experts of `model` are linears, however they are stored."""
    renamed = names_in_model(model, tensors)
    experts = expert_tensors(model, renamed, converters_by_pattern(model), tensors)
    others = {stored: entry for stored, entry in renamed.items() if stored not in experts.stored}
    expected = model.state_dict(keep_vars=True).keys()
    found = {key: tensors[stored] for stored, (key, pattern) in others.items() if pattern is None}
    made = _made(model, [(key, pattern) for key, pattern in others.values() if pattern is not None])
    extra = {stored: key for stored, (key, _) in others.items() if key not in expected}
    extra |= {stored: renamed[stored][0] for stored in experts.beyond}
    return Matched(found | experts.found, made | experts.made, dict(sorted(extra.items())), experts.misshapen)


def check_fit(name: str, model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Compare the stored `tensors` with an empty `model`; returns notes on tensors that are not part of the model.

    name: of the model, as the user gave it.
    Raises HalfplateError for tensors that are missing, have the wrong shape or type, or that the model does not have although
    they would matter.
    """
    expected = shapes_in_files(model)
    matched = match(model, tensors)
    for key, (shape, asked) in matched.misshapen.items():
        raise HalfplateError(_other_shape(name, key, shape, asked))
    have = (matched.found.keys() | matched.made) & expected.keys()
    _check_prefix(name, expected.keys() - have, list(matched.extra))
    notes = _left_over(name, model, {stored: (key, tensors[stored]) for stored, key in matched.extra.items()})
    tied = shared_names(model, expected, matched.found).keys()
    check_complete(name, model, expected, have | tied, matched.found)
    return notes


def _made(model: PreTrainedModel, converted: Iterable[tuple[str, str]]) -> set[str]:
    """The tensors that conversions make; one of several tensors is named after the first of them."""
    converters = converters_by_pattern(model)
    found: set[str] = set()
    for key, pattern in converted:
        first, *others = (target.replace("\\", "").strip("^$") for target in converters[pattern].target_patterns)
        found |= {key, *(key.replace(first, other) for other in others)}
    return found


def check_complete(
    name: str,
    model: PreTrainedModel,
    expected: Mapping[str, tuple[int, ...]],
    have: Collection[str],
    found: Mapping[str, StoredTensor],
) -> None:
    """Raise HalfplateError unless every tensor of the model is in `have`, and those in `found` have its shape and hold floats."""
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for key in sorted(expected.keys() & found.keys()):
        stored, dtype = found[key], KINDS.get(found[key].kind)
        if stored.shape != expected[key]:
            raise HalfplateError(_other_shape(name, key, stored.shape, expected[key]))
        if dtype is None:
            raise HalfplateError(
                f"model={name!r}: {key} is stored as {stored.kind}, expected plain numbers; pass an unquantised model"
            )
        if key in parameters and not dtype.is_floating_point:
            raise HalfplateError(
                f"model={name!r}: {key} is stored as {stored.kind}, expected F32, BF16 or F16; download the model again, "
                "or pass an unquantised one"
            )
    missing = sorted(key for key in expected if key not in have and not any(rule.search(key) for rule in ignored))
    if not missing:
        return
    output = model.get_output_embeddings()
    heads = [key for key, parameter in model.named_parameters() if output is not None and parameter is output.weight]
    if missing == heads and not getattr(model.config, "tie_word_embeddings", False):
        raise HalfplateError(
            f"model={name!r}: its files lack {missing[0]}, and config.json says tie_word_embeddings=false; "
            "set it to true if the model shares its embeddings with its head, else download the model again"
        )
    raise HalfplateError(
        f"model={name!r}: its files lack {len(missing)} tensors of its config.json ({missing[0]}, ...), "
        "which would be random; download the model again"
    )


def _other_shape(name: str, key: str, shape: tuple[int, ...], asked: tuple[int, ...]) -> str:
    return (
        f"model={name!r}: {key} has shape {shape} in its file, config.json asks for {asked}; download the model again"
    )


def shared_names(
    model: PreTrainedModel, expected: Collection[str], found: Mapping[str, StoredTensor]
) -> dict[str, str]:
    """Names that share the tensor of another name, with the stored name. Two stored tensors are shared if they are equal."""
    shared: dict[str, str] = {}
    for target, origin in (model.all_tied_weights_keys or {}).items():
        if target not in expected or origin not in expected:
            continue
        if target not in found and origin in found:
            shared[target] = origin
        elif origin not in found and target in found:
            shared[origin] = target
        elif target in found and origin in found and same_values(found[target], found[origin]):
            shared[target] = origin
    return shared


def stored_apart(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> list[tuple[str, str]]:
    """Names that the configuration ties but whose stored values differ. transformers does not tie these."""
    tied = (model.all_tied_weights_keys or {}).items()
    if not tied:
        return []
    found = match(model, tensors).found
    return [
        (target, origin)
        for target, origin in tied
        if target in found and origin in found and not same_values(found[target], found[origin])
    ]


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors are equal, without loading either completely; raises HalfplateError if they cannot be read."""
    if first.shape != second.shape:
        return False
    if first.kind != second.kind or first.encoded is not None or second.encoded is not None:
        return torch.equal(read_tensor(first).double(), read_tensor(second).double())
    try:
        with first.path.open("rb") as ours, second.path.open("rb") as theirs:
            ours.seek(first.start)
            theirs.seek(second.start)
            left = first.nbytes
            while left:
                piece = ours.read(min(PIECE, left))
                if not piece or piece != theirs.read(len(piece)):
                    return False
                left -= len(piece)
    except OSError as error:
        raise DamagedFile(f"{first.path.name} cannot be read ({error.strerror or error})") from None
    return True


def _left_over(name: str, model: PreTrainedModel, extra: Mapping[str, tuple[str, StoredTensor]]) -> tuple[str, ...]:
    """Notes on stored tensors that the model does not have; raises HalfplateError for those that would matter.

    extra: by stored name, the name after the renaming of transformers, and the tensor.
    """
    count, block = _numbered_blocks(model)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    buffers = {buffer for buffer, _ in model.named_buffers()}
    further = set(further_tensors(model, extra))
    groups: dict[str, list[str]] = {}
    wrong: list[str] = []
    beyond = -1
    for stored, (key, tensor) in extra.items():
        index = _layer_of(stored, block)
        if key in buffers or COMPUTED.search(stored) or (MASKS.search(stored) and len(tensor.shape) != 1):
            groups.setdefault("which the model computes itself", []).append(stored)
        elif stored in further:
            groups.setdefault(FURTHER, []).append(stored)
        elif any(rule.search(key) for rule in ignored):
            groups.setdefault("which transformers leaves out of the model", []).append(stored)
        elif stored.endswith("bias") and _all_zero(tensor):
            groups.setdefault("biases of zeros, which change nothing", []).append(stored)
        else:
            wrong.append(stored)
            beyond = max(beyond, index if index >= count else -1)
    if beyond >= 0:
        raise HalfplateError(
            f"model={name!r}: its files hold {beyond + 1} decoder layers, config.json says num_hidden_layers={count}; "
            "correct the number, or download the model again"
        )
    if wrong:
        raise HalfplateError(
            f"model={name!r}: its files hold {_spoken(wrong)}, which {type(model).__name__} with this config.json does not have; "
            f"{_cure(wrong)}"
        )
    return tuple(
        f"{'kept' if why == FURTHER else 'left out'}: {_spoken(group)}, {why}" for why, group in groups.items()
    )


def further_tensors(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of the stored `names` that predict further tokens and that the model does not have: they are kept as they are."""
    names = list(names)
    if not names:
        return []  # without asking for the state, for which every packed matrix is unpacked
    count, block = _numbered_blocks(model)
    beyond = range(count, count + _further_layers(model))
    state = model.state_dict(keep_vars=True)
    return [
        name
        for name in names
        if name not in state and (FURTHER_TOKENS.search(name) or _layer_of(name, block) in beyond)
    ]


def _layer_of(name: str, block: re.Pattern[str]) -> int:
    """The number of the layer in a stored name, -1 if it has none."""
    number = block.search(name)
    return int(number[1]) if number else -1


def _numbered_blocks(model: PreTrainedModel) -> tuple[int, re.Pattern[str]]:
    """The number of decoder layers, and a pattern that finds the layer number in a stored name; None if there are no layers."""
    try:
        prefix, blocks = find_blocks(model)
    except HalfplateError:
        return 0, re.compile(r"(?!)")
    return len(blocks), re.compile(r"(?:^|\.)" + re.escape(prefix.rpartition(".")[2]) + r"\.(\d{1,9})\.")


def _spoken(names: list[str]) -> str:
    shown = ", ".join(name[:120] for name in names[:NAMED_AT_ONCE])
    more = f" and {len(names) - NAMED_AT_ONCE} more" if len(names) > NAMED_AT_ONCE else ""
    return f"{shown}{more}"


def _cure(wrong: list[str]) -> str:
    if any(ADAPTER.search(one) for one in wrong):
        return "they belong to an adapter; merge it (peft: merge_and_unload, then save_pretrained) and pass that folder"
    biases = "if the model has biases, set attention_bias or mlp_bias in config.json; otherwise "
    return (
        f"without them it would be another model: {biases if any(one.endswith('.bias') for one in wrong) else ''}"
        "upgrade transformers or download the model again"
    )


def _further_layers(model: PreTrainedModel) -> int:
    """Layers after the last one that serve multi-token prediction, as counted by the configuration."""
    counts = (getattr(model.config.get_text_config(), key, None) for key in LAYER_COUNTS)
    return max((count for count in counts if isinstance(count, int)), default=0)


def _all_zero(stored: StoredTensor) -> bool:
    return stored.kind in KINDS and not bool(read_tensor(stored).count_nonzero())


def _check_prefix(name: str, missing: Collection[str], extra: list[str]) -> None:
    """Raise HalfplateError if all names match the model except for a prefix that a training tool has added."""
    for stored in extra[:1]:
        rest = stored
        while "." in rest:
            rest = rest.partition(".")[2]
            prefix = stored.removesuffix(rest)
            if rest in missing and all(one.startswith(prefix) for one in extra):
                raise HalfplateError(
                    f"model={name!r}: its files have {stored} instead of {rest}: a training tool has put {prefix!r} "
                    "before every name; save the inner model (peft: merge_and_unload, then save_pretrained) and pass that folder"
                )
