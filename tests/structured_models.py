"""What the tests of structured pruning share: models whose every dimension can shrink, and the result of a transform."""

import torch

from conftest import build_model
from halfplate.calibration import CalibrationTokens
from halfplate.compression.transforming import transformed
from halfplate.compression.work_folder import WorkFolder
from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.planning.transforming import plan_transforms
from halfplate.recipe import Recipe
from halfplate.telemetry.progress import silent

IDS = torch.arange(3, 27).reshape(2, 12)
# Heads, channels and hidden dimensions in several steps of 32.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
KINDS = [
    ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 16, "sliding_window": 5}),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}),
    ("qwen3", {"head_dim": 16}),
]


def saved(tokenizer, folder, architecture="llama", **options):
    """A model with random norms and biases as a source."""
    sizes = SIZES | ({} if architecture == "qwen2" else {"head_dim": 16})
    model = build_model(architecture, vocab_size=len(tokenizer), **(sizes | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                offset = 0.5 if name.endswith("norm.weight") else -0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + offset)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(str(folder))


def tokens(source, samples=10, length=12):
    """Calibration tokens; the last batch is smaller than the others."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, source.config.vocab_size, (samples, length), generator=generator)
    return CalibrationTokens(ids, "test", 0)


def pruned(source, place, name, keep, report=silent):
    """The result of a transform."""
    recipe = Recipe(
        transforms=[name], keep=keep, method="rtn", core_dtype="int8", pattern="dense", threads=1, precision="fp32"
    )
    _, steps = plan_transforms(source, recipe)
    return transformed(source, steps, recipe, WorkFolder(place), report, lambda streamed: tokens(source))[1]


def logits(source, ids=IDS):
    """Those of a source whose tensors can be read one by one."""
    with StreamedModel(source).running(held=True) as model, torch.no_grad():
        return model(ids, use_cache=False).logits


def hidden_states(source):
    """The inputs of every linear and norm of the whole model on the calibration text, (tokens, d) by module name."""
    model, found = load_dense(source).model, {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: found.update({name: (args[0], out)}))
        for name, module in model.named_modules()
        if name.endswith(("proj", "norm")) or "layernorm" in name
    ]
    with torch.no_grad():
        model(tokens(source).ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return model, {name: [part.double().flatten(0, 1) for part in parts] for name, parts in found.items()}


def kept_by_hand(scores, count):
    ranked = sorted(range(len(scores)), key=lambda unit: -scores[unit])
    return sorted(ranked[:count])
