"""Products of other libraries, for benchmarks/linears.py: ONNX Runtime, ggml through llama-cpp-python, torchao, aten.

Each function makes `copies` weights of one shape and returns a `Graph`: for a batch and a number of products, a function
that does at least so many, each with another weight, and returns how many. Weights are random, of the same bytes as real
ones. A library that is not installed raises ImportError.
"""

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

Graph = Callable[[int, int], Callable[[], int]]

GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
GGML_BLOCK = {"f16": (1, 2), "q4_0": (32, 18), "q8_0": (32, 34), "bf16": (1, 2)}


def onnxruntime_graph(kind: str, d_out: int, d_in: int, copies: int, threads: int) -> Graph:
    """kind: `fp32`, `int8` (activations quantised on the fly), `nbits8` or `nbits4` (blocks of 128, int8 arithmetic)."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights = [], []
    for number in range(copies):
        names = [f"weight{number}", f"scale{number}"]
        if kind == "fp32":
            arrays = [random.standard_normal((d_in, d_out), dtype=np.float32)]
            node = ("MatMul", {})
        elif kind == "int8":
            arrays = [random.integers(-127, 128, (d_in, d_out), dtype=np.int8), np.full(1, 0.01, np.float32)]
            node = ("DynamicQuantizeMatMul", {"domain": "com.microsoft"})
        else:
            bits, blocks = int(kind[-1]), -(-d_in // 128)
            arrays = [
                random.integers(0, 256, (d_out, blocks, 128 * bits // 8), dtype=np.uint8),
                np.full(d_out * blocks, 0.01, np.float32),
            ]
            sizes = {"K": d_in, "N": d_out, "bits": bits, "block_size": 128, "accuracy_level": 4}
            node = ("MatMulNBits", {"domain": "com.microsoft", **sizes})
        weights += [numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=False)]
        nodes.append(helper.make_node(node[0], ["x", *names[: len(arrays)]], [f"y{number}"], **node[1]))
    outputs = [helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, None) for number in range(copies)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", d_in])
    graph = helper.make_graph(nodes, "products", [x], outputs, weights)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def for_batch(batch: int, calls: int) -> Callable[[], int]:
        feed = {"x": random.standard_normal((batch, d_in), dtype=np.float32)}
        # A session runs its whole graph.
        return lambda: len(session.run(None, feed))

    return for_batch


class _InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Ggml:
    """What is used of the libraries of ggml that llama-cpp-python brings."""

    REPACK = "_Z35ggml_backend_cpu_repack_buffer_typev"

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        self._libraries = [
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so")
        ]
        self.call("ggml_cpu_init", None)
        self.quiet()

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        library = next(library for library in self._libraries if hasattr(library, name))
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    def quiet(self) -> None:
        """Take away what it says of every tensor it repacks."""
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.call("ggml_log_set", None, self._silence, None)

    def context(self, size: int, no_alloc: bool) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.call("ggml_init", ctypes.c_void_p, _InitParams(size, None, no_alloc)))

    def matrix(self, context: ctypes.c_void_p, kind: str, columns: int, rows: int) -> ctypes.c_void_p:
        sizes = (ctypes.c_int64(columns), ctypes.c_int64(rows))
        return ctypes.c_void_p(
            self.call("ggml_new_tensor_2d", ctypes.c_void_p, context, ctypes.c_int(GGML_TYPES[kind]), *sizes)
        )


@cache
def _ggml() -> _Ggml:
    return _Ggml()


def ggml_graph(kind: str, d_out: int, d_in: int, copies: int, threads: int) -> Graph:
    """kind: `f16`, `bf16`, `q8_0`, `q4_0`, or `q4_0 repacked`, the layout in which llama.cpp holds q4_0 where it can."""
    ggml = _ggml()
    stored, _, repacked = kind.partition(" ")
    weights = ggml.context((copies + 8) * 1024, True)
    matrices = [ggml.matrix(weights, stored, d_in, d_out) for _ in range(copies)]
    # Weights in plain memory are those of a computing context; repacking is done by a buffer type of its own.
    place = ggml.call(_Ggml.REPACK if repacked else "ggml_backend_cpu_buffer_type", ctypes.c_void_p)
    allocated = ggml.call("ggml_backend_alloc_ctx_tensors_from_buft", ctypes.c_void_p, weights, ctypes.c_void_p(place))
    if not allocated:
        raise RuntimeError(f"ggml cannot hold {copies} matrices of {kind}")
    data = _ggml_bytes(stored, d_out, d_in)
    for matrix in matrices:
        ggml.call(
            "ggml_backend_tensor_set", None, matrix, data.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(0), ctypes.c_size_t(data.nbytes),
        )  # fmt: skip
    backend = ctypes.c_void_p(ggml.call("ggml_backend_cpu_init", ctypes.c_void_p))
    ggml.call("ggml_backend_cpu_set_n_threads", None, backend, ctypes.c_int(threads))

    def for_batch(batch: int, calls: int) -> Callable[[], int]:
        room = 4 * batch * (d_in + calls * d_out) + (calls + 8) * 2048 + 2**20
        context = ggml.context(room, False)
        x = ggml.matrix(context, "f32", d_in, batch)
        values = np.random.default_rng(0).standard_normal((batch, d_in), dtype=np.float32)
        ctypes.memmove(ggml.call("ggml_get_data", ctypes.c_void_p, x), values.ctypes.data, values.nbytes)
        graph = ctypes.c_void_p(
            ggml.call(
                "ggml_new_graph_custom", ctypes.c_void_p, context, ctypes.c_size_t(calls + 8), ctypes.c_bool(False)
            )
        )
        for matrix in matrices[:calls]:
            product = ctypes.c_void_p(ggml.call("ggml_mul_mat", ctypes.c_void_p, context, matrix, x))
            ggml.call("ggml_build_forward_expand", None, graph, product)

        def run() -> int:
            failed = ggml.call("ggml_backend_graph_compute", ctypes.c_int, backend, graph)
            if failed:
                raise RuntimeError(f"ggml failed with {failed}")
            return calls

        # The graph lives in the context, which goes with the function.
        weakref.finalize(run, ggml.call, "ggml_free", None, context)
        return run

    return for_batch


def _ggml_bytes(kind: str, d_out: int, d_in: int) -> Any:
    """Bytes of a random matrix of `kind` as ggml stores it; every block has a scale that is a small number."""
    width, size = GGML_BLOCK[kind]
    data = np.random.default_rng(0).integers(0, 256, (d_out * d_in // width, size), dtype=np.uint8)
    if width > 1:
        data[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    else:
        data[:, 1] = 0x3C  # about 1 as fp16, about 0.01 as bf16
    return data


def torchao_graph(d_out: int, d_in: int, copies: int) -> Graph:
    """Int8WeightOnly of torchao, compiled, with bf16 activations."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linears = [_bf16_linear(d_out, d_in) for _ in range(copies)]
    for linear in linears:
        quantize_(linear, Int8WeightOnlyConfig())
    return _compiled([linear.weight for linear in linears], d_in)


