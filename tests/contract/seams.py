# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What this package overrides of vLLM and imports from it, read from source files alone.

A subclass of vLLM's runner breaks in silence when a method that it overrides gets another argument
or another name. So for each release that the patches fit a record is kept beside this file: the
signature and a hash of the body of every method of every class that we derive from. `Source` reads
the files of a release, installed or unpacked; `find_seams` finds our overrides in our own files;
`misfits` says which of them no longer answer the calls that vLLM makes. Nothing is imported, so
the files of another release, or of the CUDA wheel on a machine without CUDA, will do.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Function = ast.FunctionDef | ast.AsyncFunctionDef
Methods = dict[str, str]
"""Method name -> its signature as source text, a space, and 8 hex digits of its body's hash."""


@dataclass(frozen=True)
class ClassName:
    """A class by its module and name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


@dataclass
class Source:
    """Python packages below a folder, parsed on demand.

    Attributes:
        root: the folder that holds the package.
        instead: path below `root` -> content to read in place of the file's.
    """

    root: Path
    instead: Mapping[str, bytes] = field(default_factory=dict)
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def module(self, name: str) -> ast.Module | None:
        """The syntax tree of a module or package, None where there is no such file."""
        if name not in self._trees:
            self._trees[name] = None
            stem = name.replace(".", "/")
            for path in (f"{stem}.py", f"{stem}/__init__.py"):
                if path in self.instead or (self.root / path).is_file():
                    content = self.instead.get(path) or (self.root / path).read_bytes()
                    self._trees[name] = ast.parse(content)
                    break
        return self._trees[name]

    def resolve(self, module: str, name: str) -> ClassName | None:
        """The class that `name` is in `module`, followed through imports; None if it is none."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in statements(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return ClassName(module, name)
        target = imported_names(tree, module).get(name)
        if target is None or target == f"{module}.{name}":
            return None
        parent, _, attribute = target.rpartition(".")
        return self.resolve(parent, attribute)

    def has(self, module: str, name: str | None) -> bool:
        """Whether the module exists and, where `name` is given, defines or imports it."""
        tree = self.module(module)
        if tree is None or name is None:
            return tree is not None
        if self.module(f"{module}.{name}") is not None:
            return True
        if name in imported_names(tree, module) or name in defined_names(tree):
            return True
        return any(self.has(other, name) for other in star_imports(tree, module))

    def definition(self, cls: ClassName) -> ast.ClassDef:
        tree = self.module(cls.module)
        assert tree is not None, cls
        return next(
            node
            for node in statements(tree)
            if isinstance(node, ast.ClassDef) and node.name == cls.name
        )

    def bases(self, cls: ClassName) -> Iterator[ClassName]:
        """The direct bases that are found, in order; "pkg.mod:Class" may lie in another package."""
        tree = self.module(cls.module)
        assert tree is not None
        names = imported_names(tree, cls.module)
        for base in self.definition(cls).bases:
            dotted = ast.unparse(base).partition("[")[0]
            head, _, rest = dotted.partition(".")
            full = ".".join(filter(None, [names.get(head, f"{cls.module}.{head}"), rest]))
            module, _, name = full.rpartition(".")
            yield self.resolve(module, name) or ClassName(module, name)

    def methods(self, cls: ClassName) -> dict[str, Function]:
        """The methods of a class and of those bases that are below `root`."""
        found: dict[str, Function] = {}
        if self.module(cls.module) is None:
            return found
        for node in self.definition(cls).body:
            if isinstance(node, Function):
                found[node.name] = node
        for base in self.bases(cls):
            if self.resolve(base.module, base.name):
                found = {**self.methods(base), **found}
        return found


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a module, those inside its `if` and `try` among them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from statements(node)
        elif isinstance(node, ast.stmt):
            yield node


def _parent(node: ast.ImportFrom, module: str, is_package: bool = False) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts[: len(parts) - node.level + is_package]
    return ".".join([*package, *filter(None, [node.module])])


def star_imports(tree: ast.Module, package: str) -> list[str]:
    """The modules of which a package imports everything."""
    return [
        _parent(node, package, is_package=True)
        for node in statements(tree)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]


@functools.cache
def imported_names(tree: ast.Module, module: str) -> dict[str, str]:
    """Local name -> dotted name of what it was imported as; the first import of a name counts."""
    found: dict[str, str] = {}
    for node in statements(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{_parent(node, module)}.{alias.name}"
                found.setdefault(alias.asname or alias.name, name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, alias.name)
    return found


@functools.cache
def defined_names(tree: ast.Module) -> set[str]:
    found = set()
    for node in statements(tree):
        if isinstance(node, ast.ClassDef | Function):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Name):
                found.add(part.id)
    # Lazy modules list what their __getattr__ finds.
    for part in ast.walk(tree):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
    return found


# --- our side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seam:
    """A class of ours and the classes of vLLM that it derives from, at any distance."""

    ours: ClassName
    theirs: tuple[ClassName, ...]


def our_modules() -> list[str]:
    files = sorted((ROOT / "echo_vllm").rglob("*.py"))
    return [
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files
    ]


def find_seams() -> list[Seam]:
    """Every class of ours with a base in vLLM, be it for the type checker alone."""
    ours = Source(ROOT)

    def vllm_bases(cls: ClassName) -> Iterator[ClassName]:
        for base in ours.bases(cls):
            if base.module.partition(".")[0] == "vllm":
                yield base
            elif ours.resolve(base.module, base.name):
                yield from vllm_bases(base)

    seams = []
    for module in our_modules():
        tree = ours.module(module)
        assert tree is not None
        for node in statements(tree):
            if isinstance(node, ast.ClassDef):
                cls = ClassName(module, node.name)
                theirs = tuple(dict.fromkeys(vllm_bases(cls)))
                if theirs:
                    seams.append(Seam(cls, theirs))
    return seams


