"""Which parameters of a model an optimizer steps alike."""

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay, vectors (norm weights, biases) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def muon_groups(
    model: nn.Module, weight_decay: float, heads: tuple[str, ...] = ("head", "lm_head", "classifier")
) -> list[dict]:
    """Trainable parameters in three groups for ``Muon``: hidden matrices; other matrices by AdamW; vectors, no decay.

    Other matrices are embeddings (of ``nn.Embedding``), heads (of modules whose last name is in ``heads``), whose rows
    are tokens and not directions of one space, and whatever has more than two dimensions.
    """
    apart = {
        p
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in heads
        for p in module.parameters(recurse=False)
    }
    params = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in params if p.ndim == 2 and p not in apart]
    return [
        {"params": hidden, "weight_decay": weight_decay, "use_muon": True},
        {
            "params": [p for p in params if p.ndim >= 2 and (p.ndim > 2 or p in apart)],
            "weight_decay": weight_decay,
            "use_muon": False,
        },
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "use_muon": False},
    ]
