"""Halfplate inside lm-eval: the model type `halfplate`, and the command line of lm-eval with this type registered.

lm-eval finds models only in its registry and has no entry points, so its command `lm_eval` never imports Halfplate.
`python -m halfplate.evaluation.harness` is the same command after `import halfplate`.
"""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from halfplate.checkpoint.loading import load_any


class HalfplateLM(HFLM):
    """A Halfplate checkpoint or an original model, in fp32 on the fastest path, as in `halfplate eval --tasks`.

    pretrained: folder, Hub id or `.gguf` file.
    activations: as in `halfplate.load`.
    Other arguments are those of lm-eval's `hf`. Raises HalfplateError if the model cannot be loaded.
    """

    def __init__(self, pretrained: str, activations: str = "auto", device: str | None = None, **kwargs: Any) -> None:
        # lm-eval requests a GPU by default.
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cpu"
        model, tokenizer = load_any(pretrained, device, activations)
        super().__init__(pretrained=model, tokenizer=tokenizer, **kwargs)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
