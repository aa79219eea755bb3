"""Meta's reference code, as `lines.py` says: one padded batch for everybody.

The model and the loop do what the reference's `model.py` and `generation.py` do (facebookresearch/llama), as plain
tensor functions: the prompts are right-padded into one tensor, the first step computes as many positions as the
shortest prompt has, and every further step one position of every row until the slowest row has ended. Keys and values
lie in a cache of batch x length, are repeated for grouped heads, and the logits of all positions are made and turned
into float32. The linear layers are `F.linear` on the CPU. "load" takes a directory in Meta's layout, of one file, and
`dtype`, the type that the engine itself chose on this machine; "run" takes `num_tokens` also as one number a prompt.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lines import answer_lines

from llama.checkpoint import open_checkpoint

PAD = -1


def rotation_angles(head_dim: int, length: int, theta: float) -> torch.Tensor:
    """(length, head_dim / 2) complex64: e^(i * position * frequency)"""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of x (batch, seqlen, heads, head_dim) as complex numbers, turned by angles (seqlen, pairs)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2).type_as(x)


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    """(batch, length, kv heads, head_dim) -> (batch, length, kv heads * times, head_dim), a copy"""
    return x[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)


class PaddedModel:
    """A checkpoint in Meta's layout, in one file, and the cache of the batch that runs."""

    def __init__(self, directory: Path, dtype: torch.dtype):
        self.args = args = open_checkpoint(directory).args
        weights = torch.load(directory / "consolidated.00.pth", weights_only=True)
        self.weights = {name: weight.to(dtype) for name, weight in weights.items()}
        self.angles = rotation_angles(args.head_dim, args.max_seq_len, args.rope_theta)

    def reset(self, batch_size: int, length: int) -> None:
        """An empty cache, of pages that are there already."""
        args, dtype = self.args, self.weights["norm.weight"].dtype
        size = (args.n_layers, batch_size, length, args.n_kv_heads, args.head_dim)
        self.keys, self.values = (torch.zeros(size, dtype=dtype).fill_(0) for _ in range(2))

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        """tokens (batch, seqlen) at positions start_pos ... -> logits (batch, seqlen, vocab_size) float32"""
        seqlen = tokens.shape[1]
        angles = self.angles[start_pos : start_pos + seqlen]
        mask = None
        if seqlen > 1:
            mask = torch.full((seqlen, seqlen), float("-inf")).triu(1)
            mask = torch.hstack([torch.zeros(seqlen, start_pos), mask]).to(self.keys.dtype)
        h = F.embedding(tokens, self.weights["tok_embeddings.weight"])
        for layer in range(self.args.n_layers):
            name = f"layers.{layer}."
            h = h + self.attention(layer, self.norm(h, name + "attention_norm"), start_pos, angles, mask)
            h = h + self.feed_forward(name, self.norm(h, name + "ffn_norm"))
        return self.linear(self.norm(h, "norm"), "output").float()

    def attention(
        self, layer: int, x: torch.Tensor, start_pos: int, angles: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(batch, seqlen, dim) -> (batch, seqlen, dim)"""
        batch, seqlen, _ = x.shape
        name, args, stop = f"layers.{layer}.attention.", self.args, start_pos + seqlen
        q, k, v = (self.linear(x, name + w).unflatten(-1, (-1, args.head_dim)) for w in ("wq", "wk", "wv"))
        q, k = rotate(q, angles), rotate(k, angles)
        self.keys[layer, :batch, start_pos:stop] = k
        self.values[layer, :batch, start_pos:stop] = v
        keys = repeat_kv(self.keys[layer, :batch, :stop], args.n_heads // args.n_kv_heads)
        values = repeat_kv(self.values[layer, :batch, :stop], args.n_heads // args.n_kv_heads)
        q, keys, values = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = q @ keys.transpose(2, 3) / args.head_dim**0.5  # (batch, heads, seqlen, stop)
        if mask is not None:
            scores = scores + mask
        mixed = scores.float().softmax(-1).type_as(q) @ values
        return self.linear(mixed.transpose(1, 2).flatten(2), name + "wo")

    def feed_forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        name += "feed_forward."
        return self.linear(F.silu(self.linear(x, name + "w1")) * self.linear(x, name + "w3"), name + "w2")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.args.norm_eps)
        return wide.type_as(x) * self.weights[name + ".weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"])

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_tokens: list[int]) -> tuple[list[list[int]], list[float]]:
        """The likeliest `num_tokens[i]` tokens after each prompt, and each step's seconds.

        The batch runs until the last row has its own.
        """
        ends = [len(prompt) + count for prompt, count in zip(prompts, num_tokens, strict=True)]
        self.reset(len(prompts), max(ends))
        tokens = torch.full((len(prompts), max(ends)), PAD)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        given = tokens != PAD
        previous, seconds = 0, []
        for position in range(min(map(len, prompts)), max(ends)):
            started = time.perf_counter()
            logits = self.forward(tokens[:, previous:position], previous)
            chosen = logits[:, -1].argmax(-1)
            tokens[:, position] = torch.where(given[:, position], tokens[:, position], chosen)
            previous = position
            seconds.append(time.perf_counter() - started)
        answers = [row[len(prompt) : end].tolist() for row, prompt, end in zip(tokens, prompts, ends, strict=True)]
        return answers, seconds


MODEL: list[PaddedModel] = []  # the one that is loaded


def load(path: str, threads: int, dtype: str, **unused: object) -> dict:
    torch.set_num_threads(threads)
    MODEL[:] = [PaddedModel(Path(path), getattr(torch, dtype))]
    return {"vocab_size": MODEL[0].args.vocab_size}


def run(prompts: list[list[int]], num_tokens: int | list[int]) -> dict:
    wanted = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
    answers, seconds = MODEL[0].generate(prompts, wanted)
    return {"first_seconds": seconds[0], "step_seconds": seconds[1:], "tokens": answers}


answer_lines(load=load, run=run)
