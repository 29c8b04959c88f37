"""The drawings of docs/how-it-works.md: the form A · S · B, the sweep, and where the error goes.

    python benchmarks/explain_pictures.py

The first two are solved by Halfplate itself from a matrix of a fixed seed. The third is a real matrix: the query projection of a
block of stories260K (`HALFPLATE_SHARED` names the folder with models/stories260K; where it is missing the drawing stays as it is).
"""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import torch
from common import ROOT, SHARED
from torch import Tensor

from halfplate import methods
from halfplate.formats import InWrapper, OutWrapper, WeightSpec
from halfplate.statistics import InputStatistics

PICTURES = ROOT / "docs" / "pictures"
# Custom properties of the site win over these; shown as a file of its own, the drawing follows the system.
STYLE = """<style>
.halfplate { --i: var(--ink, #20242c); --s: var(--soft, #646a76); --r: var(--rule, #d9d5cb); --d: var(--data, #2f6d7e); --p: var(--pale, #d3dfe1); --w: var(--warm, #c8764d); font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.halfplate .t { fill: var(--i); } .halfplate .s { fill: var(--s); font-size: 12px; } .halfplate .big { fill: var(--i); font-size: 24px; } .halfplate .b { fill: var(--i); font-weight: 600; }
.halfplate .d { fill: var(--d); } .halfplate .w { fill: var(--w); } .halfplate .p { fill: var(--p); } .halfplate .f { fill: none; stroke: var(--r); } .halfplate .x { fill: none; stroke: var(--w); stroke-width: 2; }
.halfplate .ld { fill: none; stroke: var(--d); stroke-width: 2.5; } .halfplate .lw { fill: none; stroke: var(--w); stroke-width: 2.5; } .halfplate .ls { fill: none; stroke: var(--s); stroke-width: 2; stroke-dasharray: 5 4; }
%s</style>"""
ALONE = "@media (prefers-color-scheme: dark) { .halfplate { --i: var(--ink, #e6e4de); --s: var(--soft, #9a9fa9); --r: var(--rule, #3a414b); --d: var(--data, #74b6c6); --p: var(--pale, #33424a); --w: var(--warm, #e0a26d); } }\n"