def our_imports() -> Iterator[tuple[str, str, str | None]]:
    """(module of ours, module of vLLM, name or None) of each import, inside functions too."""
    source = Source(ROOT)
    for module in our_modules():
        tree = source.module(module)
        assert tree is not None
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for alias in node.names:
                    yield module, node.module or "", alias.name
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "vllm":
                        yield module, alias.name, None


# --- the record of a release ------------------------------------------------------------------


def signature(function: Function) -> str:
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"({ast.unparse(function.args)}){returns}"


def described(function: Function) -> str:
    body = "\n".join(ast.dump(statement) for statement in function.body)
    return f"{signature(function)} {hashlib.sha256(body.encode()).hexdigest()[:8]}"


def read_release(vllm: Source) -> dict[str, Methods]:
    """What a release's record holds: "module:Class" -> its methods, for all that we derive from.

    Raises:
        LookupError: naming a class that the release does not have.
    """
    record: dict[str, Methods] = {}
    for cls in sorted({cls for seam in find_seams() for cls in seam.theirs}, key=str):
        found = vllm.resolve(cls.module, cls.name)
        if found is None:
            raise LookupError(f"this vLLM has no {cls}")
        record[str(cls)] = {
            name: described(function) for name, function in sorted(vllm.methods(found).items())
        }
    return record


def record_file(version: str) -> Path:
    return HERE / f"vllm-{version}.json"


def load_record(version: str) -> dict[str, Methods]:
    record: dict[str, Methods] = json.loads(record_file(version).read_text())
    return record


# --- comparisons ------------------------------------------------------------------------------


def parsed(text: str) -> Function:
    """A function with the signature of a record's entry."""
    function = ast.parse(f"def f{text.rpartition(' ')[0]}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


def why_not(ours: Function, theirs: Function) -> str | None:
    """What call that fits `theirs` does not fit `ours`; None if there is none."""
    mine, other = ours.args, theirs.args
    positional = [*mine.posonlyargs, *mine.args]
    expected = [*other.posonlyargs, *other.args]
    names = {argument.arg for argument in [*positional, *mine.kwonlyargs]}
    for place, argument in enumerate(expected):
        if place < len(positional) and positional[place].arg == argument.arg:
            continue
        if mine.vararg and (mine.kwarg or argument.arg in names):
            continue
        if place < len(positional):
            return f"argument {place} is {positional[place].arg}, vLLM's is {argument.arg}"
        return f"it does not take {argument.arg}"
    for argument in other.kwonlyargs:
        if argument.arg not in names and not mine.kwarg:
            return f"it does not take {argument.arg}"
    required = positional[len(expected) : len(positional) - len(mine.defaults)]
    if required:
        return f"it wants {required[0].arg}, which vLLM does not give"
    return None


def overrides(
    record: Mapping[str, Methods],
) -> Iterator[tuple[Seam, ClassName, str, Function, str]]:
    """(seam, vLLM's class, method, ours, vLLM's entry) of each method of ours that vLLM has too.

    Raises:
        LookupError: where the record lacks a class; the message says how to record it.
    """
    source = Source(ROOT)
    for seam in find_seams():
        own = [node for node in source.definition(seam.ours).body if isinstance(node, Function)]
        for cls in seam.theirs:
            if str(cls) not in record:
                raise LookupError(
                    f"{seam.ours} derives from {cls}, of which there is no record; run "
                    "`make port VLLM=X.Y.Z` for each recorded release"
                )
            for function in own:
                if entry := record[str(cls)].get(function.name):
                    yield seam, cls, function.name, function, entry


def misfits(record: Mapping[str, Methods]) -> list[str]:
    """One sentence for each override that does not answer vLLM's calls; we call __init__."""
    return [
        f"{cls}.{name}{entry.rpartition(' ')[0]} is overridden by {seam.ours}.{name}"
        f"{signature(function)}, but {reason}"
        for seam, cls, name, function, entry in overrides(record)
        if name != "__init__" and (reason := why_not(function, parsed(entry)))
    ]


def moved(before: Mapping[str, Methods], after: Mapping[str, Methods]) -> list[str]:
    """One line for each method that we override and that is not the same in both records."""
    lines = {}
    for _, cls, name, _, old in overrides(before):
        new = after.get(str(cls), {}).get(name)
        where = f"{cls}.{name}"
        if new is None:
            lines[where] = f"{where} is gone"
        elif new.rpartition(" ")[0] != old.rpartition(" ")[0]:
            lines[where] = f"{where} was {old.rpartition(' ')[0]} and is {new.rpartition(' ')[0]}"
        elif new != old:
            lines[where] = f"{where} has another body"
    return sorted(lines.values())


def speculative_fields(vllm: Source) -> dict[str, str]:
    """Field -> default, as source text, of vLLM's SpeculativeConfig."""
    config = ClassName("vllm.config.speculative", "SpeculativeConfig")
    return {
        node.target.id: ast.unparse(node.value) if node.value else ""
        for node in vllm.definition(config).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def unresolved_imports(vllm: Source) -> list[str]:
    """One line for each import of ours that the release does not have."""
    return sorted(
        {
            f"{module} imports {name or 'all'} from {theirs}"
            for module, theirs, name in our_imports()
            if not vllm.has(theirs, name)
        }
    )
