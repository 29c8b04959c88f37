"""Greedy tokens of a checkpoint by vLLM, as JSON: python serve_with_vllm.py FOLDER TENSOR_PARALLEL_SIZE 'PROMPTS, LISTS OF TOKENS'."""

import json
import sys


def main() -> None:
    # In the main function, because vLLM starts processes that import this file.
    from vllm import LLM, SamplingParams

    folder, ranks, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    model = LLM(folder, dtype="float32", enforce_eager=True, tensor_parallel_size=ranks, max_model_len=128)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":
    main()
