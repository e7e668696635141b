"""How redundant a layer's attention is: one number per attention vector, on any device, padded vectors included.

Throughout, ``attention`` is float ``[..., n]``, non-negative, with sum 1 over the last axis and 0 beyond a vector's
end, and ``length`` (int, broadcastable to ``[...]``) is the number of valid entries of each vector. Every function
returns float ``[...]``. Nothing here synchronises with the host.
"""

from __future__ import annotations

import torch


def hoyer(attention: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Hoyer sparsity (paper eq. 1): ``(sqrt(n) - |a|_1 / |a|_2) / (sqrt(n) - 1)``, in [0, 1].

    0 for a uniform vector, 1 for a one-hot one. A vector of one entry is both; it counts as uniform.

    Examples
    --------
    >>> hoyer(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]]), torch.tensor(4))
    tensor([0., 1.])
    """
    root = length.to(attention.dtype).sqrt()
    ratio = attention.sum(-1) / attention.square().sum(-1).sqrt()
    return torch.where(root > 1, (root - ratio) / (root - 1).clamp(min=1e-6), 0.0).clamp(0.0, 1.0)


def entropy(attention: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats: ``- sum_j a_j ln a_j``; 0 for a one-hot vector, ``ln n`` for a uniform one."""
    return -torch.xlogy(attention, attention).sum(-1)


def variance(attention: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Variance over the tokens in units of the squared mean: ``n sum_j a_j^2 / (sum_j a_j)^2 - 1``.

    0 for a uniform vector, ``n - 1`` for a one-hot one. The sum of ``attention`` need not be 1.
    """
    total = attention.sum(-1).square().clamp(min=torch.finfo(attention.dtype).tiny)
    return (length * attention.square().sum(-1) / total - 1).clamp(min=0.0)


def coverage(attention: torch.Tensor, length: torch.Tensor, masses: tuple[float, ...]) -> torch.Tensor:
    """Fewest tokens that together hold each of ``masses``.

    Parameters
    ----------
    attention, length
        See the module.
    masses
        Parts of the mass, each in (0, 1).

    Returns
    -------
    torch.Tensor
        ``[..., len(masses)]``, in tokens: 1 to n.
    """
    held = attention.sort(-1, descending=True).values.cumsum(-1)
    counts = torch.stack([(held < mass).sum(-1) for mass in masses], -1).to(attention.dtype)
    return torch.minimum(counts + 1, length.to(attention.dtype).unsqueeze(-1).expand_as(counts))


def distance(attention: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Mean distance from the newest token to what is attended to: ``sum_j a_j (n - 1 - j)``, in tokens."""
    position = torch.arange(attention.shape[-1], device=attention.device, dtype=attention.dtype)
    return (length - 1) * attention.sum(-1) - (attention * position).sum(-1)


def sink_share(attention: torch.Tensor, sinks: int) -> torch.Tensor:
    """Share of the mass on the first ``sinks`` positions, in [0, 1]."""
    return attention[..., :sinks].sum(-1)
