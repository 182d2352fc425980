"""Forms of several kinds for the same sites: what each kind loses alone is measured, which puts them on one scale.

What a kind is predicted to lose errs alike at all of its sites: by how errors of many sites add up, and by what the
form itself makes up for. So a plan of each kind alone is run on some samples, and the losses of the kind are multiplied
by what that plan loses over what was predicted of it. Kinds alone are candidates as well as their mixture, and
what measures best is used.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from vitshrink.compression.candidates import Plan
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.errors import TargetError
from vitshrink.runtime.observer import Job

Missing = Callable[[PreTrainedModel], float]
"""What a model loses on some samples."""


def on_one_scale(compressor: Compressor, findings: Findings, budget: int, job: Job) -> Findings:
    """The findings, with the ``scales`` of all kinds for a budget; unchanged where there is one kind."""
    kinds, missing = len(compressor.makers), compressor.missing
    if kinds == 1 or missing is None:
        return findings
    tried: list[tuple[float, Findings]] = []

    def ratio(scales: Sequence[float]) -> float:
        """What such a plan loses, as a multiple of what is predicted; 1 where there is no such plan."""
        scaled = replace(findings, scales=tuple(scales))
        try:
            plan = compressor.plan(scaled, budget)
        except TargetError:
            return 1.0
        lost, predicted = missing(compressor.replaced(scaled, plan)), _predicted(plan)
        tried.append((lost, scaled))
        return lost / predicted if lost and predicted else 1.0

    with job.stage("choose", "Comparing kinds of forms", kinds + 1) as advance:
        scales = []
        for kind in range(kinds):
            scales.append(ratio([1.0 if each == kind else math.inf for each in range(kinds)]))
            advance(1)
        ratio(scales)
        advance(1)
    return min(tried, key=lambda each: each[0])[1] if tried else findings


def _predicted(plan: Plan) -> float:
    return sum(candidate.loss for candidate in plan.values())
