"""The shape of the project: which way imports point, what importing costs, what the linters say."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taylor_cuda
from taylor_cuda.kernels import MODULE_OF_OP
from taylor_cuda.ops import backends, reference

# The forward and the backward op of a public function that is neither, and which no C++ implements: Triton does, and
# the masked convolution is made of other ops besides.
HALVES = {
    f"{public}_{half}": public for public in ("batch_norm_relu", "masked_conv2d") for half in ("forward", "backward")
}
WHOLE = [op for op in backends.OPS if op not in HALVES]

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "taylor_cuda"

# In the order in which a model flows through them: a stage may import from itself and from those before it.
STAGES = [
    "errors",
    "text",
    "files",
    "ops",
    "distributed",
    "graph",
    "importance",
    "planning",
    "surgery",
    "study",
    "pruner",
    "watched",
]
LATER = ["methods", "integrations", "train", "report", "bench", "cli"]
ORDER = {name: rank for rank, name in enumerate([*STAGES, *LATER])}
TOP = {"__init__", "__main__", "info"}  # may import anything; nothing but cli imports info


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def stage_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def sources() -> dict[str, Path]:
    """``{place in the package: file}``; bench/ lies beside the package and is installed as a part of it."""
    package = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    return package | {str(path.relative_to(ROOT)): path for path in (ROOT / "bench").rglob("*.py")}


@pytest.mark.parametrize(("place", "path"), sorted(sources().items()), ids=lambda value: str(value))
def test_imports_point_one_way(place: str, path: Path) -> None:
    relative = Path(place)
    stage = relative.parts[0].removesuffix(".py")
    for module in imports(path):
        assert not module.startswith(("kernels", "bench")), f"{path} imports {module}, which would be a second copy"
        if not module.startswith("taylor_cuda") or stage in TOP:
            continue
        used = stage_of(module)
        if stage in ("bench", "cli") and used in ("info", "__version__", ""):
            continue
        if used in ORDER:
            assert ORDER[used] <= ORDER[stage], f"{relative} imports {module}, which comes after it"
        else:
            assert used in taylor_cuda.__all__ or used == "", f"{relative} imports {module}, which has no stage"
            assert stage in ("bench", "cli"), f"{relative} imports from the package itself: {module}"


def test_every_stage_has_a_place() -> None:
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    there = {name for name in there if not name.startswith("_")} - {"info", "kernels"}
    assert there <= set(ORDER)


def test_reference_and_kernels_are_leaves() -> None:
    definitions = {f"taylor_cuda.ops.{path.stem}" for path in (PACKAGE / "ops").glob("reference*.py")}
    for definition in (PACKAGE / "ops").glob("reference*.py"):
        modules = {module for module in imports(definition) if module.startswith("taylor_cuda")}
        assert {module.rpartition(".")[0] for module in modules} <= definitions
    for path in (ROOT / "kernels").glob("*.py"):
        for module in imports(path):
            assert not module.startswith("taylor_cuda") or module.startswith("taylor_cuda.kernels"), (path, module)
            assert not module.startswith("kernels"), (path, module)
    assert not imports(ROOT / "kernels" / "__init__.py") - {"__future__.annotations"}


def test_only_backends_reaches_kernels() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "backends.py":
            assert "taylor_cuda.kernels" not in path.read_text(encoding="utf-8"), path


def test_nobody_uses_is_available_to_decide_what_to_build() -> None:
    assert "is_available()" not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_importing_is_lean() -> None:
    """No Triton, no CUDA context, none of the extras."""
    heavy = ["triton", "torchvision", "sklearn", "matplotlib", "timm", "torch_pruning", "scipy"]
    code = (
        "import sys, torch\n"
        f"heavy = {heavy!r}\n"
        "before = set(sys.modules)\n"
        "import taylor_cuda\n"
        "new = set(sys.modules) - before\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([name for name in heavy if name in new])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"


def parameters(function: object) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("op", backends.OPS)
def test_one_op_has_one_signature(op: str) -> None:
    """The reference is the definition; the public function, the schema, the native op and the kernel say the same."""
    expected = parameters(getattr(reference, op))
    if op in WHOLE:
        assert parameters(getattr(taylor_cuda.ops, op)) == expected
    names = [name for name, _ in expected]
    schema = getattr(torch.ops.taylor_cuda, op).default._schema
    assert [argument.name for argument in schema.arguments] == names
    if backends.load_native("cpu") and op in WHOLE:
        native = getattr(torch.ops.taylor_cuda_native, op).default._schema
        assert [argument.name for argument in native.arguments] == names
    if op in MODULE_OF_OP:
        source = ROOT / "kernels" / (MODULE_OF_OP[op].rpartition(".")[2] + ".py")
        tree = ast.parse(source.read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert [argument.arg for argument in functions[op].args.args] == names


@pytest.mark.parametrize("op", WHOLE)
def test_an_op_has_its_name_in_every_folder(op: str) -> None:
    assert (ROOT / "csrc" / "cpu" / f"{op}.cpp").is_file()
    assert (ROOT / "csrc" / "cuda" / f"{op}.cu").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()


@pytest.mark.parametrize("op", HALVES)
def test_a_fused_op_has_its_name_in_its_folders(op: str) -> None:
    assert (ROOT / "kernels" / f"{HALVES[op]}.py").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{HALVES[op]}.py").is_file()


def test_files_stay_short() -> None:
    """A file over 400 lines wants a reason; there is none so far."""
    for folder in ("taylor_cuda", "kernels", "csrc", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def run_linter(*command: str, cwd: Path) -> None:
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."]], ids=" ".join)
def test_linters_are_silent(command: list[str]) -> None:
    run_linter(*command, cwd=ROOT)


def test_types_are_right(tmp_path: Path) -> None:
    """Of the package as it is installed: with bench/ in it."""
    package = tmp_path / "taylor_cuda"
    package.mkdir()
    for path in PACKAGE.iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path.resolve())
    if not (package / "bench").exists():
        (package / "bench").symlink_to(ROOT / "bench")
    cache = ROOT / ".mypy_cache" / "installed"
    run_linter("mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache), cwd=tmp_path)
