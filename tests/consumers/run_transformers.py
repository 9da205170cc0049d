"""Runs where this repository is not on the path: everything a user of transformers does with an exported directory.

python run_transformers.py DIRECTORY OUTPUT.pt   (prints one JSON line of facts, writes the tensors)
"""

import json
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The river rises in the mountains"


def load(folder, **options):
    """The model by its own code, weights aligned as torch aligns: mapped files are not, and kernels' last bits depend on it."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def tune_one_step(model, ids):
    """A LoRA step; the loss before and after, and the parameters that learned."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(2):
        loss = tuned(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, tuned.merge_and_unload()


def main(folder, output):
    """Load, run, generate, pad, cast, tune, save, reload."""
    assert not any("LLMPruner" in path for path in sys.modules), "the repository leaked in"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = load(folder, torch_dtype=torch.float32) if transformers.__version__ < "5" else load(folder, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = prompt["input_ids"]
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": [-1]}
    with torch.no_grad():
        logits = model(**prompt).logits
        cached = model.generate(**prompt, **settings)  # as a user passes it, with all that the tokenizer answers
        plain = model.generate(**prompt, use_cache=False, **settings)
        left = torch.nn.functional.pad(ids, (5, 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
        both, masks = torch.cat([left, left.flip(0)]), torch.cat([mask, mask])
        padded = model.generate(both, attention_mask=masks, **settings)
        low = load(folder, **{"torch_dtype" if transformers.__version__ < "5" else "dtype": torch.bfloat16})
        low_logits = low(input_ids=ids).logits
    cache = model(input_ids=ids, use_cache=True).past_key_values
    heads = [layer.keys.shape[1] for layer in cache.layers]
    losses, merged = tune_one_step(load(folder), ids)
    with tempfile.TemporaryDirectory() as again, torch.no_grad():
        merged.save_pretrained(again)
        saved = merged(input_ids=ids).logits
        reloaded = load(again)(**prompt).logits
    torch.save({"logits": logits, "generated": cached, "bfloat16": low_logits}, output)
    facts = {
        "transformers": transformers.__version__,
        "class": type(model).__name__,
        "tokens": ids[0].tolist(),
        "inputs": sorted(prompt),
        "cached equals plain": cached.equal(plain),
        "padded equals alone": padded[0, 5:].equal(cached[0]) and padded[1, 5:].equal(cached[0]),
        "kv heads": heads,
        "losses": losses,
        "reload error": (reloaded - saved).abs().max().item(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
