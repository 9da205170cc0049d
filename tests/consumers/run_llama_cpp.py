"""Runs in llama-cpp-python's environment: tokens and logits of prompts and a greedy continuation by a GGUF, as JSON and .npz.

python run_llama_cpp.py MODEL.gguf JOB.json OUTPUT_PREFIX
"""

import json
import sys

import numpy
from llama_cpp import GGML_TYPE_F32, Llama


def main(model: str, job_file: str, prefix: str) -> None:
    """`job`: texts (to tokenize), ids (of each, to evaluate), new_tokens (to add to the first)."""
    with open(job_file) as handle:
        job = json.load(handle)
    llm = Llama(model, n_ctx=256, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)
    tokens = [llm.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
    logits = []
    for ids in reversed(job["ids"]):  # the first one last: it goes on
        llm.reset()
        llm.eval(ids)
        logits.insert(0, numpy.array(llm.scores[: len(ids)]))
    numpy.savez(prefix + ".npz", *logits)
    ids = list(job["ids"][0])
    for _ in range(job["new_tokens"]):
        ids.append(int(llm.scores[len(ids) - 1].argmax()))
        llm.eval(ids[-1:])
    result = {"tokens": tokens, "greedy": ids[len(job["ids"][0]) :], "metadata": llm.metadata}
    if "messages" in job:
        answer = llm.create_chat_completion(job["messages"], max_tokens=8, temperature=0)
        result["chat"] = answer["choices"][0]["message"]["content"]
    with open(prefix + ".json", "w") as handle:
        json.dump(result, handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
