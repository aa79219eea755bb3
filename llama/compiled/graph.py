"""The step of a model as one graph: tensors in, tensors out, of any number of rows, slots and requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from llama.attention import CompiledRows, StepCache, Tiles
from llama.cache import Store
from llama.kernels.library import serves
from llama.model import Transformer
from llama.quantization import LowBitLinear


class StepGraph(nn.Module):
    """`Transformer.step` over flat tensors, with every weight that it reads under a name.

    A joint product is no module of the model's, so it is registered here. The layers' keys and values are inputs of
    their own: with dynamic shapes AOTInductor drops the storage offset of a view that it writes to, and layers that
    share a tensor would all write into the first one's part (pytorch #198068).
    """

    def __init__(self, model: Transformer, kv_dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.kv_dtype = kv_dtype
        scaling = model.params.rope_scaling
        self.by_limit = scaling is not None and scaling.by_limit
        self.joints = nn.ModuleDict()
        for number, layer in enumerate(model.layers):
            for name, joint in (("qkv", layer.attention.qkv), ("gate_up", layer.feed_forward.gate_up)):
                if joint.joint is not None:
                    self.joints[f"{number}_{name}"] = joint.joint

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        wanted: Tensor,
        slots: Tensor,
        table: Tensor,
        limits: Sequence[Tensor],
        stores: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `Transformer.step`: `limits` has none or one, slots and table are those of `CompiledRows`, and `stores`
        are the layers' `tensors_of`, one after the other."""
        backend = CompiledRows(slots, table, Tiles([], slots, None))
        each = 4 if self.kv_dtype == torch.int8 else 2
        layers = []
        for first in range(0, len(stores), each):
            keys, values, *scales = stores[first : first + each]
            key_scales, value_scales = scales or (None, None)
            layers.append((Store(keys, key_scales), Store(values, value_scales)))
        return self.model.step(tokens, positions, StepCache(backend, layers), wanted, limits[0] if limits else None)

    def weights(self) -> dict[str, Tensor]:
        """What the graph may read, by the names that a package has for it."""
        return dict(self.named_parameters()) | dict(self.named_buffers())


def tensors_of(layers: Iterable[tuple[Store, Store]]) -> list[Tensor]:
    """Keys and values of layers as the graph's inputs: numbers, and scales behind them where there are any."""
    tensors = []
    for keys, values in layers:
        tensors += (keys.numbers, values.numbers)
        if keys.scales is not None:
            tensors += (keys.scales, values.scales)
    return tensors


def additions(model: Transformer) -> Iterator[object]:
    """What adapters add in each of their places: None where they add nothing."""
    yield from (model.added_to_embedding, model.added_to_output)
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        yield from (joint.added for joint in (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down))


def why_not(model: Transformer) -> str | None:
    """What keeps a model from being compiled, in the words of the options that it was built with; None: nothing."""
    weight = model.norm.weight
    if model.parallel.size > 1:
        return f"a compiled package is of one process, and {model.parallel.size} ranks share this model"
    if weight.device.type != "cpu":
        return f"packages are compiled for the CPU, and this model is on {weight.device.type}"
    if model.fixed_rows is not None:
        return "deterministic=True fixes the shapes of all products, which a compiled package cannot"
    if not serves(torch.empty(0, model.params.head_dim, dtype=weight.dtype)):
        dtype = str(weight.dtype).removeprefix("torch.")
        return (
            "a package calls the compiled kernels, which are not built or do not serve "
            f"{dtype} and heads of {model.params.head_dim}: they want bf16 or fp32 and multiples of 16"
        )
    if any(added is not None for added in additions(model)):
        return (
            "an adapter is computed beside its packed weights, all the time: merge it first, with llama convert --lora"
        )
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear) and module.joined is None and not module.prepared:
            return f"{name} is in {module.format.name}, for which there are no compiled kernels"
    return None
