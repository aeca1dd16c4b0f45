"""The one way in which a module's forward is changed from outside: it becomes another class, in place."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def swap(module: nn.Module, form: type[nn.Module], **attributes) -> None:
    """Let a module compute as `form`, a class derived from its own or one that its own is derived from.

    Its parameters, their names, its hooks and whoever holds it notice nothing; `attributes` are set besides.
    """
    assert issubclass(form, type(module)) or issubclass(type(module), form), (type(module), form)
    built_as = vars(module).setdefault("built_as", type(module))
    module.__class__ = form
    if form is built_as:
        del module.built_as
    for name, value in attributes.items():
        setattr(module, name, value)


@contextmanager
def as_built(model: nn.Module) -> Iterator[None]:
    """Inside, every module computes as the class it was built as: the plain model, over the same weights."""
    forms = {module: type(module) for module in model.modules()}
    try:
        for module in forms:
            module.__class__ = vars(module).get("built_as", type(module))
        yield
    finally:
        for module, form in forms.items():
            module.__class__ = form
