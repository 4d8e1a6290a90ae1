"""Finds out, once and only when a Hub id is to be read, whether the Hub answers; if not, the cache alone is read.

Without this, each file that a library asks for is tried six times, half a minute of waiting and a screen of warnings,
on the very machines that are meant to be cut off.
"""

from __future__ import annotations

import functools

import datasets
import huggingface_hub
from huggingface_hub import constants

PATIENCE = 10.0


@functools.cache
def look_for_hub() -> None:
    """Switches this process to what the cache holds when the Hub cannot be reached within `PATIENCE` seconds."""
    if constants.is_offline_mode():
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # whatever the HTTP library, a proxy or a certificate raises
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
