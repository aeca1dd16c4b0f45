"""The one way in which a module's forward is changed from outside: it becomes another class, in place."""

from torch import nn


def swap(module: nn.Module, form: type[nn.Module], **attributes) -> None:
    """Let a module compute as `form`, a class derived from its own or one that its own is derived from.

    Its parameters, their names, its hooks and whoever holds it notice nothing; `attributes` are set besides.
    """
    assert issubclass(form, type(module)) or issubclass(type(module), form), (type(module), form)
    module.__class__ = form
    for name, value in attributes.items():
        setattr(module, name, value)
