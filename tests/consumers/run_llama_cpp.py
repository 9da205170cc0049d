"""Runs in llama-cpp-python's environment: tokens, logits and greedy continuation of a GGUF, as JSON and .npy.

python run_llama_cpp.py MODEL.gguf JOB.json OUTPUT_PREFIX
"""

import json
import sys

import numpy
from llama_cpp import GGML_TYPE_F32, Llama


def main(model: str, job_file: str, prefix: str) -> None:
    """`job`: text (to tokenize), ids (to evaluate), new_tokens."""
    with open(job_file) as handle:
        job = json.load(handle)
    llm = Llama(model, n_ctx=256, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)
    tokens = llm.tokenize(job["text"].encode(), add_bos=True, special=True)
    llm.eval(job["ids"])
    numpy.save(prefix + ".npy", numpy.array(llm.scores[: len(job["ids"])]))
    ids = list(job["ids"])
    for _ in range(job["new_tokens"]):
        ids.append(int(llm.scores[len(ids) - 1].argmax()))
        llm.eval(ids[-1:])
    result = {"tokens": tokens, "greedy": ids[len(job["ids"]) :], "metadata": llm.metadata}
    if "messages" in job:
        answer = llm.create_chat_completion(job["messages"], max_tokens=8, temperature=0)
        result["chat"] = answer["choices"][0]["message"]["content"]
    with open(prefix + ".json", "w") as handle:
        json.dump(result, handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
