"""Follow a compression in TensorBoard. Any experiment tracker works: it is a function that is called at every step.

pip install tensorboard
python examples/track_with_tensorboard.py MODEL OUT runs/first --block-size 16
tensorboard --logdir runs
"""

import argparse
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

import halfplate
from halfplate.recipe import Recipe


class TensorBoard:
    """A report (`halfplate.telemetry.progress.Report`) that draws the figures of every matrix."""

    def __init__(self, folder: str) -> None:
        self.writer = SummaryWriter(folder)
        self.matrices = 0

    def __call__(
        self,
        phase: str,
        done: int,
        total: int,
        note: str = "",
        share: float | None = None,
        facts: Mapping[str, Any] = {},
    ) -> None:
        if facts.get("event") == "plan":
            recipe = "\n".join(f"    {key}: {value}" for key, value in facts["recipe"].items())
            self.writer.add_text("recipe", recipe)
        elif facts.get("event") == "matrix":
            kind = facts["name"].rpartition(".")[2]
            self.writer.add_scalar(f"relative error/{kind}", facts["relative_error"], facts["block"])
            self.writer.add_scalar(f"seconds/{kind}", facts["seconds"], facts["block"])
            self.matrices += 1
            if "loss" in facts:
                self.writer.add_scalar(
                    "solver loss, last over first", facts["loss"] / facts["first_loss"], self.matrices
                )
        elif facts.get("event") == "end":
            for name, seconds in facts["seconds"].items():
                self.writer.add_scalar(f"seconds of the run/{name}", seconds)
            self.writer.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("runs", help="folder for TensorBoard")
    parser.add_argument("--block-size", default="auto")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    recipe = Recipe(block_size=options.block_size, samples=options.samples, seq_len=options.seq_len)
    halfplate.compress(options.model, options.out, recipe, report=TensorBoard(options.runs))


if __name__ == "__main__":
    main()
