"""What each of two processes does for tests/test_parallel.py: started by `accelerate launch`, with a JSON of arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import evaluate_models
import llama3_unbalanced_pruning_gqa_aware as script
import test_finetuning
from LLMPruner import files, parallel
from LLMPruner.methods.moments import Moments
from LLMPruner.model.finished import FinishedLayers


def exchanged() -> dict:
    """What the module's functions give this process, of which the first has three rows and the second one."""
    rank = parallel.rank()
    rows = torch.arange(3.0 if rank == 0 else 1.0).unsqueeze(1) + 10 * rank
    told = torch.full((2, 2), float(rank), dtype=torch.bfloat16)
    found = {
        "share": [parallel.share(5).start, parallel.share(5).stop],
        "summed": parallel.summed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T * (rank + 1)).tolist(),
        "gathered": parallel.gathered(rows).tolist(),
        "flags": parallel.gathered(rows.flatten() > 0).tolist(),
        "least": parallel.least(7 - rank),
        "told": parallel.from_main(told).float().tolist(),
        "heard": parallel.from_main({"rank": rank}),
    }
    parallel.wait()
    return found


def pooled(few: bool) -> list:
    """Moments of 24 tokens, of which the first process sees 20; few: fewer than there are columns. Count, sums, tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(24, width, generator=generator) for width in (30 if few else 8, 3))
    mine = slice(0, 20) if parallel.main() else slice(20, 24)
    whole, moments = Moments(), Moments()
    whole.add(inputs, targets=targets)
    for part in (mine, slice(0, 0)):
        moments.add(inputs[part], targets=targets[part])
    moments.pool()
    kept = [each.tokens(slice(None)) for each in (whole, moments)]
    assert (kept[0] is None) == (kept[1] is None) == (not few)
    pairs = [(whole.mean, moments.mean), *([] if kept[0] is None else zip(*kept, strict=True))]
    pairs += [(whole.gram, moments.gram), (whole.cross, moments.cross)]
    return [moments.count, *((ours - theirs).abs().max().item() for ours, theirs in pairs)]


def interrupted(flags: list[str]) -> int:
    """The exit code of a run that dies after its second finished layer."""
    write, written = FinishedLayers.write, []

    def dies(self, *args):
        write(self, *args)
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt

    FinishedLayers.write = dies
    code = script.main(flags)
    FinishedLayers.write = write
    return code


def watch_writes() -> list[str]:
    """Names of what this process writes from now on."""
    sibling, written = files._sibling, []

    def watched(path, kind):
        written.append(path.name)
        return sibling(path, kind)

    files._sibling = watched
    return written


def work(asked: dict) -> dict:
    """All of it; the processes part once, at the end."""
    prune, leave, written = asked["prune"], parallel.leave, watch_writes()
    parallel.leave = lambda: None
    found = {"written": written, "exchanged": exchanged(), "few": pooled(True), "many": pooled(False)}
    found["evaluated"] = evaluate_models.main(asked["evaluate"])
    found["whole"] = script.main([*prune, "--save_ckpt_log_name=whole"])
    found["tuned"] = test_finetuning.main(asked["tune"])
    found["died"] = interrupted([*prune, "--stream=on", "--save_ckpt_log_name=died"])
    parallel.leave = leave
    return found | {"resumed": script.main([*prune, "--stream=on", "--resume", "--save_ckpt_log_name=died"])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer = work(json.loads(sys.argv[1]))
    Path(f"found{parallel.rank()}.json").write_text(json.dumps(answer))
