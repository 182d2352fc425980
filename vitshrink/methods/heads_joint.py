"""Smaller heads all over an attention: queries with keys, values with outputs."""

from collections.abc import Mapping, Sequence

from vitshrink.methods.attention import ATTENTION, AttentionWeights, Dimensions, Part, attention_method
from vitshrink.methods.qk_joint import qk_joint
from vitshrink.methods.vo_joint import vo_joint
from vitshrink.models.structures import Structure
from vitshrink.models.structures.headwise import Headwise
from vitshrink.models.structures.narrow import Narrow


def structures(dimensions: Dimensions, ranks: Mapping[str, int]) -> dict[str, Structure]:
    found: dict[str, Structure] = {ATTENTION: Headwise(ranks.get("qk"), ranks.get("vo"))}
    if "vo" in ranks:
        found["output"] = Narrow(dimensions.heads * ranks["vo"])
    return found


@attention_method("heads-joint", parts={"qk": ("query", "key"), "vo": ("value", "output")}, structures=structures)
def heads_joint(attention: AttentionWeights, ranks: Sequence[int], parts: Sequence[str]) -> dict[str, Part]:
    """``qk-joint`` and ``vo-joint`` together, with one budget for the ranks of both.

    The two errors, of scores and of outputs, have no unit in common, so that the allocation compares the share of its
    energy that each keeps (Eckart and Young, 1936, for every head).
    """
    found = qk_joint(attention, ranks, parts) if "qk" in parts else {}
    return found | (vo_joint(attention, ranks, parts) if "vo" in parts else {})
