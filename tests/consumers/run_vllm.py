"""Runs in vLLM's environment: greedy tokens of an exported directory. `python run_vllm.py DIRECTORY IDS.json`"""

import json
import sys


def main(folder, ids_file):
    """Print one JSON line."""
    from vllm import LLM, SamplingParams

    with open(ids_file) as handle:
        ids = json.load(handle)
    llm = LLM(folder, trust_remote_code=True, dtype="float32", max_model_len=128, enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    result = llm.generate([{"prompt_token_ids": ids}], settings)[0].outputs[0]
    print("RESULT " + json.dumps(list(result.token_ids)))


if __name__ == "__main__":
    main(*sys.argv[1:])
