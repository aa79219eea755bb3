import pytest
import torch
from support import slow
from support.tiny import tiny_args, tiny_model, tiny_weights

from llama.model import ModelArgs, Transformer
from llama.rotary import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

SHAPES = {
    "plain": dict(n_kv_heads=None),
    "grouped keys": dict(),
    "one key head": dict(n_kv_heads=1),
    "linear rope scaling": dict(rope_scaling=LinearScaling(4.0)),
    "llama3 rope scaling": dict(rope_scaling=Llama3Scaling(8.0, original_max_seq_len=64)),
    "yarn": dict(rope_scaling=YarnScaling(4.0, 16), head_dim=32),
    "yarn, vectors kept": dict(rope_scaling=YarnScaling(4.0, 16, 4.0, 0.5, 1.0), head_dim=32),
    "tied embeddings": dict(tie_word_embeddings=True),
    "odd hidden size": dict(hidden_dim=37, dim=48),
    "head size of its own": dict(head_dim=10),
    "biases": dict(attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "sliding window": dict(sliding_window=6),
}
DYNAMIC = dict(rope_scaling=DynamicScaling(4.0, 16))
TOKENS = [(7 * i * i + 3 * i) % 264 for i in range(40)]


@pytest.mark.parametrize("shape", [*SHAPES.values(), DYNAMIC], ids=[*SHAPES, "dynamic"])
def test_logits_of_all_positions_equal_a_slow_implementation(shape):
    args = tiny_args(**shape)
    logits = tiny_model(args)(torch.tensor([TOKENS]), 0)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], slow.logits(tiny_weights(args), args, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_sequence_in_pieces_gives_the_logits_of_the_whole(shape):
    model = tiny_model(tiny_args(**shape))
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    pieces = [(0, 9), (9, 10), (10, 11), (11, 30), (30, 40)]
    whole = model(tokens, 0)
    parts = torch.cat([model(tokens[:, a:b], a) for a, b in pieces], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "start_pos"), [(1, 5), (2, 5), (3, 9), (4, 9), (2, 10), (2, 14), (1, -1)])
def test_rows_that_lack_what_comes_before_are_refused(rows, start_pos):
    model = tiny_model(tiny_args())
    if start_pos != 5:  # else nothing was given before
        model(torch.tensor([TOKENS[:4]] * 3), 0)
        model(torch.tensor([TOKENS[4:9]] * 2), 4)
    with pytest.raises(ValueError, match=f"start_pos is {start_pos}, but of {rows} rows no more than"):
        model(torch.tensor([TOKENS[:1]] * rows), start_pos)


def test_after_a_refusal_the_rows_that_were_given_go_on():
    model = tiny_model(tiny_args())
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    whole = model(tokens, 0)
    model = tiny_model(tiny_args())
    model(tokens[:, :9], 0)
    for refused in (torch.tensor([TOKENS[:1]] * 3), torch.tensor([[10**6]])):
        with pytest.raises((ValueError, IndexError)):
            model(refused, 9)
    torch.testing.assert_close(model(tokens[:, 9:], 9), whole[:, 9:], rtol=0, atol=1e-4)


def test_preparing_the_weights_changes_no_logit():
    model = tiny_model(tiny_args())
    before = model(torch.tensor([TOKENS]), 0)
    model.prepare()
    assert torch.equal(model(torch.tensor([TOKENS]), 0), before)


def test_prepared_weights_keep_their_names_as_views_of_one_buffer():
    model = tiny_model(tiny_args())
    names = set(model.state_dict())
    model.prepare()
    assert set(model.state_dict()) == names
    attention = model.layers[0].attention
    storages = {w.weight.untyped_storage().data_ptr() for w in (attention.wq, attention.wk, attention.wv)}
    assert len(storages) == 1


def test_bfloat16_logits_stay_close_to_float32_ones_in_either_weight_layout():
    args = tiny_args()
    exact = tiny_model(args)(torch.tensor([TOKENS]), 0)
    model = tiny_model(args).bfloat16()
    plain = model(torch.tensor([TOKENS]), 0)
    model.prepare()
    packed = model(torch.tensor([TOKENS]), 0)
    scale = exact.abs().max()
    assert (plain - exact).abs().max() < 0.05 * scale
    assert (packed - exact).abs().max() < 0.05 * scale


def test_a_model_built_on_the_meta_device_takes_no_memory():
    with torch.device("meta"):
        model = Transformer(ModelArgs(vocab_size=32000))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_hidden_size_follows_the_reference_formula():
    shapes = [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
    ]
    for dim, multiple_of, multiplier, hidden_dim in shapes:
        args = ModelArgs(dim=dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
        assert args.hidden_dim == hidden_dim


def test_weights_bear_the_reference_names():
    names = set(Transformer(tiny_args(n_layers=1)).state_dict())
    assert names == {
        "tok_embeddings.weight",
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.0.attention.wv.weight",
        "layers.0.attention.wo.weight",
        "layers.0.feed_forward.w1.weight",
        "layers.0.feed_forward.w2.weight",
        "layers.0.feed_forward.w3.weight",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "norm.weight",
        "output.weight",
    }