def drawing(width: int, height: int, parts: Iterable[str]) -> str:
    """An SVG document; its class marks it as one that the site puts into the page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="halfplate" viewBox="0 0 {width} {height}">'
    return "\n".join([head, STYLE % ALONE, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, kind: str = "t", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def cells(values: Tensor, x: float, y: float, size: float, kind: str = "d") -> list[str]:
    """Squares as dark as the values are large; nothing where they are 0, and a frame."""
    rows, columns = values.shape
    shade = values.abs() / values.abs().max()
    squares = [
        f'<rect class="{kind}" x="{x + j * size:g}" y="{y + i * size:g}" width="{size - 0.8:g}" height="{size - 0.8:g}" opacity="{0.15 + 0.85 * shade[i, j].item():.2f}"/>'
        for i in range(rows)
        for j in range(columns)
        if values[i, j] != 0
    ]
    return [
        *squares,
        f'<rect class="f" x="{x - 1.5:g}" y="{y - 1.5:g}" width="{columns * size + 2:g}" height="{rows * size + 2:g}" rx="2"/>',
    ]


def form() -> str:
    """W ≈ A · S · B of a 16 × 16 matrix, with blocks of 4."""
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(16, 5, generator=generator) for _ in range(2)]
    weight = factors[0] @ factors[1].T / 2 + 0.6 * torch.randn(16, 16, generator=generator)
    inputs = torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    statistics = InputStatistics(400, inputs.square().mean(0), inputs.T @ inputs / 400)
    spec = WeightSpec(16, 16, core_dtype="fp32", wrapper_dtype="fp32", out_block=4, in_block=4)
    chain = methods.create("armor").compress(weight, statistics, spec).weight
    left, right = chain.part(OutWrapper), chain.part(InWrapper)
    assert left is not None
    assert right is not None
    parts, size, top = [], 9.5, 40
    for x, values, kind, name, words in (
        (10, weight, "d", "W", "dense: d × d values"),
        (206, left.dense(), "w", "A", "blocks: d · b values"),
        (390, chain.core.dense(), "d", "S", "2 of every 4 inputs kept"),
        (574, right.dense(), "w", "B", "blocks: d · b values"),
    ):
        parts += [
            *cells(values, x, top, size, kind),
            text(x + 76, 24, name, "b", "middle"),
            text(x + 76, 218, words, "s", "middle"),
        ]
    parts += [text(x, 124, sign, "big", "middle") for x, sign in ((184, "≈"), (374, "·"), (558, "·"))]
    return drawing(736, 232, parts)


def sweep() -> str:
    """One group of one row: its six masks, the gain of each, and what the change moves."""
    generator = torch.Generator().manual_seed(11)
    core = torch.randn(8, 16, generator=generator)
    ranks = core.abs().view(8, 4, 4).argsort(-1, descending=True).argsort(-1)
    core = torch.where(ranks < 2, core.view(8, 4, 4), 0.0).view(8, 16)
    row, group, size = 3, 1, 17
    parts = cells(core, 10, 44, size)
    parts.append(
        f'<rect class="x" x="{9 + group * 4 * size}" y="{43 + row * size}" width="{4 * size + 1}" height="{size + 1}" rx="3"/>'
    )
    parts.append(
        f'<rect class="w" opacity=".13" x="{10 + (group + 1) * 4 * size}" y="{44 + row * size}" width="{2 * 4 * size}" height="{size}"/>'
    )
    parts.append(
        f'<rect class="w" opacity=".13" x="10" y="{44 + (row + 1) * size}" width="{16 * size}" height="{4 * size}"/>'
    )
    parts += [
        text(10, 24, "a row of the core, group after group", "b"),
        text(10, 204, "a change moves the error of what is shaded,", "s"),
    ]
    parts.append(text(10, 221, "at once, before its turn comes", "s"))
    mixed = torch.randn(4, 6, generator=generator)
    c, q = mixed @ mixed.T / 6, torch.randn(4, generator=generator)
    gains = {}
    for mask in combinations(range(4), 2):
        kept = list(mask)
        v = torch.linalg.solve(c[kept][:, kept], q[kept])
        gains[mask] = (2 * q[kept] @ v - v @ c[kept][:, kept] @ v).item()
    best = max(gains.values())
    parts += [text(340, 24, "its six masks, each with its best two values", "b")]
    for k, (mask, gain) in enumerate(gains.items()):
        y = 44 + 24 * k
        kept_here = torch.tensor([[1.0 if j in mask else 0.0 for j in range(4)]])
        kind = "w" if gain == best else "d"
        parts += cells(kept_here, 340, y, size, kind)
        parts.append(
            f'<rect class="{kind}" x="424" y="{y + 3}" width="{210 * gain / best:.1f}" height="11" rx="2" opacity="{1 if gain == best else 0.45}"/>'
        )
        if gain == best:
            parts.append(text(424 + 210 + 10, y + 13, "taken", "b"))
    parts.append(text(424, 204, "how much the loss falls", "s"))
    return drawing(736, 232, parts)


def error(model_folder: Path) -> str:
    """The error of each method along the directions of the inputs, from the strongest to the weakest."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    linear = model.model.layers[2].self_attn.q_proj
    torch.manual_seed(0)
    tokens = model.generate(torch.ones(64, 1, dtype=torch.long), do_sample=True, max_new_tokens=255, min_new_tokens=255)
    seen: list[Tensor] = []
    handle = linear.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    x = torch.cat(seen)
    gram = (x.T @ x / len(x)).double()
    statistics = InputStatistics(len(x), gram.diagonal().float(), gram.float())
    weight = linear.weight.detach()
    strengths, directions = torch.linalg.eigh(gram)
    strengths, directions = strengths.flip(0), directions.flip(1)
    width, height, left, top = 736, 330, 62, 44

    def curve(values: Tensor) -> str:
        # Shares of 1e-4 to 3, on a logarithmic scale.
        steps = (values.clamp_min(1e-4).log10() + 4) / 4.5
        return " ".join(
            f"{left + 640 * k / (len(values) - 1):.1f},{top + 220 * (1 - step):.1f}"
            for k, step in enumerate(steps.tolist())
        )

    parts = [
        text(left, 20, "error of the outputs along each direction of the inputs, as a share of the output there", "b")
    ]
    for exponent in range(-4, 1):
        y = top + 220 * (1 - (exponent + 4) / 4.5)
        words = {0: "1", -1: "0.1", -2: "0.01", -3: "0.001", -4: "0.0001"}[exponent]
        parts += [f'<path class="f" d="M{left} {y:.1f}h640"/>', text(left - 8, y + 4, words, "s", "end")]
    totals = []
    for name, kind, block in (("wanda", "ls", 0), ("sparsegpt", "lw", 0), ("armor", "ld", 4)):
        spec = WeightSpec(*weight.shape, core_dtype="fp32", wrapper_dtype="fp32", out_block=block, in_block=block)
        found = methods.create(name).compress(weight, statistics, spec).weight.dense()
        wrong = (weight - found).double()
        share = (wrong @ directions).square().sum(0) / (weight.double() @ directions).square().sum(0)
        parts.append(f'<polyline class="{kind}" points="{curve(share)}"/>')
        whole = (torch.trace(wrong @ gram @ wrong.T) / torch.trace(weight.double() @ gram @ weight.double().T)).item()
        totals.append((name, kind, whole))
    parts += [text(left, 284, "strongest direction", "s"), text(left + 640, 284, "weakest", "s", "end")]
    for k, (name, kind, whole) in enumerate(totals):
        label = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "armor": "ARMOR, blocks of 4"}[name]
        x0 = left + (0, 190, 400)[k]
        parts += [f'<path class="{kind}" d="M{x0} 308h26"/>', text(x0 + 34, 312, f"{label}: {whole:.4f} in all")]
        print(f"{label}: relative output error {whole:.5f}")
    print(
        f"half of the energy of the inputs lies in {int((strengths.cumsum(0) < strengths.sum() / 2).sum()) + 1} of {len(strengths)} directions"
    )
    return drawing(width, height, parts)


def main() -> None:
    torch.set_num_threads(1)
    (PICTURES / "form.svg").write_text(form())
    (PICTURES / "sweep.svg").write_text(sweep())
    stories = SHARED / "models" / "stories260K"
    if stories.exists():
        (PICTURES / "error.svg").write_text(error(stories))


if __name__ == "__main__":
    main()
