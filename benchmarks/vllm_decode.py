"""Decoding speed of model folders in vLLM, at one and at many requests, and their greedy tokens against transformers with Halfplate.

    VLLM_CPU_OMP_THREADS_BIND=0-1 python benchmarks/vllm_decode.py FOLDER … [--batches 1 16] [--new-tokens 64] [--dtype bfloat16]
    python benchmarks/vllm_decode.py --compare FOLDER …

Run it in an environment of vLLM (docs/vllm.md). Each figure is the best of three runs; the load of the machine is printed beside it.
"""

import argparse
import gc
import os
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def speed(folder: str, args: argparse.Namespace) -> None:
    """Print the tokens per second of one model."""
    from vllm import LLM, SamplingParams

    longest, clock = max(args.batches), time.process_time if args.cpu else time.perf_counter
    model = LLM(folder, dtype=args.dtype, enforce_eager=args.eager, max_model_len=512, max_num_seqs=longest)
    for batch in args.batches:
        prompts = [
            {"prompt_token_ids": [1 + (7 * number + place) % 200 for place in range(16)]} for number in range(batch)
        ]
        seconds = {}
        for count in (1, 1 + args.new_tokens):  # the difference is decoding alone
            wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            model.generate(prompts, wanted, use_tqdm=False)
            times = []
            for _ in range(3):
                start = clock()
                model.generate(prompts, wanted, use_tqdm=False)
                times.append(clock() - start)
            seconds[count] = min(times)
        rate = batch * args.new_tokens / (seconds[1 + args.new_tokens] - seconds[1])
        print(f"SPEED {folder} batch {batch}: {rate:.1f} tokens/s, load {os.getloadavg()[0]:.1f}", flush=True)


def compare(folder: str, args: argparse.Namespace) -> None:
    """Print how many prompts have the same greedy tokens in vLLM and in transformers with Halfplate, both in fp32."""
    os.environ["HALFPLATE_ACTIVATIONS"] = "float"  # else the tokens depend on how many requests run together
    import torch
    from common import PROMPTS
    from vllm import LLM, SamplingParams

    import halfplate
    from halfplate.checkpoint.read import load_tokenizer

    tokenizer, model, expected = load_tokenizer(folder), halfplate.load(folder, activations="float"), []
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for prompt in prompts:
        ids = torch.tensor([prompt], dtype=torch.int64, device="cpu")
        wanted = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected.append(model.generate(ids, attention_mask=torch.ones_like(ids), **wanted)[0, len(prompt) :].tolist())
    served = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=len(prompts))
    greedy = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True, detokenize=False)
    answers = served.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    found = [list(answer.outputs[0].token_ids) for answer in answers]
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    for prompt, one, other in zip(prompts, found, expected, strict=True):
        if one != other:
            first = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
            ids = torch.tensor([[*prompt, *other[:first]]], dtype=torch.int64, device="cpu")
            with torch.inference_mode():
                logits = model(ids).logits[0, -1]
            gap = float(logits[other[first]] - logits[one[first]])
            print(f"GAP {folder}: token {first} differs, where the two logits differ by {gap:.2g}", flush=True)
    print(f"TEXT {folder}: {same} of {len(prompts)} prompts have the same {args.new_tokens} tokens", flush=True)


def main() -> None:
    """Measure or compare the folders of the command line, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument(
        "--cpu", action="store_true", help="count seconds of the processor, on one thread of a busy machine"
    )
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    for folder in args.folders:
        (compare if args.compare else speed)(folder, args)
        gc.collect()


if __name__ == "__main__":
    main()
