"""How the repository is laid out: who imports whom, how many files there are, how long; why a checker is silenced."""

import ast
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each part may import of ours, beside itself.
BASE = {"audio_files", "configuration_seam", "processing_seam"}
ALLOWED = {
    "audio_files": set(),
    "configuration_seam": set(),
    "processing_seam": {"audio_files"},
    "modeling_seam": BASE,  # in its `__init__.py` alone: see below
    "data": BASE,
    "evaluation": BASE | {"data", "modeling_seam"},
    "train": BASE | {"data", "modeling_seam", "evaluation"},
    "publishing": BASE | {"data", "modeling_seam", "evaluation"},
    "experiments": BASE | {"data", "modeling_seam", "evaluation", "train", "publishing"},
    "arguments": {"audio_files", "data"},  # of the command line
    "__main__": BASE | {"arguments", "data", "modeling_seam", "evaluation", "train", "publishing", "experiments"},
}
REMOTE_CODE = ["audio_files.py", "configuration_seam.py", "processing_seam.py"]
REMOTE_CODE += [f"modeling_seam/{path.name}" for path in (ROOT / "modeling_seam").glob("[!_]*.py")]
FOLDERS = [ROOT / name for name in (*ALLOWED, "bench") if (ROOT / name).is_dir()]
SOURCES = [*sorted(ROOT.glob("*.py")), *(path for folder in FOLDERS for path in sorted(folder.rglob("*.py")))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the module that a file is, within the package; a package's own file has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path) for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Those of our modules that a file imports, anywhere but under `if TYPE_CHECKING`."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in _run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["seam", *package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name.startswith(("seam.", "bench.")):
                module = name.removeprefix("seam.")
                if module in MODULES:
                    found.add(module)
                    break
                name = name.rpartition(".")[0]
    return found - {name_of(path)}


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that a type checker alone reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _run(child)


def part(module: str) -> str:
    return module.partition(".")[0]


def test_the_imports_are_read():
    """Or all that follows would pass on nothing."""
    assert imports(ROOT / "modeling_seam" / "modeling_seam.py") >= {"modeling_seam.nearest", "modeling_seam.generation"}
    assert imports(ROOT / "__main__.py") >= {"train.alignment", "data.prepare"}  # within functions
    assert imports(ROOT / "bench" / "training" / "__main__.py") & {"bench.common", "bench.training"}


@pytest.mark.parametrize("own", ALLOWED)
def test_no_import_against_the_directions(own):
    for path in SOURCES:
        if part(name_of(path)) == own:
            assert {part(module) for module in imports(path)} <= ALLOWED[own] | {own}, path


def test_no_circle():
    graph = {name_of(path): imports(path) for path in SOURCES}
    # A package's own file is read before its modules, and `modeling_seam/__init__.py` names what they define.
    graph["modeling_seam"] = set()
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", REMOTE_CODE)
def test_remote_code_imports_siblings_only(file):
    """`from .nearest import …`: transformers copies no other file of a checkpoint."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(part(alias.name) in ("seam", "bench", "tests", *ALLOWED) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{file}:{node.lineno}: transformers copies no other folder"
            if node.level:
                assert node.module and (ROOT / file).with_name(f"{node.module}.py").is_file(), f"{file}:{node.lineno}"
            else:
                assert part(node.module) not in ("seam", "bench", "tests", *ALLOWED), f"{file}:{node.lineno}"


def test_the_model_imports_every_sibling_itself():
    """Transformers before about 5.12 copies what the file that is loaded imports, and not what those import."""
    folder = ROOT / "modeling_seam"
    siblings = {f"modeling_seam.{path.stem}" for path in folder.glob("*.py")} - {"modeling_seam.__init__"}
    assert imports(folder / "modeling_seam.py") == siblings - {"modeling_seam.modeling_seam"}


def test_nothing_imports_tests_or_bench():
    for path in SOURCES:
        names = re.findall(r"^\s*(?:from|import) (?:seam\.)?(tests|bench)\b", path.read_text(encoding="utf-8"), re.M)
        assert not names or set(names) == {"bench"} and part(name_of(path)) == "bench", path


def test_files_are_few_and_neither_long_nor_short():
    # 100 until real backbones came: packages converted, tables re-written, the encoder's window, training on people;
    # 110 until nothing was taken on trust: one decoder for all audio, shards read header by header, YAML 1.2.
    assert len(SOURCES) <= 116
    for path in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 600, path
        assert lines >= 20 or path.name == "__init__.py", path


def test_no_file_name_twice():
    names = Counter(path.name for path in SOURCES if path.name not in ("__init__.py", "__main__.py"))
    assert max(names.values()) == 1, names.most_common(3)


def test_what_silences_a_checker_says_why():
    """The rule by its name, then the reason; or the reason in a comment above."""
    rule = re.compile(r"# *(noqa|(type|pyright): *ignore)")
    explained = re.compile(rule.pattern + r"(: *[A-Z]+\d+(, *[A-Z]+\d+)*|\[[\w, -]+\])\W+\w.*")
    for path in [*SOURCES, *TESTS]:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for token in tokenize.generate_tokens(iter(lines).__next__):
            if token.type == tokenize.COMMENT and rule.search(token.string):
                above = [line.strip() for line in lines[max(token.start[0] - 3, 0) : token.start[0] - 1]]
                if any(line.startswith("# ") for line in above):
                    continue
                assert explained.search(token.string), f"{path}:{token.start[0]}: {token.string}"
