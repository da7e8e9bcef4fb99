"""Who may import whom, read from the source: kernels below attention, attention below training."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
KERNELS = REPOSITORY / "kernels" / "msa_kernels"
PACKAGE = REPOSITORY / "megatron_msa"

# Megatron's training package is large and, without a GPU, must be prepared for before it is imported. Two
# modules subclass or read its settings; the rest of `data` imports it where it is used.
MAY_IMPORT_MEGATRON_TRAINING = ("model/gpt.py", "model/from_checkpoint.py", "data/preprocess.py")
MAY_IMPORT_MEGATRON_TRAINING_LATE = "data/"
ON_TOP = ("training", "planning", "evaluation")


class Import(NamedTuple):
    """One imported thing: `import a.b` gives a.b, `from a import b` gives a.b, too."""

    line: int
    path: str
    late: bool
    """Inside a function, or for type checkers only."""

    def is_of(self, *packages: str) -> bool:
        return any(f"{self.path}.".startswith(f"{package}.") for package in packages)


def imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, id(node) in late)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield Import(node.lineno, f"{module}.{alias.name}", id(node) in late)


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"no source in {folder}"
    return found


def below_training() -> list[Path]:
    return [path for path in sources(PACKAGE) if path.relative_to(PACKAGE).parts[0] not in ON_TOP]


def kernel_violations(path: Path) -> list[Import]:
    return [
        each
        for each in imports(path)
        if not each.is_of("torch", "triton", "msa_kernels", *sys.stdlib_module_names)
    ]


def attention_violations(path: Path, public_ops: set[str]) -> list[Import]:
    own = ("attention", "config", "phases", "errors")
    allowed = (
        *("torch", "megatron.core", *sys.stdlib_module_names),
        *(f"megatron_msa.{name}" for name in own),
    )
    ops = {f"msa_kernels.{name}" for name in public_ops}
    return [each for each in imports(path) if not (each.is_of(*allowed) or each.path in ops)]


def training_violations(path: Path, place: str) -> list[Import]:
    """Imports of what lies on top; ``place`` is the path within the package."""
    found = []
    for each in imports(path):
        if each.is_of("megatron_msa.training"):
            found.append(each)
        if each.is_of("megatron.training"):
            late = each.late and place.startswith(MAY_IMPORT_MEGATRON_TRAINING_LATE)
            if each.path.endswith(".get_args") or not (late or place in MAY_IMPORT_MEGATRON_TRAINING):
                found.append(each)
    return found


def public_ops() -> set[str]:
    tree = ast.parse((KERNELS / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(names)


def shown(path: Path, violations: list[Import]) -> list[str]:
    return [f"{path.relative_to(REPOSITORY)}:{each.line} imports {each.path}" for each in violations]


def test_the_kernels_need_torch_and_triton_only():
    assert [line for path in sources(KERNELS) for line in shown(path, kernel_violations(path))] == []


def test_the_kernels_folder_is_not_a_package():
    """A package called `kernels` would hide another library of that name."""
    assert not (KERNELS.parent / "__init__.py").exists()


def test_attention_takes_the_public_ops_and_nothing_above_it():
    names = public_ops()
    assert {"block_select", "sparse_attention", "dense_kl"} <= names
    found = [
        line
        for path in sources(PACKAGE / "attention")
        for line in shown(path, attention_violations(path, names))
    ]
    assert found == []


def test_nothing_below_training_imports_it_or_megatrons():
    found = [
        line
        for path in below_training()
        for line in shown(path, training_violations(path, path.relative_to(PACKAGE).as_posix()))
    ]
    assert found == []


def test_nothing_below_training_reads_megatrons_global_arguments():
    calls = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in below_training()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "get_args"
    ]
    assert calls == []


@pytest.mark.parametrize(
    "line",
    [
        "import megatron.core",
        "from megatron_msa.errors import ConfigError",
        "import numpy",
        "def f():\n    import megatron",
        "from .. import block_select",
    ],
)
def test_the_check_of_the_kernels_finds_violations(line, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(f"import torch\nimport triton.language as tl\n{line}\n")
    assert len(kernel_violations(path)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import msa_kernels",
        "from msa_kernels import _private",
        "from msa_kernels.block_select.reference import block_select_reference",
        "from megatron.training import get_args",
        "from megatron_msa.model.gpt import MSAModelConfig",
        "from megatron_msa.data import batch",
        "import triton",
    ],
)
def test_the_check_of_attention_finds_violations(line, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(f"from megatron.core import utils\nfrom msa_kernels import dense_kl\n{line}\n")
    assert {each.line for each in attention_violations(path, {"dense_kl"})} == {3}


@pytest.mark.parametrize(
    ("place", "line", "is_allowed"),
    [
        ("model/gpt.py", "from megatron.training.models.gpt import GPTModelConfig", True),
        ("model/other.py", "from megatron.training.models.gpt import GPTModelConfig", False),
        ("data/batch.py", "import megatron.training", False),
        ("data/batch.py", "def f():\n    from megatron.training.utils import x", True),
        ("data/batch.py", "def f():\n    from megatron.training import get_args", False),
        ("checkpoint/x.py", "def f():\n    from megatron.training.utils import x", False),
        ("data/batch.py", "from megatron_msa.training import no_gpu", False),
        ("data/batch.py", "def f():\n    from megatron_msa import training", False),
    ],
)
def test_the_check_of_training_finds_violations(place, line, is_allowed, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(line + "\n")
    assert (training_violations(path, place) == []) == is_allowed
