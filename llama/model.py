"""The Llama architecture, as the papers describe it and Meta's reference repository names it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from llama.attention import LayerCache, StepCache, choose_backend
from llama.cache import CacheShape, ContiguousCache
from llama.device import return_memory
from llama.embedding import Embedding
from llama.kernels.dense import dense_linear
from llama.kernels.elementwise import rms_norm, swiglu
from llama.kernels.layer import LayerOperands
from llama.layer_stack import LayerStack
from llama.linear import CountedModule, Joint, Linear, in_tiles
from llama.parallel import ALONE, SINGLE, ModelParallel, TensorParallel, share, share_size
from llama.rotary import RopeScaling, Rotary, rope_frequencies, turning_rates


@dataclass
class ModelArgs:
    """A model's shape (the reference's fields, then what other families need) and its run-time lengths."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # defined later by the tokenizer
    multiple_of: int = 256  # makes the feed-forward's hidden size a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    max_batch_size: int = 32
    max_seq_len: int = 2048

    hidden_dim: int | None = None  # None: derived from dim, multiple_of and ffn_dim_multiplier
    head_dim: int | None = None  # None: dim // n_heads
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False  # the output layer is the embedding, and has no weight of its own
    attention_bias: bool = False  # biases on wq, wk, wv
    attention_output_bias: bool = False  # a bias on wo
    mlp_bias: bool = False  # biases on w1, w2, w3
    sliding_window: int | None = None  # a token sees this many tokens, itself included; None: all

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.n_heads // self.n_kv_heads

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads
        if self.hidden_dim is None:
            hidden_dim = int(2 * 4 * self.dim / 3)
            if self.ffn_dim_multiplier is not None:
                hidden_dim = int(self.ffn_dim_multiplier * hidden_dim)
            self.hidden_dim = self.multiple_of * ((hidden_dim + self.multiple_of - 1) // self.multiple_of)


class RMSNorm(CountedModule):
    """x / rms(x) * weight; normalised in float32 and cast back before the product, as in the reference."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention of one rank's heads over what the cache holds of each request."""

    def __init__(self, args: ModelArgs, parallel: TensorParallel = ALONE):
        super().__init__()
        self.parallel = parallel
        self.n_local_heads = args.n_heads // parallel.size
        self.n_local_kv_heads = args.n_kv_heads // parallel.size
        self.head_dim = args.head_dim
        q_dim, kv_dim = self.n_local_heads * self.head_dim, self.n_local_kv_heads * self.head_dim
        self.wq = Linear(args.dim, q_dim, args.attention_bias)
        self.wk = Linear(args.dim, kv_dim, args.attention_bias)
        self.wv = Linear(args.dim, kv_dim, args.attention_bias)
        self.wo = Linear(q_dim, args.dim, args.attention_output_bias and parallel.rank == 0)
        self.qkv = Joint(self, "wq", "wk", "wv")
        self.out = Joint(self, "wo")

    def forward(self, x: torch.Tensor, rotary: Rotary, cache: LayerCache) -> torch.Tensor:
        # (num_tokens, query + key + value heads, head_dim)
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        return self.parallel.all_reduce(self.out(cache.attend(qkv, rotary).flatten(1)))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)"""

    def __init__(self, args: ModelArgs, parallel: TensorParallel = ALONE):
        super().__init__()
        self.parallel = parallel
        hidden_dim = args.hidden_dim // parallel.size
        self.w1 = Linear(args.dim, hidden_dim, args.mlp_bias)
        self.w2 = Linear(hidden_dim, args.dim, args.mlp_bias and parallel.rank == 0)
        self.w3 = Linear(args.dim, hidden_dim, args.mlp_bias)
        self.gate_up = Joint(self, "w1", "w3")
        self.down = Joint(self, "w2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parallel.all_reduce(self.down(swiglu(self.gate_up(x))))


class TransformerBlock(CountedModule):
    def __init__(self, args: ModelArgs, parallel: TensorParallel = ALONE):
        super().__init__()
        self.attention = Attention(args, parallel)
        self.feed_forward = FeedForward(args, parallel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.norm_eps = args.norm_eps
        self.is_whole = parallel.size == 1  # else sums are made across ranks in its midst
        self.products = (
            self.attention.qkv, self.attention.out, self.feed_forward.gate_up, self.feed_forward.down
        )  # fmt: skip

    def forward(self, x: torch.Tensor, rotary: Rotary, cache: LayerCache) -> torch.Tensor:
        """(num_tokens, dim) -> (num_tokens, dim)"""
        is_served = cache.computes_layers and not any(product.added for product in self.products)
        if is_served and (operands := self.operands()) is not None:
            return cache.compute_layer(x, operands, rotary)
        h = x + self.attention(self.attention_norm(x), rotary, cache)
        return h + self.feed_forward(self.ffn_norm(h))

    def operands(self) -> LayerOperands | None:
        """For the operator that computes a layer, without what is added to products; None where it cannot make one."""
        if not self.is_whole:
            return None
        products = [product.for_layer() for product in self.products]
        if None in products:
            return None
        return LayerOperands.of((self.attention_norm.weight, self.ffn_norm.weight), self.norm_eps, products)


class Transformer(nn.Module):
    """Tokens to logits. `params` is the whole model's shape; the modules hold this rank's part of it.

    Where the model is cut into stages, `layers` has None for those of other stages. The embedding is on the first
    stage, the output layer on the last; `norm` is on all, and tells in which type and where a rank computes.

    Build it under `torch.device("meta")` to give it storage only when its weights arrive.
    """

    def __init__(self, params: ModelArgs, parallel: ModelParallel = SINGLE):
        super().__init__()
        self.tensor, self.stage = parallel.tensor, parallel.stage
        validate_ranks(params, self.tensor.size)
        self.params = params
        self.parallel = parallel
        self.vocab_size = params.vocab_size
        held = self.stage.layers(params.n_layers)
        self.n_layers = len(held)
        is_tied = params.tie_word_embeddings
        self.tok_embeddings = None
        if self.stage.is_first or (self.stage.is_last and is_tied):
            self.tok_embeddings = Embedding(params.vocab_size, params.dim, self.tensor, as_stored=not is_tied)
        self.layers = nn.ModuleList(
            TransformerBlock(params, self.tensor) if number in held else None for number in range(params.n_layers)
        )
        self.stack = LayerStack(list(self.held_layers.values()))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = None
        if self.stage.is_last and not is_tied:
            first, stop = share(params.vocab_size, self.tensor.rank, self.tensor.size)
            self.output = Linear(params.dim, stop - first)
        self.fixed_rows: int | None = None
        self.added_to_embedding = self.added_to_output = None  # as a `Joint`'s `added`
        self._cache: ContiguousCache | None = None  # what forward() remembers between calls
        self._rates: torch.Tensor | None = None

    @property
    def cache_shape(self) -> CacheShape:
        """What this rank's cache stores for a token."""
        n_kv_heads = self.params.n_kv_heads // self.tensor.size
        return CacheShape(self.n_layers, n_kv_heads, self.params.head_dim, self.params.sliding_window)

    @property
    def held_layers(self) -> dict[int, TransformerBlock]:
        """The layers of this rank's stage, by their numbers, in order."""
        return {number: layer for number, layer in enumerate(self.layers) if layer is not None}

    def prepare(self, fixed_rows: int | None = None) -> None:
        """After loading: stores each weight in the layout that its product reads fastest, layer by layer.

        With `fixed_rows` every product has that many rows, so that a token's bits do not depend on the others.
        """
        self.fixed_rows = fixed_rows
        for layer in self.held_layers.values():
            layer.attention.qkv.prepare(fixed_rows)
            layer.attention.out.prepare(fixed_rows)
            layer.feed_forward.gate_up.prepare(fixed_rows)
            layer.feed_forward.down.prepare(fixed_rows)
            return_memory()  # of the weights as they were
        if self.output is not None:
            self.output.prepare(fixed_rows)

    def hidden_states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: StepCache,
        limits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A packed step: tokens and positions (num_tokens,) int64 -> normalised states (num_tokens, dim).

        A stage takes the states of the one before, and passes its own on; those of the last one are normalised.
        Each layer stores the step's keys and values in its part of the cache. limits (num_tokens,): how many tokens
        each token's request may reach, for rope scaling that depends on it.
        """
        args, scaling = self.params, self.params.rope_scaling
        rates = self._turning_rates(positions.device, limits)
        rotary = Rotary.at(positions, rates, 1.0 if scaling is None else scaling.magnitude)
        if self.stage.is_first:
            h = self.tok_embeddings(tokens).to(self.norm.weight.dtype)
            if self.added_to_embedding is not None:
                h = self.added_to_embedding(h, tokens)
        else:
            h = self.stage.receive(len(tokens), args.dim, like=self.norm.weight)
        h = self.stack.compute(h, rotary, caches)
        if self.stage.is_last:
            return self.norm(h)
        self.stage.send(h)
        return h

    def _turning_rates(self, device: torch.device, limits: torch.Tensor | None) -> torch.Tensor:
        """Of `rope_frequencies`; kept from step to step where they depend on no limits."""
        args, scaling = self.params, self.params.rope_scaling
        is_kept = not (scaling is not None and scaling.by_limit) and not torch.compiler.is_exporting()
        if is_kept and self._rates is not None and self._rates.device == device:
            return self._rates
        rates = turning_rates(rope_frequencies(args.head_dim, args.rope_theta, scaling, device, limits=limits))
        if is_kept:
            self._rates = rates
        return rates

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, dim) -> (rows, vocab_size) float32"""
        if self.output is not None:
            local = self.output(states)
        elif self.fixed_rows is not None:
            local = in_tiles(partial(F.linear, weight=self.tok_embeddings.weight), states, self.fixed_rows)
        else:
            local = dense_linear(states, self.tok_embeddings.weight)
        if self.added_to_output is not None:
            local = self.added_to_output(local, states)
        return self.tensor.all_gather(local, self.vocab_size).float()

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: StepCache,
        wanted: torch.Tensor | None,
        limits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A packed step: the logits of the rows `wanted` (rows,) int64, None for all, and the states of all.

        A stage that is not the last has logits of no row.
        """
        states = self.hidden_states(tokens, positions, caches, limits)
        if not self.stage.is_last:
            return states.new_empty((0, self.vocab_size), dtype=torch.float32), states
        return self.logits(states if wanted is None else states[wanted]), states

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        """The reference's call: logits of every position, (bsz, seqlen, vocab_size) float32.

        `tokens` (bsz, seqlen) stand at positions start_pos ...; what came before was given by earlier calls
        and is kept in a contiguous cache that grows as needed. Raises ValueError where a row lacks what comes before,
        and for a model in stages, whose steps a `Runner` runs.
        """
        if self.stage.count > 1:
            raise ValueError(f"this model is cut into {self.stage.count} stages: call Llama.complete or Llama.score")
        bsz, seqlen = tokens.shape
        weight = self.norm.weight
        cache = self._cache
        if cache is None or (start_pos == 0 and cache.num_rows < bsz):
            cache = ContiguousCache(self.cache_shape, bsz, weight.device, weight.dtype)
        if not 0 <= start_pos <= cache.stored(bsz):
            raise ValueError(
                f"start_pos is {start_pos}, but of {bsz} rows no more than {cache.stored(bsz)} tokens each were given "
                "before; give a prompt from start_pos 0 on, and as many rows as will follow"
            )
        cache.reserve(start_pos + seqlen)
        positions = torch.arange(start_pos, start_pos + seqlen, device=tokens.device).repeat(bsz)
        spans = [cache.span(row, start_pos, seqlen) for row in range(bsz)]
        caches = StepCache.of(cache, spans, choose_backend(cache, weight.dtype, group=self.params.group))
        limits = torch.full_like(positions, start_pos + seqlen)  # so far: a later call may stretch more
        states = self.hidden_states(tokens.reshape(-1), positions, caches, limits)
        cache.keep(bsz, start_pos + seqlen)
        self._cache = cache
        return self.logits(states).unflatten(0, (bsz, seqlen))


def validate_ranks(args: ModelArgs, size: int) -> None:
    """Raises ValueError unless every cut dimension divides by the number of ranks; the vocabulary alone need not."""
    cut = {
        "heads": args.n_heads,
        "key/value heads": args.n_kv_heads,
        "hidden size": args.hidden_dim,
    }
    uneven = [f"{number} {name}" for name, number in cut.items() if number % size]
    if size > 1 and args.vocab_size <= (size - 1) * share_size(args.vocab_size, size):
        uneven.append(f"{args.vocab_size} tokens")
    if uneven:
        possible = [n for n in range(1, args.n_kv_heads + 1) if all(number % n == 0 for number in cut.values())]
        raise ValueError(
            f"{size} ranks cannot share {', '.join(uneven)} evenly: "
            f"this model runs on {', '.join(map(str, possible))} rank(s)"
        )
