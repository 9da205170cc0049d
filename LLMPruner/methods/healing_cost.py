"""What slicing, healing and distilling cost (apply.py, moments.py, repair.py, block_distill.py), without torch."""

from __future__ import annotations

from dataclasses import astuple, replace

from LLMPruner.cost import BATCH_TOKENS, Cost, Setup, Work
from LLMPruner.methods.repair import REPAIRS, RIDGES

BLOCK, STRIDE = 5, 4  # as block_distill.py, which imports torch: a test holds them together


def cost(
    setup: Setup, repair: str, windows: int, seq_len: int, *, epochs: int = 0, model_epochs: int = 0, last: int | None = None
) -> Cost:
    """What slicing and healing costs, distillation included, as if every sublayer lost the same share.

    Two streams pass each layer, the dense one and the pruned one; what of this enters an output projection is kept for the
    healed one. Rough: layers before the first that loses something are cheaper.
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
    learning = 0
    last, blocks = min(last or layers, layers), layers - min(BLOCK, layers) * (model_epochs > 0)
    taught = ((blocks, min(BLOCK, blocks), epochs, False), (last, last, model_epochs, True))
    for count, together, times, outputs_only in taught:
        if times and count:
            learned = distilling(setup, count, tokens, seq_len, times, together=together, outputs_only=outputs_only)
            work, learning = work + learned[0], max(learning, learned[1])
    if model_epochs:
        rows = tokens * 3 // 4 * model_epochs // STRIDE
        work += setup.head_work(rows) + setup.head_work(rows, gradient=True)
        learning += setup.logits(seq_len, gradient=True)
    passes = 1 + (epochs > 0) + (model_epochs > 0)
    hidden = setup.hidden(tokens, 4 + (learning > 0)) + tokens * max(left) * setup.itemsize
    device = max(device, learning)
    return replace(total, work=work, device=device, learning=learning, hidden=hidden, passes=passes, head=model_epochs > 0)


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


def distilling(
    setup: Setup, layers: int, tokens: int, seq_len: int, epochs: int, *, together: int, outputs_only: bool
) -> tuple[Work, int]:
    """Work of `layers` that learn, and bytes of so many `together`: rough, for a layer that lost nothing is not trained.

    A step is one window: forward, back to the weights and to the inputs, and Adam, which reads and writes 40 bytes a
    parameter. What goes through the head, every `STRIDE`th token, twice forward and once back, is not in it.
    """
    every, outputs = setup.layer_params(pruned=True), setup.geometry.hidden_size * sum(setup.columns(pruned=True))
    learning, fitted = outputs if outputs_only else every, tokens * 3 // 4 * epochs
    whole = setup.forward(fitted, seq_len, pruned=True)
    once = Work(*(value * layers // setup.geometry.num_layers for value in astuple(whole)))
    adam = Work(traffic=40 * layers * learning) * (fitted // seq_len)
    back = replace(once * 2, matmul=0, back=once.matmul + once.matmul * learning // every)
    size = 16 if setup.itemsize == 4 else 20  # a float32 copy, its gradient, two moments, and copies in half precision
    return once + back + adam, together * (size * learning + setup.activations(seq_len, gradient=True))
