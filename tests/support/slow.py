"""The model once more, slowly: one sequence, no cache, complex rotary, repeated keys, a mask. Compared with, only."""

import math
from collections.abc import Iterator

import torch

from llama.model import ModelArgs


def frequencies(args: ModelArgs, limit: int) -> list[float]:
    """`limit`: how many tokens the sequence may reach."""
    freqs = [args.rope_theta ** (-2 * i / args.head_dim) for i in range(args.head_dim // 2)]
    scaling = args.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return [f / scaling.factor for f in freqs]
    if scaling.kind == "dynamic":
        base = args.rope_theta
        if limit > scaling.original_max_seq_len:
            growth = scaling.factor * limit / scaling.original_max_seq_len - (scaling.factor - 1)
            base *= growth ** (args.head_dim / (args.head_dim - 2))
        return [base ** (-2 * i / args.head_dim) for i in range(args.head_dim // 2)]
    if scaling.kind == "yarn":
        return list(yarn(args, freqs))
    scaled = []
    for f in freqs:
        wavelength = 2 * math.pi / f
        if wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
            scaled.append(f / scaling.factor)
        elif wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
            scaled.append(f)
        else:
            smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            scaled.append((1 - smooth) * f / scaling.factor + smooth * f)
    return scaled


def yarn(args: ModelArgs, freqs: list[float]) -> Iterator[float]:
    scaling = args.rope_scaling

    def pair(turns: float) -> float:  # whose wave turns so often over the length of training
        wavelength = scaling.original_max_seq_len / turns
        return args.head_dim / 2 * math.log(wavelength / (2 * math.pi), args.rope_theta)

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), args.head_dim - 1)
    for i, f in enumerate(freqs):
        divided = 0 if i <= first else 1 if i >= last else (i - first) / (last - first)
        yield divided * f / scaling.factor + (1 - divided) * f


def rotate(x: torch.Tensor, freqs: list[float], magnitude: float = 1.0) -> torch.Tensor:
    """x (seqlen, heads, head_dim)"""
    angles = torch.outer(torch.arange(len(x)).float(), torch.tensor(freqs))
    cis = torch.polar(torch.full_like(angles, magnitude), angles)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * cis[:, None]).flatten(2)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def logits(
    weights: dict[str, torch.Tensor], args: ModelArgs, tokens: list[int], limit: int | None = None
) -> torch.Tensor:
    """(seqlen, vocab_size) float32; the sequence may reach `limit` tokens, or ends here."""
    freqs = frequencies(args, limit or len(tokens))
    magnitude = 1.0
    if args.rope_scaling is not None and args.rope_scaling.kind == "yarn":
        magnitude = args.rope_scaling.attention_factor or 0.1 * math.log(args.rope_scaling.factor) + 1

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    n = len(tokens)
    rows, columns = torch.arange(n)[:, None], torch.arange(n)
    hidden = columns > rows
    if args.sliding_window:
        hidden |= columns <= rows - args.sliding_window
    h = weights["tok_embeddings.weight"][tokens]
    for i in range(args.n_layers):
        layer = f"layers.{i}"
        x = norm(h, weights[f"{layer}.attention_norm.weight"], args.norm_eps)
        q = rotate(linear(x, f"{layer}.attention.wq").view(n, args.n_heads, -1), freqs, magnitude)
        k = rotate(linear(x, f"{layer}.attention.wk").view(n, args.n_kv_heads, -1), freqs, magnitude)
        v = linear(x, f"{layer}.attention.wv").view(n, args.n_kv_heads, -1)
        k, v = (t.repeat_interleave(args.n_heads // args.n_kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(args.head_dim)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        h = h + linear(mixed.reshape(n, -1), f"{layer}.attention.wo")
        x = norm(h, weights[f"{layer}.ffn_norm.weight"], args.norm_eps)
        gate = linear(x, f"{layer}.feed_forward.w1")
        h = h + linear(gate * gate.sigmoid() * linear(x, f"{layer}.feed_forward.w3"), f"{layer}.feed_forward.w2")
    x = norm(h, weights["norm.weight"], args.norm_eps)
    return x @ weights["tok_embeddings.weight" if args.tie_word_embeddings else "output.weight"].T


def greedy(weights: dict[str, torch.Tensor], args: ModelArgs, tokens: list[int], count: int) -> list[int]:
    """`count` likeliest tokens after `tokens`, each found by computing everything again."""
    tokens = list(tokens)
    limit = len(tokens) + count
    for _ in range(count):
        tokens.append(int(logits(weights, args, tokens, limit)[-1].argmax()))
    return tokens[-count:]
