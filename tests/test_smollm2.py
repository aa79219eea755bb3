"""The embedded default model, a real one, against transformers and against itself on three ranks."""

import gguf
import pytest
import torch
from support.ranks import forked

from llama import Llama, SamplingParams
from llama.checkpoint import default_model, inspect
from llama.quantization import has_kernels

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three laws of motion are",
    "Dear Sir or Madam,\n\n",
    "1, 2, 3, 5, 8,",
    "Bonjour, je m'appelle",
    "The largest planet of the solar system",
    "Shakespeare wrote",
    "To make bread you need flour,",
    "In 1969,",
    "import numpy as np\n",
    "Photosynthesis is the process",
    "The opposite of cold is",
    "Q: What is 12 times 12?\nA:",
    "She opened the door and",
    "SELECT name FROM users WHERE",
    "The speed of light is about",
    "Once more unto the breach,",
]


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama.build(max_seq_len=256, device="cpu", dtype="fp32", quantization="none")


@pytest.fixture(scope="module")
def packed() -> Llama:
    """As everybody runs it, with the file's blocks."""
    return Llama.build(max_seq_len=256, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def oracle():
    """transformers' model with the file's weights, read, renamed and put into its rotary order here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in gguf.GGUFReader(default_model()).tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        *layer, name, _ = tensor.name.replace("blk.", "layers.").split(".")
        if name in ("attn_q", "attn_k"):
            heads = {"attn_q": 9, "attn_k": 3}[name]
            weight = weight.view(heads, -1, 2, 576).transpose(1, 2).reshape(weight.shape)
        state[".".join(["model", *layer, names[name], "weight"])] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == ({"lm_head.weight"}, [])
    model.tie_weights()
    return model


@pytest.mark.parametrize(("num_prompts", "max_tokens"), [(10, 20), pytest.param(20, 64, marks=pytest.mark.slow)])
def test_greedy_continuations_equal_those_of_transformers(llm, oracle, num_prompts, max_tokens):
    prompts = PROMPTS[:num_prompts]
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for prompt, completion in zip(prompts, llm.complete(prompts, greedy), strict=True):
        assert len(completion.tokens) == max_tokens
        tokens = llm.tokenizer.encode(prompt, bos=False, eos=False)
        with torch.inference_mode():
            logits = oracle(torch.tensor([tokens + completion.tokens])).logits[0]
        # every token is the likeliest after those before it: the greedy continuation, checked in one pass
        assert logits[len(tokens) - 1 : -1].argmax(-1).tolist() == completion.tokens


def test_logits_equal_those_of_transformers(llm, oracle):
    tokens = llm.tokenizer.encode(" ".join(PROMPTS), bos=False, eos=False)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    found = llm.model(torch.tensor([tokens]), 0)[0]
    assert (found - expected).abs().max() < 1e-3
    assert (found - expected).abs().mean() < 1e-4


def test_three_ranks_answer_as_one(llm):
    tokens = llm.tokenizer.encode(PROMPTS[0], bos=False, eos=False)
    [alone] = llm.complete([tokens], SamplingParams(temperature=0.0, max_tokens=8))
    done = forked(3, "smollm2_ranks.py", *tokens)
    assert done.returncode == 0, done.stderr
    assert f"tokens {alone.tokens}" in done.stdout


def test_blocks_that_stay_packed_give_the_logits_of_the_unpacked_weights(llm, packed):
    tokens = packed.tokenizer.encode(" ".join(PROMPTS), bos=False, eos=False)
    found, expected = packed.model(torch.tensor([tokens]), 0)[0], llm.model(torch.tensor([tokens]), 0)[0]
    scores = found.log_softmax(-1)
    divergence = (expected.log_softmax(-1).exp() * (expected.log_softmax(-1) - scores)).sum(-1).mean()
    assert divergence < 0.002  # activations are rounded to 8 bits, and where they stand out to 16
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("name", ["llm", "packed"])
def test_the_default_model_answers_a_question(request, name):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [answer] = request.getfixturevalue(name).chat_completion([question], temperature=0.0)
    assert "Paris" in answer["generation"]["content"]


def test_inspect_says_that_the_embedding_is_kept_packed():
    stored = inspect(default_model()).types["Q8_0"]
    assert (stored.tensors, stored.packed) == (1, has_kernels("q8_0", "cpu"))
