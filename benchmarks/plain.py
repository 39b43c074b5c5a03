"""The decoder of fmcore written plainly in eager PyTorch: the baseline that a speed claim is measured against.

What a good engineer writes without kernels of their own: fused q/k/v and gate/up projections, torch's own
scaled_dot_product_attention and rms_norm, cross_entropy on the logits. Parameters bear the names of fmcore's Decoder,
so that both can be given the same weights and must then give the same loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmcore.models.decoder import Config


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split; x (B, T, H, D), cos and sin (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class PlainBlock(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, D, H, G, F_ = config.width, config.D, config.heads, config.G, config.ffn
        self.heads, self.groups, self.D = H, G, D
        self.norm1, self.norm2 = nn.RMSNorm(C, config.norm_eps), nn.RMSNorm(C, config.norm_eps)
        self.qkv = nn.Linear(C, (H + 2 * G) * D, bias=False)
        self.out = nn.Linear(H * D, C, bias=False)
        self.up = nn.Linear(C, 2 * F_, bias=False)
        self.down = nn.Linear(F_, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, self.heads + 2 * self.groups, self.D)
        q, k, v = qkv.split((self.heads, self.groups, self.groups), dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.groups,
        )
        x = x + self.out(o.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainDecoder(nn.Module):
    """RMSNorm, RoPE, SwiGLU, tied head: the architecture of the ``demo`` preset."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        inverse = config.rope_theta ** -(torch.arange(0, config.D, 2) / config.D)
        angles = torch.outer(torch.arange(config.context), inverse)[:, None]  # (P, 1, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
