"""What a search has found so far, on disk: an interrupted one continues from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from LLMPruner.errors import UsageError
from LLMPruner.files import read_json_file, write_json
from LLMPruner.importance.budget import Prunable

STATE_FORMAT = 7  # raised whenever a cost or the fitness comes to mean something else: saved ones are not comparable then


@dataclass
class SearchState:
    """Costs, the best plan and the generation under way; saved after every step."""

    costs: list[dict[int, float]] = field(default_factory=list)  # by sublayer: KL at the levels measured so far
    levels: list[int] | None = None  # the best so far
    fitness: float | None = None  # its KL, nats a token
    generation: int = 0
    stale: int = 0  # generations since the last improvement
    shifts: list[dict[int, float]] = field(default_factory=list)  # like costs, of the best plan, in the generation under way

    def save(self, path: Path, key: dict[str, Any]) -> None:
        """Write the state as JSON; `key` says which search it belongs to."""
        write_json(path, {"key": key, **asdict(self)})

    @classmethod
    def load(cls, path: Path, key: dict[str, Any], sublayers: Sequence[Prunable]) -> SearchState:
        """Read back what was found for `sublayers`. Raises UsageError when it is missing, malformed or of another search."""
        data = read_json_file(path, "--resume: the search state")
        if not isinstance(data, dict) or data.pop("key", None) != key:
            raise UsageError(f"--resume: {path} is of a search with other settings: repeat its command, or search anew")
        try:
            state = cls(**data)
            for name in ("costs", "shifts"):  # JSON's keys are text
                setattr(state, name, [{int(level): float(kl) for level, kl in known.items()} for known in getattr(state, name)])
            state._check(sublayers)
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"--resume: {path} is not a search state: {error}") from error
        return state

    def _check(self, sublayers: Sequence[Prunable]) -> None:
        """Raise TypeError or ValueError unless a search over `sublayers` can go on from here."""
        if {type(self.generation), type(self.stale)} != {int}:
            raise TypeError("generation and stale are counts")
        if self.levels is None:
            if self.generation or self.shifts:
                raise ValueError("it has no plan")
        elif len(self.levels) != len(sublayers):
            raise ValueError(f"its plan is of {len(self.levels)} sublayers, not {len(sublayers)}")
        if not {len(self.costs), len(self.shifts)} <= {0, len(sublayers)}:
            raise ValueError(f"it knows {len(self.costs)} and {len(self.shifts)} sublayers of {len(sublayers)}")
        plan = [[level] for level in self.levels or ()]
        for found in (plan, self.costs, self.shifts):
            for sublayer, levels in zip(sublayers, found, strict=False):  # nothing may be known of any
                for level in levels:
                    if type(level) is not int or level not in range(len(sublayer.levels)):
                        raise ValueError(f"layer {sublayer.layer}'s {sublayer.kind} has no level {level}")
