"""Takes the targets in turn, A B A B ..., so that the machine's drift touches all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpt_fast.bench.sample import Case, Sample, Unavailable

Run = Callable[[Case], Sample]
Shape = tuple[int, int, int]


@dataclass
class Results:
    """samples: by case shape, then by target, one a round. notes: what was not measured, and why."""

    samples: dict[Shape, dict[str, list[Sample]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def interleave(
    runs: Mapping[str, Run], cases: Sequence[Case], *, repeat: int, probe: Callable[[], float | None]
) -> Results:
    """For every case one discarded round, then `repeat` rounds of every target in turn, each beside a probe.

    A target that cannot do a case is left out of it, with a note; it is an error of the first one only.
    """
    results = Results()
    for case in cases:
        able = warm_up(runs, case, results.notes)
        samples: dict[str, list[Sample]] = {name: [] for name in able}
        for index in range(1, repeat + 1):
            for name, run in able.items():
                bandwidth = probe()
                samples[name].append(replace(run(replace(case, round=index)), bandwidth=bandwidth))
        results.samples[case.shape] = samples
    return results


def warm_up(runs: Mapping[str, Run], case: Case, notes: list[str]) -> dict[str, Run]:
    """The targets that can do the case, after one run each. Ours, the first, has to; a peer's failure is a note."""
    able: dict[str, Run] = {}
    ours = next(iter(runs))
    for name, run in runs.items():
        try:
            run(replace(case, round=0))
        except RuntimeError as reason:
            if name == ours:
                raise
            note = str(reason) if isinstance(reason, Unavailable) else f"{name}: {reason}"
            if note not in notes:
                notes.append(note)
        else:
            able[name] = run
    return able
