"""Recovery: training that gives a compressed model back what it lost, with or without labels."""

from vitshrink.recovery.checkpoints import clear_state
from vitshrink.recovery.checks import check, check_tokens
from vitshrink.recovery.material import Material, open_material
from vitshrink.recovery.outcome import Recovery
from vitshrink.recovery.recover import recover
from vitshrink.recovery.splitting import held_out_count

__all__ = ["Material", "Recovery", "check", "check_tokens", "clear_state", "held_out_count", "open_material", "recover"]
