"""What `import monosemy` offers: the same names to the interpreter, to type checkers and to editors, on any
system."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import monosemy

SRC = Path(monosemy.__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples"


def typed_names() -> dict[str, str]:
    """Each name under TYPE_CHECKING with the module that it comes from."""
    tree = ast.parse((SRC / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or "": (node.module or "")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_see_every_public_name_where_it_is():
    assert typed_names() == {name: f"monosemy.{home}" for name, home in monosemy._HOME.items()}
    assert set(monosemy.__all__) <= set(dir(monosemy))
    assert (SRC / "py.typed").is_file()


# what mypy would read for half a minute, and no type that is asked for comes from: other packages, and parts
# of torch beside its tensors
UNREAD = (
    "datasets fsspec gguf httpx huggingface_hub jinja2 matplotlib numpy PIL pyarrow sympy tokenizers "
    "transformers triton tyro torch._dynamo torch._export torch._functorch torch._inductor torch.ao "
    "torch.distributed torch.export torch.fx torch.jit torch.onnx torch.testing torch.utils.data"
).split()


def test_mypy_knows_what_a_user_calls(tmp_path):
    """reveal_type of calls from outside the package: types, not Any."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        "[mypy]\nignore_missing_imports = true\nfollow_imports = silent\n"
        f"[mypy-{','.join(f'{name}.*' for name in UNREAD)}]\nfollow_imports = skip\n"
    )
    program = tmp_path / "user.py"
    program.write_text(
        textwrap.dedent(
            """
            import torch
            import monosemy

            sae = monosemy.load("folder")
            reveal_type(sae)
            reveal_type(sae.encode(torch.zeros(1)))
            reveal_type(sae.W_dec)
            reveal_type(monosemy.fit([], [monosemy.SAESpec("top_k", 8)]).saes)
            reveal_type(monosemy.TrainConfig(save_dir="x").layers)
            monosemy.nothing
            """
        )
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(settings), str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    types = (
        "monosemy.sae.SAE",
        "torch._tensor.Tensor",
        "torch.nn.parameter.Parameter",
        "list[monosemy.sae.SAE]",
        "tuple[int | Literal['all'], ...]",
    )
    for said in (*(f'Revealed type is "{name}"' for name in types), 'Module has no attribute "nothing"'):
        assert said in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_from_the_package_itself(example):
    modules = [
        node.module or ""
        for node in ast.walk(ast.parse(example.read_text()))
        if isinstance(node, ast.ImportFrom)
    ]
    names = [
        alias.name
        for node in ast.walk(ast.parse(example.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    assert not [name for name in modules + names if name.startswith("monosemy.")]


POSIX_ONLY = ("fcntl", "resource", "termios", "pwd", "grp", "pty", "syslog", "posix_ipc")
ELSEWHERE = f"""
import sys
import datasets, transformers  # what other packages import is for them to say by the platform

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {POSIX_ONLY}:
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
for name in {POSIX_ONLY}:
    sys.modules.pop(name, None)
import importlib, pkgutil
import monosemy
for module in pkgutil.walk_packages(monosemy.__path__, "monosemy."):
    if module.name != "monosemy.__main__" and not module.name.startswith("monosemy.ops.triton"):
        importlib.import_module(module.name)
import torch
draw = torch.Generator().manual_seed(0)
names = "standard standard_new gated p_anneal jump_relu top_k batch_top_k matryoshka_batch_top_k".split()
specs = [monosemy.SAESpec(name, 64, settings={{"k": 4}} if "top_k" in name else {{}}) for name in names]
batches = [torch.randn(64, 16, generator=draw) for _ in range(40)]
fitted = monosemy.fit(batches, specs, checkpoints=sys.argv[1], checkpoint_every=20)
assert fitted.status == "complete", fitted.failed
monosemy.save(fitted.saes[5], sys.argv[2], {{"status": "complete"}})
assert torch.equal(monosemy.load(sys.argv[2]).W_dec, fitted.saes[5].W_dec)
from monosemy.ops.backends import backend_for
print(backend_for(torch.zeros(1)).__name__)
"""


def test_without_posix_and_a_compiler_it_imports_and_trains(tmp_path):
    """As on Windows and macOS: no module that is POSIX's alone, no compiler, torch's form of the ops."""
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "checkpoints"), str(tmp_path / "sae")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CC": "no-such-compiler",
            "MONOSEMY_CACHE": str(tmp_path / "cache"),
            "USERNAME": "someone",  # which Windows always has; torch asks for it
        },
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "monosemy.ops.aten"
    assert ran.stderr.count("compiled ops cannot be had") == 1
