"""The rules of the house, read from the source: who imports whom, where the environment is read,
sizes.

Checks read the tree with `ast`; nothing is imported.
"""

import ast
import functools
import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = ("kernels_pallas", "model", "train", "configs")  # each may import itself and those before
GROUND_FLOOR = {"jax", "jaxlib", "chex", "numpy"}  # besides the standard library
MAX_LINES = 500
# Programs of their own set what they need before jax starts; so does tests/aot.
ENVIRONMENT = {
    "train/launch.py",
    "train/compile.py",
    "tests/conftest.py",
    "tests/golden/__main__.py",
}
VERSIONS = {"kernels_pallas/compat.py"}
OUTSIDE = {".venv", "build", "dist", "runs", "shared", "node_modules"}


def _files(*tops: str) -> list[pathlib.Path]:
    """Python files under the given folders, or all of the repository's."""
    found = []
    for start in [ROOT / top for top in tops] if tops else [ROOT]:
        for path in start.rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            if not any(p in OUTSIDE or p.startswith(".") or p.endswith(".egg-info") for p in parts):
                found.append(path)
    return sorted(found)


def _name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), _name(path))


PACKAGE = [ROOT / "__init__.py", *_files(*LAYERS)]
EVERYTHING = _files()


def _imports(path: pathlib.Path):
    """(line, relative?, target) of every import, the target as a path of names from the root."""
    parts = path.relative_to(ROOT).parts
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, False, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if not node.level:
                yield node.lineno, False, module
                continue
            above = len(parts) - node.level
            assert above >= 0, f"{_name(path)}:{node.lineno} imports from above the package"
            for alias in node.names if not module else [None]:
                yield node.lineno, True, parts[:above] + (module or (alias.name,))


