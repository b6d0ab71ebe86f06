"""Methods of one object wrapped, and unwrapped again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Put ``around(method, ...)`` in the place of a method of one object; returns what takes it away again.

    Where the method is the class's, it is looked up at each call, so that what others put into the class later on is
    called as well.

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
        present = method if own else getattr(type(owner), name).__get__(owner)
        return around(present, *args, **kwargs)

    setattr(owner, name, wrapped)

    def undo() -> None:
        if vars(owner).get(name) is not wrapped:
            return  # somebody has wrapped it again, and calls us: we do nothing any more
        if own:
            setattr(owner, name, method)
        else:
            delattr(owner, name)

    return undo


def tell_norms(accelerator: Any, tell: Callable[[Tensor | float], None]) -> Callable[[], None]:
    """Tell the Euclidean norms that gradients have before ``accelerator.clip_grad_norm_``; returns what ends it."""
    ended = False

    def clip(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = method(*args, **kwargs)
        euclidean = (args[2] if len(args) > 2 else kwargs.get("norm_type", 2)) == 2
        if not ended and euclidean and isinstance(norm, Tensor | float):
            tell(norm)
        return norm

    undo = wrap(accelerator, "clip_grad_norm_", clip)

    def end() -> None:
        nonlocal ended
        ended = True  # also where somebody has wrapped the method again, and goes on calling us
        undo()

    return end
