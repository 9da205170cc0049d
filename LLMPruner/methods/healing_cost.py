"""What slicing, healing and distilling cost (apply.py, moments.py, repair.py, block_distill.py), without torch."""

from __future__ import annotations

from dataclasses import replace

from LLMPruner.cost import BATCH_TOKENS, Cost, Setup, Work
from LLMPruner.methods.repair import REPAIRS, RIDGES

BLOCK, STRIDE = 5, 2  # as block_distill.py, which imports torch: a test holds them together


def cost(setup: Setup, repair: str, windows: int, seq_len: int, *, epochs: int = 0, model_epochs: int = 0) -> Cost:
    """What slicing and healing costs, distillation of blocks included, as if every sublayer lost the same share.

    Two streams pass each layer, the dense one and the pruned one; what of this enters an output projection is kept for the
    healed one. Rough: layers before the first that loses something are cheaper; distillation of the whole model is that of a
    single large block.
    """
    method, layers, tokens = REPAIRS[repair], setup.geometry.num_layers, setup.mine(windows) * seq_len
    written, name = layers * setup.layer_bytes(pruned=True), f"apply (repair {repair})"
    total = Cost(name, device=2 * setup.layer_bytes(), passes=1, written=written, temporary=written)
    if method is None:
        return total
    work = setup.forward(2 * tokens, seq_len)
    columns, hidden, batch = setup.columns(pruned=False), setup.geometry.hidden_size, setup.batch(setup.mine(windows), seq_len)
    left = setup.columns(pruned=True)
    work += Work(matmul=2 * layers * tokens * hidden * (sum(left) - sum(columns)))
    work += Work(traffic=layers * tokens * (6 * setup.itemsize * sum(columns) + method.solves * 240 * hidden))
    device = setup.activations(batch) + batch * 4 * 8 * hidden
    if method.solves:
        pairs = zip(columns, left, strict=True)
        solved = [solving(setup, width, kept, setup.mine(windows) * seq_len) for width, kept in pairs]
        work += sum((part for part, _ in solved), start=Work()) * layers
        device = max(device + min(needed for _, needed in solved), *(needed for _, needed in solved))
    states, passes = 4, 1
    for size, times in ((BLOCK, epochs), (layers, model_epochs)):
        if times:
            learned, needed = distilling(setup, min(size, layers), tokens, seq_len, times)
            work, device, states, passes = work + learned, max(device, needed), 5, passes + 1
    hidden = setup.hidden(tokens, states) + tokens * max(left) * setup.itemsize
    return replace(total, work=work, device=device, hidden=hidden, passes=passes, head=epochs > 0)


def solving(setup: Setup, columns: int, kept: int, tokens: int) -> tuple[Work, int]:
    """FLOPs and bytes of `least_squares` for one sublayer, moments included: five ridges in float32, the last in float64."""
    hidden, held = setup.geometry.hidden_size, tokens // 4
    seen = held if held < kept else kept  # what the held-out windows see of a solution: their tokens, or its columns
    products = (tokens - held + (held >= kept) * held) * (columns + 2 * hidden) + held * (columns + kept + hidden)
    single = hidden * columns + 2 * hidden * seen + len(RIDGES) * (kept * seen if seen < kept else 3 * hidden * kept)
    single += 3 * len(RIDGES) * hidden * seen
    double = 2 * kept * (hidden * columns + hidden * kept) + kept**3 // 3
    work = Work(product=2 * kept * products, single=2 * kept * single, factor=len(RIDGES) * kept**3 // 3, double=double)
    sums, row = 4 * kept * (columns + 2 * hidden), columns * setup.itemsize + 8 * hidden
    waiting = held * row if held < kept else sums
    gathered = waiting + (min(tokens - held, kept) * row if tokens - held < kept else sums)
    solved = 4 * (2 * hidden * kept + kept**2 + 5 * hidden * seen + (2 * kept * seen if seen < kept else 0))
    return work, max(
        gathered + 4 * min(tokens, BATCH_TOKENS) * (columns + kept), waiting + sums + max(solved, 8 * kept * (kept + hidden))
    )


def distilling(setup: Setup, layers: int, tokens: int, seq_len: int, epochs: int) -> tuple[Work, int]:
    """Work of all blocks, and bytes of one of `layers` layers, that learn: rough, for a layer that lost nothing is not trained.

    A step is one window: forward, back to the weights and to the inputs, and Adam, which reads and writes 40 bytes a
    parameter. Of the last block every `STRIDE`th token goes through the head twice forward and once back.
    """
    params = layers * setup.layer_params(pruned=True)
    fitted = tokens * 3 // 4 * epochs
    once = setup.forward(fitted, seq_len, pruned=True)
    adam = Work(traffic=40 * setup.geometry.num_layers * setup.layer_params(pruned=True)) * (fitted // seq_len)
    head = setup.head_work(fitted // STRIDE) + setup.head_work(fitted // STRIDE, gradient=True)
    activations = layers * setup.activations(seq_len, gradient=True)
    back = replace(once * 2, matmul=0, back=2 * once.matmul)
    size = 16 if setup.itemsize == 4 else 20  # a float32 copy, its gradient, two moments, and copies in half precision
    return once + back + adam + head, size * params + activations + setup.logits(seq_len, gradient=True)
