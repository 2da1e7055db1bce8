"""What is installed is all that is imported: a folder that setup.py leaves out works from the sources alone."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call))
    installed = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "packages")
    folders = (ROOT / name for name in ("engine", "kernels", "tools", "benchmarks"))
    files = (file for folder in folders for file in folder.rglob("__init__.py"))
    assert set(installed) == {".".join(file.parent.relative_to(ROOT).parts) for file in files}