def compiled_graph(d_out: int, d_in: int, copies: int) -> Graph:
    """bf16 linears through torch.compile."""
    return _compiled([_bf16_linear(d_out, d_in).weight for _ in range(copies)], d_in)


def _bf16_linear(d_out: int, d_in: int) -> torch.nn.Linear:
    return torch.nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16).requires_grad_(False)


def _compiled(weights: list[Any], d_in: int) -> Graph:
    # One compiled function for all copies: the weight is an argument.
    linear = torch.compile(lambda x, weight: torch.nn.functional.linear(x, weight), dynamic=False)
    return loop(linear, weights, d_in, torch.bfloat16)


def aten_graph(kind: str, d_out: int, d_in: int, copies: int) -> Graph:
    """The operators of torch that its quantisation uses on processors: `int8` or `int4` (groups of 128, or 64 where that does not divide), bf16 inputs."""
    if kind == "int8":
        weights = [torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8) for _ in range(copies)]
        scales = torch.full((d_out,), 0.01, dtype=torch.bfloat16)
        return loop(lambda x, weight: torch._weight_int8pack_mm(x, weight, scales), weights, d_in, torch.bfloat16)
    codes = torch.randint(0, 16, (d_out, d_in), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    group = 128 if d_in % 128 == 0 else 64
    pairs = torch.full((d_in // group, d_out, 2), 0.01, dtype=torch.bfloat16)
    return loop(
        lambda x, weight: torch._weight_int4pack_mm_for_cpu(x, weight, group, pairs),
        [packed.clone() for _ in range(copies)],
        d_in,
        torch.bfloat16,
    )


def loop(multiply: Callable[[Any, Any], Any], weights: list[Any], d_in: int, dtype: torch.dtype) -> Graph:
    """Products one call at a time; each run goes on with the weights after those of the last."""

    def for_batch(batch: int, calls: int) -> Callable[[], int]:
        x = torch.randn(batch, d_in).to(dtype)
        order = cycle(weights)

        def run() -> int:
            for weight in islice(order, calls):
                multiply(x, weight)
            return calls

        return run

    return for_batch


class LlamaCpp:
    """A GGUF model in llama.cpp, on the processor alone, decoding greedily without its sampler."""

    def __init__(self, path: Path, threads: int, context: int = 512, sequences: int = 1) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.nbytes = int(llama_cpp.llama_model_size(self._model))

    def __call__(self, ids: Any, new_tokens: int, first: Callable[[], None]) -> None:
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        token = self._decode(ids[0].tolist())
        first()
        for _ in range(new_tokens - 1):
            token = self._decode([token])

    def continued(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The next tokens after those of `prompt`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        found = [self._decode(prompt)]
        while len(found) < new_tokens:
            found.append(self._decode(found[-1:]))
        return found

    def _decode(self, tokens: list[int]) -> int:
        """The most likely token after `tokens`."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp failed to decode")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
