"""The ``vram`` fixture."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from vramplan.errors import EnvironmentProblem, UnknownNameError, UsageError
from vramplan.evidence import measurement
from vramplan.job import Job
from vramplan.measure.harness import Outcome
from vramplan.measure.region import Region
from vramplan.measure.spec import DEFAULT_STEPS, DEFAULT_TIMEOUT_S, RunSpec, make_specs, repeated
from vramplan.record import Record
from vramplan.testing.session import Measured, Session
from vramplan.timeline import timeline_from_document
from vramplan.units import parse_size


class Vram:
    """Measures GPU memory in a test.

    Attributes:
        regions: Every region measured so far, in order.
        records: Every record of ``run``, in order.
    """

    def __init__(self, session: Session, measured: Measured) -> None:
        self._session, self._measured = session, measured
        self.regions: list[Region] = []
        self.records: list[Record] = []

    @contextmanager
    def measure(self, name: str = "region") -> Iterator[Region]:
        """Measure what the ``with`` block does, in this process.

        Regions may lie one inside another; regions of one name are repeats of one thing. An
        exception passes on. What is known of a region is read from it after it.

        Args:
            name: What to call it in baselines.

        Raises:
            UsageError: If the name is empty.

        Known limitations:
            See ``measure.region.Meter``: torch's peak counters start again at both ends.
        """
        if not isinstance(name, str) or not name.strip():
            raise UsageError('vram.measure needs a name, such as vram.measure("step")')
        region = None
        try:
            with self._session.meter.measure(name) as region:
                self.regions.append(region)
                yield region
        finally:
            if region is not None:
                self._measured.add_region(region, self._session)

    def run(
        self,
        model: str,
        job: Job | None = None,
        *,
        name: str = "",
        repeats: int = 1,
        steps: int = DEFAULT_STEPS,
        limit: str | int | None = None,
        evaluate: bool = False,
        save: bool = False,
        history: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        allow_oom: bool = False,
        **fields: Any,
    ) -> Record:
        """Run a fine-tuning job for some steps in a fresh process, with the stock Trainer.

        Args:
            model: A model of the catalogue, a folder or ``config.json``, or a hub id.
            job: The job; the default one without.
            name: What to call it in baselines; model, method and shape without.
            repeats: How often to run it. Rates are compared only with three or more.
            steps: Optimizer steps.
            limit: Most the allocator may reserve, a text such as "12GiB" or bytes.
            evaluate: Evaluate before the last step.
            save: Save a checkpoint before the last step.
            history: Record every allocation, so that modules are known.
            timeout_s: Seconds after which it is killed.
            allow_oom: Return the record of a run that ended out of memory; without, that fails.
            fields: Fields of the job, such as ``batch_size=4``.

        Returns:
            The record of the (last) run.

        Raises:
            EnvironmentProblem: If it ended badly.
            UsageError: If the job cannot be run as asked.
        """
        shared = RunSpec(
            name=name,
            model="",
            config={},
            job=Job(),
            num_steps=steps,
            limit_bytes=None if limit is None else parse_size(str(limit)),
            evaluate=evaluate,
            save=save,
            history=history,
            timeout_s=timeout_s,
        )
        unknown = sorted(fields.keys() - Job.__dataclass_fields__.keys())
        if unknown:
            raise UnknownNameError("field of a job", unknown[0], Job.__dataclass_fields__)
        values = asdict(replace(job or Job(), **fields))
        (spec,) = make_specs(model, values, shared)
        for repeat in repeated([spec], repeats):
            record = self._run(spec.name, repeat)
            if record.status != "done" and not (record.status == "oom" and allow_oom):
                raise EnvironmentProblem(f"{spec.name}: {measurement(record).failed}")
        return record

    def _run(self, name: str, repeat: RunSpec) -> Record:
        outcome: Outcome = self._session.harness.run(repeat)
        timeline = None
        if outcome.timeline is not None:
            document = json.loads(gzip.decompress(outcome.timeline))
            timeline = timeline_from_document(document, name)
        self.records.append(outcome.record)
        self._measured.add(replace(measurement(outcome.record, timeline), name=name))
        return outcome.record
