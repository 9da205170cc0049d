"""A results file: one record for each model, measurement and metric, kept after every measurement. No torch.

A record says whose figure it is (model, its fingerprint and size), of what (kind, name, settings) and by which run (an index
into the file's `provenance`). Its key is a hash of all that the number depends on: with `--resume` a figure whose key is there
already is not measured again. What other commands have put into the file stays there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LLMPruner import parallel
from LLMPruner.errors import UsageError
from LLMPruner.files import read_json_file, write_json

logger = logging.getLogger("LLMPruner")
Record = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One number that a measurement gave, its standard error where there is one, and what else is to be known of it."""

    metric: str
    value: float
    stderr: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A model that is measured: the name that tables give it, and a hash of everything in its files."""

    name: str
    path: str
    parameters: int
    fingerprint: str


@dataclass(frozen=True)
class Measurement:
    """What is measured: PPL of a corpus, a task, and so on; `settings` are plain values, among them a hash of the text."""

    kind: str  # ppl, task, efficiency, generation or engine
    name: str
    settings: Mapping[str, Any] = field(hash=False)


class Results:
    """The records of a run and, where it has a file, of the runs before it. `run` says how this one measures."""

    def __init__(
        self, path: Path | None, run: Mapping[str, Any], records: Sequence[Record] = (), runs: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.path, self.run, self.records, self.runs = path, dict(run), list(records), list(runs)

    @classmethod
    def opened(cls, path: Path | None, run: Mapping[str, Any], *, resume: bool) -> Results:
        """Those of a new file, or with `resume` of the one there is. Raises UsageError where it is no results file."""
        if path is None or not resume or not path.exists():
            return cls(path, run)
        return cls(path, run, *parallel.from_main(read_results(path)))  # the same for all processes, whatever is written next

    def key(self, subject: Subject, measurement: Measurement) -> str:
        """A hash of all that figures depend on; not on whose command measured them."""
        what = [subject.fingerprint, measurement.kind, measurement.name, dict(measurement.settings)]
        where = [self.run[name] for name in ("device", "dtype", "versions")]
        return hashlib.sha256(json.dumps([what, where], sort_keys=True).encode()).hexdigest()[:32]

    def of(self, subject: Subject, measurement: Measurement) -> list[Record]:
        """The records of a measurement of a model, in the order of its metrics; none where it is to be made."""
        key = self.key(subject, measurement)
        return [record for record in self.records if record["model"] == subject.name and record["key"] == key]

    def add(self, subject: Subject, measurement: Measurement, figures: Sequence[Figure], seconds: float) -> None:
        """Keep what was measured, in the place of what the model of this name gave before under the same key."""
        key, said = self.key(subject, measurement), json.loads(json.dumps(dict(measurement.settings)))
        self.records = [record for record in self.records if (record["model"], record["key"]) != (subject.name, key)]
        head = {"model": subject.name, "kind": measurement.kind, "name": measurement.name}
        if not self.runs or self.runs[-1] is not self.run:
            self.runs.append(self.run)
        tail = {"settings": said, "path": subject.path, "parameters": subject.parameters, "fingerprint": subject.fingerprint}
        tail |= {"seconds": round(seconds, 2), "run": len(self.runs) - 1, "key": key}
        for figure in figures:
            number = {"metric": figure.metric, "value": figure.value, "stderr": figure.stderr}
            self.records.append({**head, **number, **figure.facts, **tail})

    def save(self, view: Mapping[str, Any]) -> None:
        """Write the file, if there is to be one: `view`, what this command says of its models, and all records."""
        if self.path is not None and parallel.main():
            records = [record | {name: _finite(record[name]) for name in ("value", "stderr")} for record in self.records]
            write_json(self.path, {**view, "provenance": self.runs, "records": records})


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def described(**run: Any) -> dict[str, Any]:
    """A run as the provenance names it: now, and the values given."""
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **run}


FIELDS = ("model", "kind", "name", "metric", "value", "stderr", "settings", "parameters", "run", "key")


def read_results(path: Path) -> tuple[list[Record], list[dict[str, Any]]]:
    """The records and runs of a results file. Raises UsageError where it is damaged, or another program's."""
    data = read_json_file(path, "--resume: the results file")
    records, runs = (data.get(name) for name in ("records", "provenance")) if isinstance(data, dict) else (None, None)
    sound = isinstance(records, list) and isinstance(runs, list)
    sound = sound and all(isinstance(record, dict) and all(name in record for name in FIELDS) for record in records)
    sound = sound and all(isinstance(record["run"], int) and 0 <= record["run"] < len(runs) for record in records)
    sound = sound and all(isinstance(record["value"], int | float | None) for record in records)
    if not sound:
        raise UsageError(f"--resume: {path} is not a results file with records: give --save_results another name")
    for record in records:
        record["value"] = math.nan if record["value"] is None else record["value"]
    return records, runs
