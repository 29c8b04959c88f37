"""What decides a recovery, checked when it is made."""

from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from halfplate.arguments import typed
from halfplate.errors import HalfplateError

VERSION = 1
TRAIN = ("wrappers", "all")
PRECISIONS = ("auto", "bf16", "fp32")
HELD_OUT = 8  # windows of the text that judge and are never trained on; fewer where it has few


@dataclass(frozen=True)
class Recovery:
    """tokens or minutes: how long, exactly one of them. train: wrappers alone, or kept values (scales on a grid) too.

    norms: train norms and biases as well. batch: sequences of a step, over all processes. square_head: weight of the feature
    loss, 0 for none. learning_rate: AdamW's at its
    highest, relative to the root mean square of each tensor. text: `self` (sampled from the teacher: `samples` sequences, by `seed`) or
    a text, of which all windows of `seq_len` tokens are used. precision: of the products; bf16 under `auto` if the processor multiplies it.
    Raises HalfplateError for values that cannot work.
    """

    tokens: int | None = None
    minutes: float | None = None
    train: str = "all"
    norms: bool = True
    text: str = "self"
    samples: int = 256
    seq_len: int = 512
    batch: int = 2
    learning_rate: float = 3e-4
    square_head: float = 0.0
    seed: int = 1
    precision: str = "auto"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            object.__setattr__(self, field.name, typed(field.name, getattr(self, field.name), hints[field.name]))
        if (self.tokens is None) == (self.minutes is None):
            raise HalfplateError(
                f"tokens={self.tokens}, minutes={self.minutes}: exactly one of them says how long to train; try --minutes 30"
            )
        for name, choices in (("train", TRAIN), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise HalfplateError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name, example in (("tokens", 100_000), ("minutes", 30), ("learning_rate", 3e-4)):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise HalfplateError(f"{name}={value} must be a finite number above 0; try {example}")
        for name, least in (("samples", 2), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise HalfplateError(f"{name}={getattr(self, name)} is too small; expected at least {least}")
            if getattr(self, name) >= 2**63:
                raise HalfplateError(f"{name}={getattr(self, name)} is too large; expected less than 2^63")
        if not 0 <= self.square_head < float("inf"):
            raise HalfplateError(f"square_head={self.square_head} is not a weight; try 1, or 0 for none")

    def to_json(self) -> dict[str, Any]:
        """All fields and the `version`."""
        return {"version": VERSION} | asdict(self)
