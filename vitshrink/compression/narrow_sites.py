"""Where layers may become narrower: the MLPs and attentions of a model of which all layers may change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from vitshrink.compression.attentions import Attention, attentions_of
from vitshrink.compression.candidates import Kind, Site
from vitshrink.methods.attention import ATTENTION
from vitshrink.models.families import family_of
from vitshrink.models.targets import Target, linear_of

ROLES = ("query", "key", "value", "output")
"""Of an attention."""


@dataclass(frozen=True, eq=False)
class NarrowSite:
    """An MLP or an attention.

    Attributes:
        targets: its layers by role.
        attention: None for an MLP.
    """

    name: str
    targets: Mapping[str, Target]
    attention: Attention | None = None

    @property
    def site(self) -> Site:
        kind: Kind = "mlp" if self.attention is None else "attention"
        width = next(iter(self.targets.values())).shape[1]
        numbers = sum(m * n for m, n in (target.shape for target in self.targets.values()))
        return Site(self.name, kind, (numbers // width, width), tuple(target.name for target in self.targets.values()))


def narrow_sites(model: PreTrainedModel, targets: Sequence[Target]) -> list[NarrowSite]:
    """Block by block, each attention before its MLP.

    Those of which a layer is not among ``targets`` are left out, those that write without a bias, which makes up for
    the mean of what is gone, and attentions that are more than softmax(QKᵀ) V.
    """
    family = family_of(model)
    blocks: dict[int, dict[str, Target]] = {}
    for target in targets:
        blocks.setdefault(target.block, {})[target.role] = target
    attentions = attentions_of(model, targets) if family.plain else []
    whole = {each.block: each for each in attentions if len(each.targets) == len(ROLES)}
    found = []
    for block, roles in sorted(blocks.items()):
        writes = {role for role in roles if linear_of(model, roles[role].name).bias is not None}
        if (attention := whole.get(block)) is not None and "output" in writes:
            found.append(NarrowSite(attention.places[ATTENTION], attention.targets, attention))
        if "fc1" in roles and "fc2" in writes and roles["fc1"].shape[0] == roles["fc2"].shape[1]:
            name = roles["fc1"].name.removesuffix(family.modules["fc1"]) + "mlp"
            found.append(NarrowSite(name, {role: roles[role] for role in ("fc1", "fc2")}))
    return found
