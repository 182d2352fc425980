"""Recovery: training that gives a compressed model back what it lost, with or without labels."""

from vitshrink.recovery.checkpoints import clear_state
from vitshrink.recovery.material import Material, open_material
from vitshrink.recovery.recover import Recovery, check, recover

__all__ = ["Material", "Recovery", "check", "clear_state", "open_material", "recover"]
