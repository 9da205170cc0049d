"""What a stage costs before it runs: arithmetic, bytes and reads of the weights, in whole numbers.

Every stage has a function `cost(setup, ...) -> Cost` beside it (or in a light module near it, where its own imports
transformers), made of the few pieces here: a layer, a head, hidden states, a batch. Seconds come from `Rates`, which
`model/rates.py` measures. Neither torch nor a weight is needed. Where a formula is rough its docstring says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from LLMPruner.plan import Geometry

BATCH_TOKENS = 4096  # tokens that go through a layer together
LOGIT_ELEMENTS, LOGIT_ELEMENTS_CPU = 1 << 26, 1 << 22  # as model/head.py

# The share of the measured rate that each kind of work reaches, as found on two cores in float32. Small steps beside the
# products are counted by themselves: `traffic` and `calls`.
EFFICIENCY = {
    "matmul": 0.9,
    "back": 0.95,
    "product": 0.95,
    "single": 1.0,
    "factor": 0.3,
    "double": 0.7,
    "traffic": 0.6,
}


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second: FLOPs of products in the model's dtype, on the way back, of statistics, in float32 and
    in float64; bytes through the device's memory, to the device, from disk and to disk. And the seconds of a small call."""

    matmul: float
    back: float
    product: float
    single: float
    double: float
    copy: float
    to_device: float
    read: float
    write: float
    call: float = 1e-5

    def per_second(self, kind: str) -> float:
        """Of a field of `Work`, as much as is done in a second."""
        rate = {"traffic": self.copy, "factor": self.single}.get(kind) or getattr(self, kind)
        return rate * EFFICIENCY[kind]


@dataclass(frozen=True)
class Work:
    """FLOPs by kind, bytes that small steps read and write, and how many calls of a kernel it takes."""

    matmul: int = 0  # products in the model's dtype, forward
    back: int = 0  # the same on the way back, where autograd is at work
    product: int = 0  # sums of products over tokens: of values in the model's dtype, added in float32
    single: int = 0  # products and triangular solves in float32
    factor: int = 0  # Cholesky in float32
    double: int = 0  # whatever is in float64
    traffic: int = 0
    calls: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))

    def __mul__(self, times: int) -> Work:
        return Work(*(getattr(self, entry.name) * times for entry in fields(self)))

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.matmul + self.back + self.product + self.single + self.factor + self.double

    def seconds(self, rates: Rates) -> float:
        """How long it takes at these rates."""
        return sum(getattr(self, kind) / rates.per_second(kind) for kind in EFFICIENCY) + self.calls * rates.call


@dataclass(frozen=True)
class Cost:
    """What one stage costs, named as the run records it. Bytes are those alive at its peak, weights of the model not included.

    `hidden` are hidden states, which lie on the device where the weights do and else on the host. `passes`: how often the
    weights of all layers are read where they are on disk; `head`: whether those of the head are needed. `layers`: as many are
    open at once. `pruned`: the weights are those of the pruned model. `read` and `written`: bytes of files besides; `left`:
    what lies on disk from then on, `temporary` meanwhile. `waits`: seconds that depend on nothing above; `most`: when the stage
    ends by itself. `learning`: what of `device` layers take that learn.
    """

    stage: str
    work: Work = Work()
    device: int = 0
    hidden: int = 0
    host: int = 0
    passes: int = 0
    head: bool = False
    layers: int = 1
    pruned: bool = False
    read: int = 0
    written: int = 0
    left: int = 0
    temporary: int = 0
    waits: float = 0.0
    most: float = math.inf
    learning: int = 0


