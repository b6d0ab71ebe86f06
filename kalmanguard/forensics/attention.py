"""Attention logits as they are computed: a function mode that is active only inside the sampled attention's forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from kalmanguard.forensics.hooks import Hook
from kalmanguard.forensics.samples import Attention

_EXAMPLES, _HEADS, _QUERIES = 2, 4, 8
_SEARCHES = 3
_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch.nn.functional.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum, torch.baddbmm}


class _Mode(TorchFunctionMode):
    """Pass every torch function through, and show scaled products and softmaxes of products to ``see``."""

    def __init__(self, see: Any) -> None:
        super().__init__()
        self._see = see
        self._shapes: set[torch.Size] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._see("scaled", args, kwargs)
        elif func in _PRODUCTS and isinstance(out, Tensor) and out.dim() >= 3:
            self._shapes.add(out.shape)
        elif func in _SOFTMAX and args and isinstance(args[0], Tensor) and args[0].shape in self._shapes:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, args[0].dim() - 1):
                self._see("softmax", args, kwargs)
        return out


class AttentionWatch:
    """Find the modules whose own forward computes attention, and watch one of them at a time.

    Parameters
    ----------
    model
        The model.
    failed
        Called with an exception that was swallowed.

    Attributes
    ----------
    owners
        Names and modules that compute attention; known after the first forward pass that is recorded for a backward
        pass (in which every module carries a hook, once).

    Notes
    -----
    The mode calls each function with the very arguments it was called with and returns its very result, so autograd,
    autocast and random numbers are as without it. ``nn.MultiheadAttention`` is watched through its inputs: queries and
    keys of two examples are projected again.
    """

    def __init__(self, model: nn.Module, failed: Any) -> None:
        self._model, self._failed = model, failed
        self.owners: list[tuple[str, nn.Module]] = []
        self.known = False
        self._stack: list[str] = []
        self._names = {name: module for name, module in model.named_modules()}
        self._handles: list[RemovableHandle] = []
        self._modes: list[_Mode] = []
        self._taken: dict[str, Tensor] = {}
        self._turn = self._searches = 0

    def arm(self) -> None:
        """Put hooks on the attention whose turn it is, or on all modules while none is known."""
        if not self.known:
            # A model whose own forward is never called is not searched for ever.
            self._searches += 1
            self.known = self._searches > _SEARCHES
        if not self.known:
            for name, module in self._names.items():
                self._around(module, self._discover(name), self._leave)
            return
        if self.owners:
            name, module = self.owners[self._turn % len(self.owners)]
            self._turn += 1
            if isinstance(module, nn.MultiheadAttention):
                hook = Hook(self._project(name), self._failed)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._around(module, self._enter(name), self._exit)

    def disarm(self) -> None:
        """Take all hooks off, and a mode that an interrupt has left behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        while self._modes:
            self._exit()

    def read(self) -> dict[str, Attention]:
        """What was seen since, as arrays."""
        taken, self._taken = self._taken, {}
        return {name: Attention(logits.cpu().numpy()) for name, logits in taken.items()}

    def _around(self, module: nn.Module, enter: Any, leave: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(Hook(enter, self._failed)))
        self._handles.append(module.register_forward_hook(Hook(leave, self._failed), always_call=True))

    def _discover(self, name: str) -> Any:
        def enter(module: nn.Module, inputs: Any) -> None:
            # Inside a pass that is recorded, a part that is not must be entered as well, since it will be left.
            if not self._stack and (self.known or not torch.is_grad_enabled()):
                return
            if isinstance(module, nn.MultiheadAttention):
                self._own(name)
            if not self._stack:
                self._push(_Mode(lambda kind, args, kwargs: self._own(self._stack[-1])))
            self._stack.append(name)

        return enter

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()
            if not self._stack:
                self._exit()
                # An inner part that was called on its own says nothing about the others.
                self.known = self.known or module is self._model

    def _own(self, name: str) -> None:
        if self._stack and any(isinstance(self._names[outer], nn.MultiheadAttention) for outer in self._stack):
            return
        if all(name != known for known, _ in self.owners):
            self.owners.append((name, self._names[name]))

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, inputs: Any) -> None:
            if torch.is_grad_enabled() and name not in self._taken and not self._modes:
                self._push(_Mode(lambda kind, args, kwargs: self._see(name, kind, args, kwargs)))

        return enter

    def _push(self, mode: _Mode) -> None:
        self._modes.append(mode)
        _push_mode(mode)  # type: ignore[no-untyped-call]

    def _exit(self, *args: Any) -> None:
        if not self._modes:
            return
        mode = self._modes.pop()
        above = []
        # What others have put on top since comes back in the same order.
        while mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            top = _pop_mode()  # type: ignore[no-untyped-call]
            if top is mode:
                break
            above.append(top)
        for other in reversed(above):
            _push_mode(other)  # type: ignore[no-untyped-call]

    def _see(self, name: str, kind: str, args: Any, kwargs: Any) -> None:
        if name in self._taken:
            return
        try:
            with torch.no_grad():
                logits = scaled_logits(*args, **kwargs) if kind == "scaled" else _corner(args[0])
            if logits is not None:
                self._taken[name] = logits
        except Exception as error:
            self._failed(error)

    def _project(self, name: str) -> Any:
        def take(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled() or name in self._taken:
                return
            names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            with torch.no_grad():
                self._taken[name] = projected_logits(module, given)

        return take


def scaled_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Logits of sampled examples, heads and queries, in float32; arguments as of ``scaled_dot_product_attention``.

    Returns
    -------
    Tensor of shape ``(examples, heads, queries, keys)`` with ``-inf`` where a key is masked.

    Examples
    --------
    >>> q = torch.ones(1, 1, 3, 4)
    >>> scaled_logits(q, q, is_causal=True)[0, 0]
    tensor([[2., -inf, -inf],
            [2., 2., -inf],
            [2., 2., 2.]])
    """
    if query.dim() < 3 or query.is_nested or not query.numel() or not key.numel():
        return None
    # (..., H, L, E), or (N, L, E) without heads: the dimension before the queries counts as heads.
    heads, queries, keys = query.shape[-3], query.shape[-2], key.shape[-2]
    examples = math.prod(query.shape[:-3])
    e, h, rows = _spaced(examples, _EXAMPLES), _spaced(heads, _HEADS), _spaced(queries, _QUERIES)
    ratio = max(1, heads // key.shape[-3])
    q = query.detach().reshape(examples, heads, queries, -1)[e][:, h][:, :, rows]
    k = key.detach().reshape(examples, key.shape[-3], keys, -1)[e][:, [i // ratio for i in h]]
    with torch.autocast(query.device.type, enabled=False):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = torch.matmul(q.float(), k.float().transpose(-1, -2)) * factor
    if is_causal:
        places = torch.tensor(rows, device=query.device)[:, None]
        logits = logits.masked_fill(torch.arange(keys, device=query.device) > places, -math.inf)
    if attn_mask is not None:
        mask = attn_mask.detach().expand(*query.shape[:-1], keys).reshape(examples, heads, queries, keys)
        mask = mask[e][:, h][:, :, rows]
        if mask.dtype is torch.bool:
            logits = logits.masked_fill(~mask, -math.inf)
        else:
            # A finite stand-in for -inf masks as well.
            masked = mask <= torch.finfo(mask.dtype).min / 2
            logits = (logits + mask.float()).masked_fill(masked, -math.inf)
    return logits


def projected_logits(module: nn.MultiheadAttention, given: dict[str, Any]) -> Tensor:
    """Logits of ``nn.MultiheadAttention`` from its inputs, for two examples."""
    query, key = (given[name].detach() for name in ("query", "key"))
    if query.dim() == 2:
        query, key = query.unsqueeze(0), key.unsqueeze(0)
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    examples = _spaced(len(query), _EXAMPLES)
    query, key = query[examples].float(), key[examples].float()
    width = module.embed_dim
    if module.in_proj_weight is not None:
        to_query, to_key = module.in_proj_weight.detach().float().chunk(3)[:2]
    else:
        to_query, to_key = module.q_proj_weight.detach().float(), module.k_proj_weight.detach().float()
    bias = module.in_proj_bias
    with torch.autocast(query.device.type, enabled=False):
        q = F.linear(query, to_query, bias[:width].detach().float() if bias is not None else None)
        k = F.linear(key, to_key, bias[width : 2 * width].detach().float() if bias is not None else None)
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.detach().float().expand(len(k), 1, -1)], dim=1)
    q, k = (x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2) for x in (q, k))
    shape = (len(q), module.num_heads, q.shape[2], k.shape[2])
    allowed = torch.ones(shape, dtype=torch.bool, device=q.device)
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    width_of_keys = key.shape[1]
    if mask is not None:
        open_ = ~mask if mask.dtype is torch.bool else mask > -1e30
        if open_.dim() == 3:
            open_ = open_.reshape(-1, module.num_heads, *open_.shape[1:])[examples]
        allowed[..., :width_of_keys] &= open_
    if padding is not None:
        padding = padding.unsqueeze(0) if padding.dim() == 1 else padding
        open_ = ~padding if padding.dtype is torch.bool else padding > -1e30
        allowed[..., :width_of_keys] &= open_[examples][:, None, None]
    logits = scaled_logits(q, k, attn_mask=allowed)
    assert logits is not None
    return logits


def _corner(logits: Tensor) -> Tensor | None:
    """Sampled rows of logits that the model's own code made, ``(..., queries, keys)``."""
    if logits.dim() < 3 or not logits.numel():
        return None
    queries, keys = logits.shape[-2:]
    flat = logits.detach().reshape(-1, queries, keys)
    corner = flat[_spaced(len(flat), _EXAMPLES * _HEADS)][:, _spaced(queries, _QUERIES)].float()
    return corner.masked_fill(corner < torch.finfo(logits.dtype).min / 2, -math.inf)


def _spaced(count: int, most: int) -> list[int]:
    """At most so many indices, evenly spaced, the last one among them: under a causal mask it sees all keys."""
    wanted = min(count, most)
    return sorted({count - 1 - i * count // wanted for i in range(wanted)})
