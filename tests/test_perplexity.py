import math

import pytest
from support import slow
from support.tiny import ByteTokenizer, tiny_args, tiny_model, tiny_weights

from llama import Llama
from llama.perplexity import decoded_text, perplexity

ARGS = tiny_args()
TEXT = "The perplexity of a text is what its tokens cost, on average, under a sliding window."


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(ARGS), ByteTokenizer(), chat_format="llama2")


@pytest.mark.parametrize(("window", "stride"), [(200, None), (32, 8), (32, 31), (20, 1), (2, 1)])
def test_every_token_is_predicted_once_from_its_window(llm, window, stride):
    found = perplexity(llm, TEXT, window, stride)
    tokens = list(TEXT.encode())
    stride = stride or window // 2
    ends = [min(window - 1, len(tokens))]
    while ends[-1] < len(tokens):
        ends.append(min(ends[-1] + stride, len(tokens)))
    cost = 0.0
    for previous, end in zip([0, *ends], ends, strict=False):
        part = [ByteTokenizer.bos_id, *tokens[max(0, end - window + 1) : end]]
        scores = slow.logits(tiny_weights(ARGS), ARGS, part).log_softmax(-1)
        for back in range(end - previous, 0, -1):
            cost -= scores[len(part) - back - 1, part[-back]].item()
    assert found.num_tokens == len(tokens)
    assert found.perplexity == pytest.approx(math.exp(cost / len(tokens)), rel=1e-4)


def test_progress_ends_at_all_tokens(llm):
    seen = []
    perplexity(llm, TEXT, 32, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(TEXT), len(TEXT))


@pytest.mark.parametrize(
    ("text", "window", "stride", "message"),
    [
        ("", 32, None, "the text has 0 token"),
        (TEXT, 1, None, "window is 1"),
        (TEXT, 257, None, "window is 257 and stride 128: a window has 2 to 256 tokens"),
        (TEXT, 32, 32, "a stride 1 to 31"),
    ],
)
def test_a_text_or_window_that_cannot_be_measured_is_refused(llm, text, window, stride, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llm, text, window, stride)


def test_a_text_is_read_in_its_encoding_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "cafe.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"):
        file.write_text("café\n", encoding=encoding)
        assert decoded_text(file, encoding) == "café\n"
    file.write_text("\ufeffcafé")
    assert decoded_text(file) == "café"


def test_a_text_in_another_encoding_is_refused_with_its_byte_and_the_flag(tmp_path):
    file = tmp_path / "cafe.txt"
    file.write_text("café", encoding="latin-1")
    with pytest.raises(ValueError, match=r"cafe\.txt: byte 3 is 0xe9, which is not utf-8: .* --encoding"):
        decoded_text(file)
    with pytest.raises(ValueError, match="klingon"):
        decoded_text(file, "klingon")
