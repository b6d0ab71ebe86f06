"""What a transformers model is, in a few words for the journal."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Names that configurations of transformers answer to, whatever they call it themselves.
_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


def architecture(model: nn.Module) -> dict[str, Any]:
    """Describe a model by its configuration: kind, layers, hidden size, heads, vocabulary, positions; and its dtypes.

    Of a model of several parts the text part is described. What a configuration does not say is left out.

    Examples
    --------
    >>> architecture(nn.Linear(2, 2))
    {'dtypes': ['float32']}
    """
    described: dict[str, Any] = {}
    config = getattr(model, "config", None)
    if config is not None:
        part = config.get_text_config() if hasattr(config, "get_text_config") else config
        if isinstance(kind := getattr(config, "model_type", None), str) and kind:
            described["kind"] = kind
        values = {name: getattr(part, name, None) for name in _FIELDS}
        described |= {name: value for name, value in values.items() if isinstance(value, int)}
    described["dtypes"] = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    return described
