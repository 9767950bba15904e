"""OpenVINO, imported in half the time, and telling nobody: its converter comes when a maker asks for it.

Whatever uses OpenVINO in this package has it from here.
"""

from __future__ import annotations

import sys

# The converter would tell its makers that it ran, unless it was told not to. Without this package it cannot.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
# It takes as long to import as all the rest, which does without it where there is none.
_CONVERTER = "openvino.tools.ovc"
_loaded = sys.modules.setdefault(_CONVERTER, None)  # type: ignore[arg-type]
try:
    import openvino as ov
    from openvino import opset13 as ops
finally:
    if _loaded is None:
        del sys.modules[_CONVERTER]

__all__ = ["ops", "ov"]
