"""Which names of TensorRT our sources use, and which ones NVIDIA publishes, without TensorRT itself.

Uses are read from the sources: `trt` is called TensorRT's module everywhere, and what its calls and attributes return
is followed by the types of the stubs. Published are the stubs of TensorRT 10.13 with types, and the bindings of 11.4, a
binary whose names are its strings.
"""

import ast
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MODULE = "tensorrt"
OPENS_MODULE = "backend_module"
DEPRECATED = re.compile(r"^\s*\[DEPRECATED\]", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Use:
    """A name that is read from a class of TensorRT, or from the module itself."""

    owner: str
    name: str


# What the stubs leave untyped.
UNTYPED = {Use("OnnxParser", "get_error"): "ParserError"}


@dataclass(frozen=True)
class Published:
    """The attributes of each class with the type of what they hold or return; those that are to go."""

    types: dict[str, dict[str, str]] = field(default_factory=dict)
    deprecated: set[Use] = field(default_factory=set)


def published_by_stubs(wheel: Path) -> Published:
    with zipfile.ZipFile(wheel) as archive:
        found = Published()
        for name in ("tensorrt_bindings/tensorrt.pyi", "tensorrt_bindings/__init__.pyi"):
            # Without parameters, not all of which are valid Python.
            text = re.sub(r"(def \w+)\(.*\)(?= ->|:)", r"\1()", archive.read(name).decode())
            _read_members(ast.parse(text).body, MODULE, found)
    return found


def _read_members(body: Iterable[ast.stmt], owner: str, found: Published) -> None:
    members = found.types.setdefault(owner, {})
    for node in body:
        if isinstance(node, ast.ClassDef):
            name = node.name if owner == MODULE else f"{owner}.{node.name}"
            members[node.name] = f"type:{name}"
            for base in node.bases:
                found.types.setdefault(name, {}).update(found.types.get(ast.unparse(base), {}))
            _read_members(node.body, name, found)
            members_told = re.split(r"^\s+(\w+) :", ast.get_docstring(node, clean=False) or "", flags=re.MULTILINE)
            told = dict(zip(members_told[1::2], members_told[2::2], strict=True))
            found.deprecated.update(Use(name, member) for member, text in told.items() if DEPRECATED.search(text))
        elif isinstance(node, ast.FunctionDef):
            members[node.name] = ast.unparse(node.returns) if node.returns else ""
            if DEPRECATED.search(ast.get_docstring(node) or ""):
                found.deprecated.add(Use(owner, node.name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members[node.target.id] = owner if "ClassVar" in ast.unparse(node) else ast.unparse(node.annotation)


def published_by_bindings(wheel: Path) -> bytes:
    """The binary, and the functions of the Python file beside it."""
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read("tensorrt_bindings/__init__.py"))
        beside = [f"{function.name}\0".encode() for function in _functions(tree)]
        return b"".join([archive.read("tensorrt_bindings/tensorrt.so"), *beside])


def is_in(bindings: bytes, name: str) -> bool:
    """Whether a string ends so: the linker keeps one name as the end of another."""
    return f"{name}\0".encode() in bindings


class Reader:
    """Follows the types of TensorRT through the functions of all sources, until nothing new is found."""

    def __init__(self, sources: Mapping[str, str], types: Mapping[str, Mapping[str, str]]) -> None:
        self.types = types
        self.uses: set[Use] = set()
        self._returns: dict[tuple[str, str], str] = {}
        self._parameters: dict[tuple[str, str, str], str] = {}
        self._attributes: dict[tuple[str, str], str] = {}
        trees = {file: ast.parse(text) for file, text in sources.items()}
        self._functions = {(file, node.name): node for file, tree in trees.items() for node in _functions(tree)}
        size = -1
        while size != (size := sum(map(len, (self.uses, self._returns, self._parameters, self._attributes)))):
            for file, tree in trees.items():
                self._read(tree, {}, file)
                for function in _functions(tree):
                    self._read_function(function, file)

    def _read_function(self, function: ast.FunctionDef, file: str) -> None:
        known = {arg.arg: self._parameters.get((file, function.name, arg.arg), "") for arg in function.args.args}
        self._read(function, known, file)
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Return)
                and node.value is not None
                and (kind := self._type(node.value, known, file))
            ):
                self._returns[file, function.name] = kind

    def _read(self, tree: ast.AST, known: dict[str, str], file: str) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, self._type(node.value, known, file), known, file)
            elif isinstance(node, ast.NamedExpr):
                self._assign(node.target, self._type(node.value, known, file), known, file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Call):
                self._type(node, known, file)

    def _assign(self, target: ast.expr, kind: str, known: dict[str, str], file: str) -> None:
        if not kind:
            return
        if isinstance(target, ast.Name):
            known[target.id] = kind
        elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            self._attributes[file, target.attr] = kind

    def _type(self, node: ast.expr, known: Mapping[str, str], file: str) -> str:
        """The class of TensorRT that an expression is of, `type:` and its name for the class itself, else nothing."""
        if isinstance(node, ast.Name):
            return MODULE if node.id == "trt" else known.get(node.id, "")
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) == "self":
                return self._attributes.get((file, node.attr), "")
            return self._read_from(self._type(node.value, known, file), node.attr)
        if not isinstance(node, ast.Call):
            return ""
        arguments = [self._type(argument, known, file) for argument in node.args]
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            return self._read_from(arguments[0], node.args[1].value)
        if called := self._type(node.func, known, file):
            return called.removeprefix("type:")
        return self._call(ast.unparse(node.func), arguments, file)

    def _call(self, called: str, arguments: list[str], file: str) -> str:
        """What a function or method of ours gives: one of the same file or, where its name is public, of any."""
        name = called.rpartition(".")[2]
        if name == OPENS_MODULE:
            return MODULE
        places = [file, *(other for other, one in self._functions if one == name and not name.startswith("_"))]
        place = next((place for place in places if (place, name) in self._functions), None)
        if place is None:
            return ""
        parameters = [arg.arg for arg in self._functions[place, name].args.args if arg.arg != "self"]
        for parameter, kind in zip(parameters, arguments, strict=False):
            if kind:
                self._parameters[place, name, parameter] = kind
        return self._returns.get((place, name), "")

    def _read_from(self, owner: str, name: str) -> str:
        owner = owner.removeprefix("type:")
        if owner not in self.types:
            return ""
        self.uses.add(Use(owner, name))
        return UNTYPED.get(Use(owner, name)) or self.types[owner].get(name, "")


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