def _attributes(path: pathlib.Path):
    """(line, "a.b.c") of every dotted name."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute):
            names, at = [node.attr], node.value
            while isinstance(at, ast.Attribute):
                names, at = [at.attr, *names], at.value
            if isinstance(at, ast.Name):
                yield node.lineno, ".".join([at.id, *names])


def _fail(problems: list[str]):
    assert not problems, "\n" + "\n".join(problems)


def direction_problems(path: pathlib.Path) -> list[str]:
    own = path.relative_to(ROOT).parts[0]
    allowed = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else LAYERS[:-1]
    problems = []
    for line, relative, target in _imports(path):
        if relative and target and target[0] in (*LAYERS, "tests") and target[0] not in allowed:
            problems.append(f"{_name(path)}:{line} {own} may not import {'.'.join(target)}")
    return problems


def test_import_direction():
    _fail([p for path in PACKAGE for p in direction_problems(path)])


def test_nothing_imports_configs_or_tests():
    # train/ finds configs by path, never by import; configs import the schema.
    problems = []
    for path in PACKAGE:
        for line, _, target in _imports(path):
            mine = path.relative_to(ROOT).parts[0] == "configs"
            head = target[1:] if target[:1] == ("lintime",) else target
            if head[:1] == ("tests",) or (head[:1] == ("configs",) and not mine):
                problems.append(f"{_name(path)}:{line} imports {'.'.join(target)}")
    _fail(problems)


def test_imports_inside_the_package_are_relative():
    problems = []
    for path in PACKAGE:
        for line, relative, target in _imports(path):
            if not relative and target[0] in ("lintime", *LAYERS, "tests"):
                problems.append(f"{_name(path)}:{line} import {'.'.join(target)}: make it relative")
    _fail(problems)


def test_tests_and_benchmarks_import_the_package_by_name():
    problems = []
    for path in _files("tests", "benchmarks"):
        for line, relative, target in _imports(path):
            if not relative and target[0] in LAYERS:
                problems.append(
                    f"{_name(path)}:{line} import {target[0]}: write lintime.{target[0]}"
                )
    _fail(problems)


def test_ground_floor_imports_jax_only():
    problems = []
    for path in _files("kernels_pallas"):
        for line, relative, target in _imports(path):
            known = target[:1] and (
                target[0] in GROUND_FLOOR or target[0] in sys.stdlib_module_names
            )
            if not relative and not known:
                problems.append(f"{_name(path)}:{line} imports {'.'.join(target)}")
    _fail(problems)


def test_model_touches_no_files_and_no_environment():
    forbidden = {"os", "pathlib", "shutil", "subprocess", "argparse", "logging", "tempfile"}
    convert = ROOT / "model" / "convert"  # reads published files
    problems = []
    for path in _files("kernels_pallas", "model"):
        if convert in path.parents:
            continue
        for line, _, target in _imports(path):
            if target[0] in forbidden:
                problems.append(f"{_name(path)}:{line} imports {target[0]}")
    _fail(problems)


def test_jax_versions_are_known_to_compat_only():
    names = {"jax.__version__", "jax.__version_info__", "jaxlib.__version__", "jax.version"}
    problems = [
        f"{_name(path)}:{line} {name}: put the difference into kernels_pallas/compat.py"
        for path in PACKAGE
        if _name(path) not in VERSIONS
        for line, name in _attributes(path)
        if name in names and not _is_report(path, line)
    ]
    _fail(problems)


def _is_report(path: pathlib.Path, line: int) -> bool:
    """A version that is only written down (metadata of a run, a benchmark's table), not
    compared.
    """
    for node in ast.walk(_tree(path)):
        tests = [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)) else []
        tests += [node] if isinstance(node, ast.Compare) else []
        if any(t.lineno <= line <= t.end_lineno for t in tests):
            return False
    return True


def test_environment_is_read_in_few_places():
    problems = []
    for path in EVERYTHING:
        if _name(path) in ENVIRONMENT or _name(path).startswith("tests/aot/"):
            continue
        # Tests may copy it for a child process; to change their own they have monkeypatch.
        test = _name(path).startswith("tests/")
        stores = {
            node.lineno
            for node in ast.walk(_tree(path))
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
        }
        for line, name in _attributes(path):
            if not name.startswith(("os.environ", "os.getenv", "os.putenv")):
                continue
            reads = name in ("os.environ", "os.environ.get", "os.environ.copy")
            if not test or not reads or line in stores:
                problems.append(f"{_name(path)}:{line} {name}")
    _fail(problems)


def test_no_devices_at_import():
    problems = []
    for path in PACKAGE:
        for node in _tree(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                continue
            for call in ast.walk(node):
                text = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
                if text in ("jax.devices", "jax.local_devices", "jax.device_count"):
                    problems.append(f"{_name(path)}:{call.lineno} {text} at import")
    _fail(problems)


def test_files_stay_short():
    problems = []
    for path in EVERYTHING:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_LINES:
            problems.append(f"{_name(path)} has {lines} lines, more than {MAX_LINES}")
    _fail(problems)


def test_age_markers_are_absent():
    old = {"jax.tree_map", "jax.pmap", "jax.experimental.shard_map", "jax.random.PRNGKey"}
    problems = [
        f"{_name(path)}:{line} {name}"
        for path in PACKAGE
        for line, name in _attributes(path)
        if name in old
    ]
    _fail(problems)


def test_package_list_is_complete():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in PACKAGE}
    wanted = {".".join(("lintime", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert sorted(listed) == sorted(wanted), "pyproject.toml: [tool.setuptools] packages"
    missing = [str(f) for f in folders if not (f / "__init__.py").exists()]
    assert not missing, f"folders of modules without __init__.py: {missing}"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'__version__ = "{project["version"]}"' in (ROOT / "__init__.py").read_text()


def test_everything_parses_as_the_oldest_python():
    for path in EVERYTHING:
        ast.parse(path.read_text(encoding="utf-8"), _name(path), feature_version=(3, 11))


def test_the_checks_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    bad = tmp_path / "kernels_pallas" / "op" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "from ...model.layers import norms\nfrom ... import train\nfrom .. import compat\n"
    )
    assert [p.partition(" ")[2] for p in direction_problems(bad)] == [
        "kernels_pallas may not import model.layers",
        "kernels_pallas may not import train",
    ]
    bad.write_text("import jax\nif jax.__version__ > '0.11':\n    pass\nprint(jax.__version__)\n")
    _tree.cache_clear()
    assert [_is_report(bad, line) for line, _ in _attributes(bad)] == [False, True]
    _tree.cache_clear()
