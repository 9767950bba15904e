"""What `hfms_cli` exports is there, and what is heavy comes only when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hfms_cli


@pytest.mark.parametrize("name", hfms_cli.__all__)
def test_every_name_of_the_api_is_there(name):
    assert getattr(hfms_cli, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        hfms_cli.Nonsense  # noqa: B018


def test_importing_it_imports_neither_typer_nor_aiohttp():
    code = "import sys, hfms_cli; print([m for m in ('typer', 'aiohttp', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
