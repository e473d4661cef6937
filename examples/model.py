"""A small decoder-only transformer whose forward ends at the hidden states: logits are the loss's affair."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, heads, context, 2 × half]; cos and sin are [context, half]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Block(nn.Module):
    """Causal attention and a SwiGLU, each behind its RMSNorm and around a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = (8 * width // 3 + 63) // 64 * 64  # three matrices here for a plain MLP's two of 4 × width
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate_and_up = nn.Linear(width, 2 * inner, bias=False)
        self.mlp_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(-2))
        gate, up = self.gate_and_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(F.silu(gate) * up)


class Decoder(nn.Module):
    """tokens [batch, context] -> hidden states [batch, context, width].

    The next token's logits would be `classifier(hidden)`. Training never computes them: the loss takes the
    hidden states and `classifier.weight` [vocab, width].
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, vocab: int, width: int, layers: int, heads: int, context: int, tie: bool, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.classifier = nn.Linear(width, vocab, bias=False)
        if tie:
            self.classifier.weight = self.embedding.weight
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        """Every matrix maps what has unit variance to unit variance; the loss begins near log(vocab)."""
        for name, matrix in self.named_parameters():
            if matrix.ndim == 2:
                std = matrix.shape[1] ** -0.5
                if name.endswith("_out.weight"):  # residual branches add up over the layers
                    std *= (2 * len(self.blocks)) ** -0.5
                nn.init.normal_(matrix, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5  # unit variance, as the norms give
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)
