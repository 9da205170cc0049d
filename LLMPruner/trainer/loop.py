"""The Trainer of a recovery: losses summed over a step's tokens, checks of every held-out part, checkpoints of our own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from LLMPruner import parallel
from LLMPruner.data.windows import IGNORED
from LLMPruner.trainer.checkpoints import read_weights, write_weights
from LLMPruner.trainer.teacher import DrawnAnswers

if TYPE_CHECKING:
    from LLMPruner.data.training import TrainingRows

logger = logging.getLogger("LLMPruner")


class Rows(torch.utils.data.Dataset):
    """Windows with what is to be learned of them: labels, and the teacher's answers where they were drawn.

    As many as a multiple of `multiple`, of the first window those that are too many, and of them nothing is learned: else
    several processes, which take equally many batches of one size, would be given some windows twice.
    """

    def __init__(self, rows: TrainingRows, answers: DrawnAnswers | None, offset: int = 0, *, multiple: int = 1) -> None:
        self.rows, self.answers, self.offset, self.multiple = rows, answers, offset, multiple

    def __len__(self) -> int:
        return -(-len(self.rows.windows) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        blank = index >= len(self.rows.windows)
        index = 0 if blank else index
        ids, learned = self.rows.windows[index], self.rows.targets[index]
        labels = torch.full_like(ids, IGNORED)
        if not blank:
            labels[:-1] = torch.where(learned[1:], ids[1:], IGNORED)
        return {"input_ids": ids, "labels": labels} | ({} if self.answers is None else self.answers[self.offset + index])


def collate(rows: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class RecoveryTrainer(Trainer):
    """Losses summed over a step's tokens, however many are computed at once; checks of each part; our checkpoints."""

    weights: Mapping[str, float]  # of the held-out parts in the loss that decides
    looks: int  # checkpoints from one look at held-out text to the next
    last: torch.Tensor  # the loss of the last batch
    computed: int  # tokens of the training so far, of this process

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.computed = 0
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens here, not by its batches

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, torch.Tensor]:
        """The batches of a step, and the tokens that all processes learn in it."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.computed += sum(batch["input_ids"].numel() for batch in batches)
        count = torch.stack([batch["labels"].ne(IGNORED).sum() for batch in batches]).sum() if batches else torch.zeros(())
        return batches, self.accelerator.reduce(count.to(device).float(), "sum")

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """The batch's share of the step's mean loss a token; gradients are averaged over processes afterwards."""
        loss = model(**inputs)[0]
        self.last = loss.detach()
        return loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean losses a token on each held-out part, and their mean as the parts are mixed."""
        model, metrics = self.model_wrapped, {}
        model.eval()
        for name, rows in self.eval_dataset.items():
            sums, tokens = torch.zeros(3, device=self.args.device), 0
            for place in range(0, len(rows), self.args.per_device_train_batch_size):
                batch = range(place, min(place + self.args.per_device_train_batch_size, len(rows)))
                inputs = self._prepare_inputs(collate([rows[index] for index in batch]))
                with self.compute_loss_context_manager():
                    sums += model(**inputs)
                tokens += int(inputs["labels"].ne(IGNORED).sum())
            total, entropy, divergence = (sums / max(1, tokens)).tolist()
            metrics |= {f"eval_{name}_loss": total, f"eval_{name}_nll": entropy, f"eval_{name}_kl": divergence}
        metrics = parallel.from_main(metrics)  # kernels may differ: all processes keep the same state
        shares = {name: self.weights[name] for name in self.eval_dataset}
        mean = sum(share * metrics[f"eval_{name}_loss"] for name, share in shares.items()) / sum(shares.values())
        metrics = {"eval_loss": mean, **metrics}
        parts = "; ".join(f"{name} {metrics[f'eval_{name}_nll']:.4f} nats" + _kl(metrics, name) for name in self.eval_dataset)
        logger.info("step %d  held-out loss %.4f: %s", self.state.global_step, mean, parts)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        write_weights(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("the best state is that of step %d", self.state.best_global_step)
        read_weights(self.model, Path(self.state.best_model_checkpoint))


def _kl(metrics: Mapping[str, float], name: str) -> str:
    divergence = metrics[f"eval_{name}_kl"]
    return f", KL {divergence:.4f}" if divergence else ""
