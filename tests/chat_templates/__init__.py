"""Chat templates as models have them, with what tells their formats apart; shortened where that changes no format."""

from __future__ import annotations

from pathlib import Path

TEMPLATES = {file.stem: file.read_text() for file in sorted(Path(__file__).parent.glob("*.jinja"))}
