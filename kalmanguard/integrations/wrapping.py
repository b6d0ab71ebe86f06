"""Methods of one object wrapped, and unwrapped again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Put ``around(method, ...)`` in the place of a method of one object; returns what takes it away again.

    Examples
    --------
    >>> class Greeter:
    ...     def greet(self, name):
    ...         return f"hello {name}"
    >>> greeter = Greeter()
    >>> undo = wrap(greeter, "greet", lambda method, name: method(name).upper())
    >>> greeter.greet("you"), undo(), greeter.greet("you")
    ('HELLO YOU', None, 'hello you')
    """
    method = getattr(owner, name)
    own = name in vars(owner)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(owner, name, wrapped)

    def undo() -> None:
        if vars(owner).get(name) is not wrapped:
            return  # somebody has wrapped it again, and calls us: we do nothing any more
        if own:
            setattr(owner, name, method)
        else:
            delattr(owner, name)

    return undo
