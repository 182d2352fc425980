"""A model of just the bytes that are asked for: what integers take is known once they are there."""

import json
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vitshrink.compression.candidates import Candidate, Cost, Plan
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.errors import TargetError
from vitshrink.models import cost
from vitshrink.models.structures.coded import Coded
from vitshrink.models.views import cast_view, view_of
from vitshrink.runtime.observer import Job

ATTEMPTS = 6
"""Plans that are built at most for one size."""

CLOSE = 0.003
"""Of the budget: what may be left of it."""


def fitted(compressor: Compressor, findings: Findings, budget: int, job: Job) -> tuple[Plan, PreTrainedModel]:
    """The plan and the finished model that come closest to ``budget``, bytes of the weight file, from below.

    What is predicted is corrected by what the model before took. Raises TargetError where none fits.
    """
    best: tuple[int, Plan, PreTrainedModel] | None = None
    asked, least = budget, compressor.least_budget(findings)
    with job.stage("round", "Rounding to the size"):
        for _ in range(ATTEMPTS):
            plan = compressor.plan(findings, max(asked, least))
            model = compressor.build(findings, plan, job)
            taken = file_bytes(model, compressor)
            if taken <= budget and (best is None or taken > best[0]):
                best = taken, plan, model
            if 0 <= budget - taken <= CLOSE * budget or (asked < least and taken > budget):
                break
            # too large by a little is answered by enough to tell; a prediction that is far off is off by a factor
            aim = budget if taken <= budget else int((1 - CLOSE / 2) * budget)
            asked = asked + aim - taken if taken <= budget else max(asked + aim - taken, asked * aim // taken)
    if best is None:
        raise TargetError(
            f"the smallest model takes {taken:,} bytes, but only {budget:,} are allowed. The smallest possible "
            f"size is --target-size {taken / 1000000.0 + 0.001:.3f}MB."
        )
    return told(best[1], best[2], compressor.material.dtype), best[2]


def told(plan: Plan, model: PreTrainedModel, dtype: torch.dtype) -> Plan:
    """``plan`` with what its matrices take in ``model``, in the place of what was predicted."""
    modules = dict(model.named_modules())
    found = dict(plan)
    for name, chosen in plan.items():
        module = modules.get(name)
        if isinstance(module, Coded) and chosen.form is not None:
            numbers, taken = chosen.cost.parameters, module.weight.numel() * dtype.itemsize + module.codes.numel()
            form = replace(chosen.form, bits=round(8 * taken / numbers, 2))  # type: ignore[type-var]
            found[name] = Candidate(form, Cost(numbers, taken), chosen.loss)
    return found


def file_bytes(model: PreTrainedModel, compressor: Compressor) -> int:
    """Bytes of the weight file of the model, at most: its tensors, under the names that they have in the file."""
    stored = cast_view(view_of(model), compressor.material.dtype)
    state = stored.state_dict()
    different = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}  # tied ones once
    tensors = {name: state[name] for name in different.values()}
    end, header = 0, {"__metadata__": {"format": "pt"}}
    for name, tensor in revert_weight_conversion(stored, tensors).items():
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        header[name] = entry  # type: ignore[assignment]
        end += tensor.nbytes
    return cost.stored_bytes(stored) + len(json.dumps(header, separators=(",", ":"))) + 16
