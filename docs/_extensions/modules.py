"""Shows an `equinox.Module` as the dataclass that it is, signature included.

The documentation is made from the source, without importing it, and the source of a
module carries no decorator to say so.
"""

from typing import Any

from griffe import (
    Attribute,
    Class,
    Decorator,
    Expr,
    ExprAttribute,
    ExprCall,
    ExprName,
    Extension,
    Module,
)


def _dataclasses(name: str) -> ExprAttribute:
    return ExprAttribute([ExprName("dataclasses"), ExprName(name, "dataclasses")])


def _is_equinox(base: Expr | str) -> bool:
    return isinstance(base, Expr) and base.canonical_path == "equinox.Module"


def _is_module(class_: Class) -> bool:
    return any(
        _is_equinox(base) for parent in (class_, *class_.mro()) for base in parent.bases
    )


class Modules(Extension):
    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        del kwargs
        self._visit(pkg)

    def _visit(self, parent: Module | Class) -> None:
        for member in parent.members.values():
            if isinstance(member, Class):
                self._mark(member)
            if isinstance(member, Class | Module):
                self._visit(member)

    def _mark(self, class_: Class) -> None:
        # All fields sit in one class, and that class is not an interface.
        if class_.name.startswith("Abstract") or "__init__" in class_.members:
            return
        if not _is_module(class_):
            return
        decorator = _dataclasses("dataclass")
        class_.decorators.append(Decorator(decorator, lineno=None, endlineno=None))
        for field in class_.members.values():
            if isinstance(field, Attribute) and isinstance(field.value, ExprCall):
                if field.value.canonical_path == "equinox.field":
                    field.value.function = _dataclasses("field")
