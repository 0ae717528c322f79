"""A file imports from lower floors only, and what the command line needs before its checks imports no
torch.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "monosemy"
FLOORS = {
    "errors": 0,
    "limits": 0,
    "recipe": 0,
    "rules": 0.5,
    "system": 1,
    "config": 1.5,
    "schedule": 1,
    "ops": 2,
    "lm": 2,
    "codes": 3,
    "data": 3,
    "sae": 4,
    "former_names": 0.5,
    "masks": 0.5,
    "initialization": 4.5,
    "transcoder": 4.7,
    "crosscoder": 4.7,
    "layered_codes": 3.5,
    "cross_layer": 4.7,
    "families": 4.8,
    "architectures": 5,
    "formats": 5,
    "training": 5,
    "evaluation": 5,
    "labeling": 5.5,
    "report": 6,
    "use": 6.5,
    "jobs": 7,
    "commands": 8,
    "cli": 8.5,
    "__main__": 9,
    "__init__": 9,  # it names what lies in all of them
}
# errors hide secrets; the registry fills itself when it is first asked; an SAE knows its way from and to the
# hub
UPWARDS = {("errors", "system"), ("sae", "architectures"), ("sae", "jobs")}


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "monosemy":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("monosemy.")}
    return found & FLOORS.keys()


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path):
    here = room(path)
    assert here in FLOORS, f"give {here} a floor"
    assert not [
        there
        for there in imports(path)
        if there != here and FLOORS[there] >= FLOORS[here] and (here, there) not in UPWARDS
    ]


def test_the_test_sees_imports():
    assert imports(SRC / "jobs" / "train.py") >= {"training", "evaluation", "data", "config"}


def test_checks_need_no_torch():
    code = (
        "import sys, monosemy, monosemy.cli, monosemy.jobs.plan, monosemy.jobs.hub\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    import monosemy

    for name in monosemy.__all__:
        assert getattr(monosemy, name).__doc__, name
    with pytest.raises(AttributeError):
        monosemy.nothing  # noqa: B018
