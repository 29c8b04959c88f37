"""A plugin for vLLM: checkpoints of Halfplate are served by its own kernels, on CPUs.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes. Nothing here imports vLLM before.
"""


def register() -> None:
    """Let vLLM know the quantization method `halfplate`; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from halfplate.checkpoint.config import METHOD
    from halfplate.integrations.vllm.config import HalfplateVllmConfig

    register_quantization_config(METHOD)(HalfplateVllmConfig)
