"""What a process says of itself: logs, metrics, health. Nothing of it decides anything."""

from kontext_batch.observability.logs import level_number, set_up_logging
from kontext_batch.observability.masking import hide, hide_password, mask

__all__ = ["hide", "hide_password", "level_number", "mask", "set_up_logging"]
