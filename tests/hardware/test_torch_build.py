"""Reading torch's build without importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hfms_hardware.torch_build import TorchBuild, installed_torch


def made(folder, text: str) -> list[str]:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "torch" / "version.py").write_text(text)
    return [str(folder)]


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", ("2.13.0+cpu",)),
        ("__version__ = '2.9.1+cu128'\ncuda: Optional[str] = '12.8'\nhip: X = None\n", ("2.9.1+cu128", "12.8")),
        ("__version__ = '2.9.1+rocm7.0'\ncuda = None\nhip = '7.0.51831'\n", ("2.9.1+rocm7.0", None, "7.0.51831")),
        ('__version__ = "2.6.0"\ncuda = "12.4"\n', ("2.6.0", "12.4")),
    ],
)
def test_a_build_is_read_from_its_version_file(tmp_path, text, build):
    assert installed_torch(made(tmp_path, text)) == TorchBuild(*build)


def test_no_torch_is_none(tmp_path):
    assert installed_torch([str(tmp_path)]) is None
    (tmp_path / "torch").mkdir()  # what a half-removed torch leaves
    assert installed_torch([str(tmp_path)]) is None


def test_the_installed_torch_is_the_one_that_would_be_imported():
    torch = pytest.importorskip("torch")
    assert installed_torch() == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip)


def test_probing_everything_imports_nothing_heavy():
    code = """
import sys, hfms_hardware
for provider in hfms_hardware.hfms_hardware():
    found = provider.create().probe()
    assert bool(found.devices) != bool(found.reason), provider.name
print(sorted({"torch", "numpy", "openvino", "transformers"} & {*sys.modules}))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
