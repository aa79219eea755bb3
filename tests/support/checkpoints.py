"""One set of tiny random weights in every format, written by the libraries that own the formats, not by ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama.checkpoint import Checkpoint, load_weights, open_checkpoint
from llama.model import ModelArgs, Transformer
from llama.parallel import ModelParallel
from llama.vocabulary import TokenType, Vocabulary
from llama.vocabulary.sentencepiece import write_proto
from support.tiny import tiny_args, tiny_weights

COLUMN_SPLIT = ("wo.weight", "w2.weight")
ROW_SPLIT = ("wq", "wk", "wv", "w1", "w3", "output")
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def sample(dtype: torch.dtype = torch.float32, **changes) -> tuple[ModelArgs, dict[str, Tensor]]:
    """A tiny model's shape, with the context that Meta's files imply, and its weights by canonical name."""
    args = tiny_args(**{"max_seq_len": 4096, "max_batch_size": 32, **changes})
    return args, {name: weight.to(dtype) for name, weight in tiny_weights(args).items()}


def params(args: ModelArgs) -> dict:
    """params.json as Meta writes it."""
    values = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
    }
    return values | {"multiple_of": args.multiple_of, "norm_eps": args.norm_eps, "vocab_size": -1}


def write_meta(
    path: Path, args: ModelArgs, weights: dict[str, Tensor], shards: int = 1, embedding_dim: int = 1, **more
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "params.json").write_text(json.dumps(params(args) | more))
    for rank in range(shards):
        shard = {"rope.freqs": torch.ones(args.head_dim // 2)}
        for name, weight in weights.items():
            module = name.split(".")[-2]
            if module == "tok_embeddings":
                weight = weight.chunk(shards, embedding_dim)[rank]
            elif name.endswith(COLUMN_SPLIT):
                weight = weight.chunk(shards, 1)[rank]
            elif module in ROW_SPLIT:
                weight = weight.chunk(shards, 0)[rank]
            shard[name] = weight.clone()
        torch.save(shard, path / f"consolidated.{rank:02d}.pth")
    return path


def half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Meta's rotary order into Hugging Face's, by the formula of its converter."""
    rows = weight.shape[0]
    paired = weight.view(num_heads, rows // num_heads // 2, 2, -1)
    return paired.transpose(1, 2).reshape(weight.shape).contiguous()


def hf_weights(args: ModelArgs, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, weight in weights.items():
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            prefix = f"model.layers.{layer}."
        if module in ("attention.wq", "attention.wk"):
            weight = half_split(weight, args.n_heads if module.endswith("wq") else args.n_kv_heads)
        renamed[f"{prefix}{HF_NAMES[module]}.{kind}"] = weight.clone()
    return renamed


def hf_config(args: ModelArgs) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
        "vocab_size": args.vocab_size,
        "tie_word_embeddings": args.tie_word_embeddings,
        "rope_theta": args.rope_theta,
    }


def write_hf(
    path: Path, args: ModelArgs, weights: dict[str, Tensor], files: int = 1, binary: bool = False, **more
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(args) | more))
    renamed = hf_weights(args, weights)
    stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    places = {}
    for number in range(files):
        name = f"{stem}.{suffix}" if files == 1 else f"{stem}-{number + 1:05d}-of-{files:05d}.{suffix}"
        part = dict(list(renamed.items())[number::files])
        places |= dict.fromkeys(part, name)
        torch.save(part, path / name) if binary else save_file(part, path / name, metadata={"format": "pt"})
    if files > 1:
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def write_gguf(
    path: Path,
    args: ModelArgs,
    weights: dict[str, Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    vocabulary: bool = False,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(args.n_layers)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_key_length(args.head_dim)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    if vocabulary:
        words = byte_vocabulary(args.vocab_size)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(words.tokens)
        writer.add_token_scores(words.scores)
        writer.add_token_types(words.types)
    for name, weight in weights.items():
        module, suffix = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            prefix = f"blk.{layer}."
        stored = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight.float().numpy().astype(np.float32), stored)
        writer.add_tensor(f"{prefix}{GGUF_NAMES[module]}.{suffix}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_vocabulary(size: int) -> Vocabulary:
    """A sentencepiece-like vocabulary: three control tokens, 256 bytes, and pieces that no text becomes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    words = ["▁", "e", "l", "o", "lo", "el", "▁e"]
    tokens += words[: size - len(tokens)] + [f"word{number}" for number in range(size - len(tokens) - len(words))]
    types += [TokenType.NORMAL] * (len(tokens) - len(types))
    scores = [0.0] * 259 + [-float(number) for number in range(len(tokens) - 259)]
    return Vocabulary("spm", tokens, [int(kind) for kind in types], scores, add_space_prefix=True)


def write_sentencepiece(path: Path, size: int = 264, types: Mapping[int, TokenType] | None = None) -> Path:
    """A `tokenizer.model` of `size` tokens, some of other types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = byte_vocabulary(size)
    for id, kind in (types or {}).items():
        vocabulary.types[id] = int(kind)
    path.write_bytes(write_proto(vocabulary, {"unk": 0, "bos": 1, "eos": 2, "pad": -1}))
    return path


def state(checkpoint: Checkpoint | Path) -> dict[str, Tensor]:
    """Every weight of a checkpoint, copied out of the file."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    return {weight.name: weight.read().clone() for weight in opened.weights()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and tensors of equal type and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def loaded(path: Path, rank: int = 0, world_size: int = 1, **options) -> Transformer:
    """A model on the meta device, filled from `path` with one rank's part."""
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(replace(checkpoint.args), ModelParallel(rank=rank, size=world_size))
    load_weights(model, checkpoint, rank=rank, world_size=world_size, **options)
    return model


def anonymous_memory() -> int:
    """Bytes of anonymous resident memory of this process (Linux)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


LINUX = sys.platform == "linux"
