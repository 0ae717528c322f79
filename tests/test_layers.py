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
    "redact": -3,
    "config": -1,
    "files": 0,
    "progress": 0,
    "rng": 0,
    "recipe": 0,
    "releases": 0,
    "prefetch": 0,
    "arrays": 2,
    "assets": 1,
    "gguf_model": 0,
    "http": 1,
    "devices": 1,
    "interrupts": 1,
    "schedule": 1,
    "ops": 1,
    "graphs": 1,
    "checkpoints": 3,
    "sae": 3,
    "sources": 2,
    "rows": 3,
    "contexts": 4,
    "lm_info": 2,
    "lm_model": 3,
    "top_k_family": 4,
    "architectures": 5,
    "activations": 5,
    "memory": 2.5,
    "missing": 2,
    "cost": 4,
    "latents": 4,
    "formats": 5,
    "codes": 2,
    "trainer": 6,
    "group": 7,
    "trackers": 3,
    "sweep": 8,
    "loop": 9,
    "evaluation": 6,
    "plan": 6,
    "report": 10,
    "hub": 6,
    "run_folder": 10,
    "pretrained": 10,
    "results": 11,
    "export": 11,
    "run": 13,
    "evaluate": 13,
    "errors": -2,
    "limits": 0,
    "probing": 12,
    "cli": 14,
    "__main__": 15,
    "__init__": 16,  # it names what lies in all of them
}
# the registry fills itself when it is first asked; an SAE knows its way from and to the hub
UPWARDS = {("sae", "architectures"), ("sae", "pretrained")}


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
    assert imports(SRC / "run.py") >= {"sweep", "evaluation", "plan", "config"}


def test_checks_need_no_torch():
    code = (
        "import sys, monosemy, monosemy.cli, monosemy.plan\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    import monosemy

    for name in monosemy.__all__:
        assert getattr(monosemy, name).__doc__, name
    with pytest.raises(AttributeError):
        monosemy.nothing  # noqa: B018
