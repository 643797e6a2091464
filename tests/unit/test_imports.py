"""Dependencies run one way (see "Reading order" in the README): what each part must not import."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("dpo", "data_utils", "launch", "benchmarks", "train_dpo")
MODULES = sorted(path for package in TOP[:4] for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def path_of(module: str) -> Path | None:
    base = ROOT / Path(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def imports(path: Path, *, lazy: bool) -> frozenset[str]:
    """Modules that a file imports at run time; `lazy`: also inside functions."""
    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(path.read_text())]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if path_of(name) else str(node.module) for name in names)
        elif not is_type_checking(node) and (lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            queue.extend(ast.iter_child_nodes(node))
    return frozenset(found)


def reach(module: str) -> set[str]:
    """Everything that importing `module` imports, through our own modules."""
    seen: set[str] = set()
    queue = [module]
    while queue:
        path = path_of(queue.pop())
        if path is not None:
            new = imports(path, lazy=False) - seen
            seen |= new
            queue.extend(new)
    return seen


def roots(modules: set[str] | frozenset[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("module", ["dpo.scores", "dpo.report.__main__", "dpo.report.page"])
def test_the_report_imports_no_torch(module: str) -> None:
    assert roots(reach(module)) & {"torch", "transformers", "deepspeed", "peft", "datasets"} == set()


PURE = "dpo.config dpo.config_help dpo.plan dpo.ds_json dpo.loss_types dpo.estimate dpo.propose dpo.planner"


@pytest.mark.parametrize("module", PURE.split())
def test_config_modules_import_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "numpy", "deepspeed", "peft", "datasets", "accelerate"}
    assert roots(reach(module)) & heavy == set()


def test_data_utils_knows_neither_dpo_nor_other_ranks() -> None:
    for path in (path for path in MODULES if name_of(path).startswith("data_utils")):
        found = imports(path, lazy=True)
        assert "dpo" not in roots(found), path
        assert not [name for name in found if name.startswith("torch.distributed")], path


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("dpo.loss", {"dpo.loss_links", "dpo.loss_terms"}),
        ("dpo.loss_links", {"dpo.loss_terms"}),
        ("dpo.loss_terms", set()),
        ("dpo.logps", {"data_utils.schema"}),
        ("dpo.plan", {"dpo.refusals", "dpo.sections", "dpo.planner"}),
    ],
)
def test_the_pure_parts_import_nothing_of_ours_but_their_input(module: str, allowed: set[str]) -> None:
    path = path_of(module)
    assert path is not None
    ours = {name for name in imports(path, lazy=True) if name.split(".")[0] in TOP}
    assert ours - allowed == set()


def test_engines_know_no_loss() -> None:
    for path in (path for path in MODULES if name_of(path).startswith("dpo.engine")):
        assert not [name for name in imports(path, lazy=True) if name.startswith("dpo.loss")], path


def test_only_world_checkpoint_and_engines_talk_to_other_ranks() -> None:
    allowed = ("dpo.world", "dpo.checkpoint", "dpo.engine")
    for path in (path for path in MODULES if name_of(path).startswith("dpo.")):
        if not name_of(path).startswith(allowed):
            found = imports(path, lazy=True)
            assert not [name for name in found if name.startswith("torch.distributed")], path


def test_nothing_imports_the_trainer() -> None:
    for path in MODULES:
        assert "train_dpo" not in imports(path, lazy=True), path