@dataclass(frozen=True)
class Setup:
    """A model and how it is computed with: bytes of a weight, in memory and in its file, the columns that output projections
    keep on average, whether all weights are on the device, and whether that is the CPU."""

    geometry: Geometry
    itemsize: int = 2
    stored: int = 2
    attention: int = 0  # columns kept; 0: all
    mlp: int = 0
    resident: bool = True
    cpu: bool = False
    processes: int = 1

    @property
    def queries(self) -> int:
        """Columns of the dense o_proj."""
        return self.geometry.num_heads * self.geometry.head_dim

    def columns(self, *, pruned: bool) -> tuple[int, int]:
        """Inputs of o_proj and of down_proj in a layer."""
        dense = self.queries, self.geometry.intermediate_size
        return (self.attention or dense[0], self.mlp or dense[1]) if pruned else dense

    def layer_params(self, *, pruned: bool = False) -> int:
        """Weights of a layer's projections, on average."""
        geometry, dense = self.geometry, self.columns(pruned=False)
        parts = zip(geometry.table.sublayers, self.columns(pruned=pruned), dense, strict=True)
        return sum(geometry.sublayer_params(part.name) * kept // whole for part, kept, whole in parts)

    def layer_bytes(self, *, pruned: bool = False) -> int:
        """Bytes of a layer's weights."""
        return self.layer_params(pruned=pruned) * self.itemsize

    @property
    def head_bytes(self) -> int:
        """Bytes of the language-model head, or of the embedding that is one."""
        return self.geometry.vocab_size * self.geometry.hidden_size * self.itemsize

    def weights(self, *, pruned: bool = False) -> int:
        """Bytes of all weights."""
        gone = self.geometry.num_layers * (self.layer_params() - self.layer_params(pruned=pruned))
        return (self.geometry.dense_params - gone) * self.itemsize

    def mine(self, windows: int) -> int:
        """Of so many windows those of one process."""
        return -(-windows // self.processes)

    def hidden(self, tokens: int, states: int = 1) -> int:
        """Bytes of hidden states."""
        return states * tokens * self.geometry.hidden_size * self.itemsize

    def together(self, windows: int, seq_len: int) -> int:
        """Tokens whose hidden states live at once between layers: of a batch, or of all windows where layers are read."""
        return self.batch(windows, seq_len) if self.resident else windows * seq_len

    def batch(self, windows: int, seq_len: int) -> int:
        """Tokens that go through a layer together."""
        return min(windows, max(1, BATCH_TOKENS // seq_len)) * seq_len

    def layer(self, tokens: int, seq_len: int, *, pruned: bool = False) -> Work:
        """One layer on `tokens`, forward: projections, attention scores, and what lies between them.

        Bytes: norms in float32 (nine passes each), rotations of queries and keys, activation and product of the channels.
        """
        geometry, (queries, channels) = self.geometry, self.columns(pruned=pruned)
        biases = 0
        for sublayer, kept, whole in zip(
            geometry.table.sublayers, (queries, channels), self.columns(pruned=False), strict=True
        ):
            inputs = sum(geometry.segment(part) for part in sublayer.inputs if geometry.has_bias(part))
            biases += geometry.units(sublayer.name) * inputs * kept // whole
        products = 2 * (self.layer_params(pruned=pruned) - biases) + 4 * seq_len * queries
        elements = 26 * geometry.hidden_size + 16 * queries + 8 * channels + 12 * (queries // geometry.q_per_kv)
        calls = 60 * -(-tokens // BATCH_TOKENS)
        return Work(matmul=tokens * products, traffic=tokens * elements * self.itemsize, calls=calls)

    def backward(self, tokens: int, seq_len: int) -> Work:
        """The way back through a layer, to its inputs alone: a forward with what it saves, and a product for each product.

        Attention's scores are computed anew and take two and a half times as much; small steps twice as many bytes.
        """
        once = self.layer(tokens, seq_len)
        products = 2 * once.matmul + tokens * 6 * seq_len * self.queries
        return replace(once * 2, matmul=0, back=products, traffic=3 * once.traffic)

    def head_work(self, tokens: int, *, gradient: bool = False) -> Work:
        """Logits and losses of `tokens`; with their gradients twice that."""
        vocabulary, times = self.geometry.vocab_size, 1 + gradient
        chunks = -(-tokens * vocabulary // (LOGIT_ELEMENTS_CPU if self.cpu else LOGIT_ELEMENTS))
        products = 2 * self.geometry.hidden_size * vocabulary
        bytes_ = vocabulary * (2 * self.itemsize + 16)
        products *= times * tokens
        kind = {"back" if gradient else "matmul": products}
        return Work(**kind, traffic=times * tokens * bytes_, calls=10 * times * chunks)

    def forward(self, tokens: int, seq_len: int, *, pruned: bool = False) -> Work:
        """All layers on `tokens`."""
        return self.layer(tokens, seq_len, pruned=pruned) * self.geometry.num_layers

    def activations(self, tokens: int, *, gradient: bool = False) -> int:
        """Bytes of what a layer holds of `tokens` at its peak: gate, its activation and up, beside the stream and its norm.

        With a gradient, whatever the way back needs: norms in float32 too, queries and keys before and after the rotation.
        """
        (queries, channels), hidden = self.columns(pruned=False), self.geometry.hidden_size
        if gradient:
            return tokens * ((4 * channels + 6 * queries + 5 * hidden) * self.itemsize + 16 * hidden)
        return tokens * (max(3 * channels * self.itemsize, 12 * hidden) + 2 * hidden * self.itemsize)

    def observed(self, tokens: int) -> int:
        """Bytes of a batch whose statistics are gathered: the channels, a copy in float32 and what is made of it."""
        copies = 4 if self.itemsize == 4 else 8
        return tokens * (max(self.columns(pruned=False)) + 2 * self.geometry.hidden_size) * (self.itemsize + copies)

    def logits(self, tokens: int, *, gradient: bool = False) -> int:
        """Bytes of a chunk of the logits of `tokens` with their copies in float32."""
        most = LOGIT_ELEMENTS_CPU if self.cpu else LOGIT_ELEMENTS
        return min(most, tokens * self.geometry.vocab_size) * (self.itemsize + 8) * (1 + gradient)
