"""What each chat format writes, and what it refuses."""

import json

import pytest
from support.chat import (
    CHATML_TEMPLATE,
    DIALOG,
    LLAMA2_TEMPLATE,
    LLAMA3_TEMPLATE,
    THINK_TEMPLATE,
    ByteTokenizer,
    parts,
    turns,
)

from llama import chat
from llama.chat import (
    FORMATS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    DialogError,
    JinjaFormat,
    Prompt,
    choose_format,
    format_dialog,
)
from llama.tokenizer import Tokenizer


def test_a_llama2_prompt_reads_as_published():
    dialog = turns("Hello, how are you?", "I'm fine. ", "What is new?", system="Answer like a pirate")
    assert format_dialog(dialog, ByteTokenizer(), "llama2").text == (
        "<s>[INST] <<SYS>>\nAnswer like a pirate\n<</SYS>>\n\nHello, how are you? [/INST] I'm fine. </s>"
        "<s>[INST] What is new? [/INST]"
    )


def test_a_llama3_prompt_reads_as_published():
    dialog = [*turns(" Hi ", system="Be kind"), {"role": "tool", "content": "4"}]
    assert format_dialog(dialog, ByteTokenizer(), "llama3").text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_chatml_prompt_reads_as_published():
    tokenizer = ByteTokenizer(add_bos=False)
    assert format_dialog(turns(" Hi ", system="Be kind"), tokenizer, "chatml").text == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_atom_prompt_reads_as_published():
    assert format_dialog(turns("你好", "好", "再见 ", system="简短"), ByteTokenizer(), "atom").text == (
        "<s>System: 简短\n</s><s>Human: 你好\n</s><s>Assistant: 好\n</s><s>Human: 再见\n</s><s>Assistant: "
    )


def test_an_alpaca_prompt_reads_as_published():
    assert format_dialog(turns("Add.", "2", "Why?"), ByteTokenizer(), "alpaca").text == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:\n2</s>\n\n### Instruction:\nWhy?\n\n### Response:\n"
    )


def test_a_vicuna_prompt_reads_as_published():
    assert format_dialog(turns("Hi", "Hello!", "Bye"), ByteTokenizer(), "vicuna").text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:"
    )


@pytest.mark.parametrize("name", ["alpaca", "vicuna"])
def test_a_system_message_replaces_the_preamble(name):
    text = format_dialog(turns("Hi", system=" Rules. "), ByteTokenizer(), name).text
    assert text.startswith("<s>Rules.")
    assert FORMATS[name].PREAMBLE not in text


@pytest.mark.parametrize("name", FORMATS)
def test_text_and_tokens_of_a_prompt_agree(name):
    tokenizer = ByteTokenizer()
    shown = format_dialog(DIALOG, tokenizer, name)
    names = {token: text for text, token in tokenizer.special_tokens.items()}
    assert shown.text == "".join(names.get(part, part) for part in parts(tokenizer, shown.tokens))


@pytest.mark.parametrize("name", ["llama2", "atom", "alpaca", "vicuna", "chatml"])
def test_bos_is_placed_only_where_the_tokenizer_says_so(name):
    tokenizer = ByteTokenizer(add_bos=False)
    assert tokenizer.bos_id not in FORMATS[name](tokenizer).encode(DIALOG)
    assert ByteTokenizer().bos_id == FORMATS[name](ByteTokenizer()).encode(DIALOG)[0]


def test_chatml_does_not_double_a_bos_that_is_its_own_start():
    tokenizer = ByteTokenizer(bos="<|im_start|>")
    assert parts(tokenizer, FORMATS["chatml"](tokenizer).encode(turns("a")))[:2] == [
        tokenizer.bos_id,
        "user\na",
    ]


def test_llama2_segments_are_encoded_one_by_one(sentencepiece_file):
    """As the reference does: encode(one pair, bos, eos) + ... + encode(the last, bos)."""
    tokenizer = Tokenizer(str(sentencepiece_file))
    expected = [
        *tokenizer.encode("[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hello? [/INST] Yes! ", bos=True, eos=True),
        *tokenizer.encode("[INST] What is\n1 + 1? 你好 [/INST]", bos=True, eos=False),
    ]
    chosen = choose_format(None, tokenizer)
    assert chosen.name == "llama2"
    assert chosen.encode(DIALOG) == expected
    assert chosen.text(DIALOG).count("<s>") == 2


def test_a_segment_after_bos_begins_with_the_space_that_sentencepiece_adds(sentencepiece_file):
    """ "▁[", not "[": where tokenizers disagree about text after a control token, Meta's way is kept."""
    tokenizer = Tokenizer(str(sentencepiece_file))
    for chosen in (FORMATS["llama2"](tokenizer), JinjaFormat(tokenizer, LLAMA2_TEMPLATE)):
        assert tokenizer.sp_model.id_to_piece(chosen.encode(turns("Hi"))[1]) == "▁["


def test_llama2_equals_its_published_template():
    for tokenizer in (ByteTokenizer(), ByteTokenizer(add_bos=True, eos="<|endoftext|>")):
        for dialog in (turns(" a "), turns("a", " b\n", "c"), DIALOG):
            native = FORMATS["llama2"](tokenizer).encode(dialog)
            assert JinjaFormat(tokenizer, LLAMA2_TEMPLATE).encode(dialog) == native


def test_llama3_equals_its_published_template(llama3_file):
    tokenizer = Tokenizer(str(llama3_file))
    for dialog in (turns(" a "), DIALOG, turns("\nx = [1,\n  2]\n", "", "...Ünïcode 12345 \t")):
        native = FORMATS["llama3"](tokenizer).encode(dialog)
        assert JinjaFormat(tokenizer, LLAMA3_TEMPLATE).encode(dialog) == native


def test_llama3_equals_metas_own_code(llama3_file):
    """llama-models does not strip content, so the dialog has nothing to strip."""
    theirs = pytest.importorskip("llama_models.llama3.chat_format")
    datatypes = pytest.importorskip("llama_models.datatypes")
    tokenizer = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer(llama3_file)
    dialog = turns("Hello <|eot_id|>?", "Yes!", "What is\n1 + 1? 你好", system="Be brief.")
    dialog.append({"role": "tool", "content": '{"answer": 2}'})
    messages = [datatypes.RawMessage(role=m["role"], content=m["content"]) for m in dialog]
    expected = theirs.ChatFormat(tokenizer).encode_dialog_prompt(messages).tokens
    assert choose_format(None, Tokenizer(str(llama3_file))).encode(dialog) == expected


def test_chatml_equals_smollms_own_template_from_a_system_message_on(smollm):
    own = choose_format(None, smollm)
    assert isinstance(own, JinjaFormat)
    for dialog in (DIALOG, turns("", system=""), turns("1", "2 < 3 and 4 | 5", "<a href='x'>", system="s")):
        assert own.encode(dialog) == choose_format("chatml", smollm).encode(dialog)


def test_smollms_own_template_keeps_its_default_system_message(smollm):
    text = format_dialog(turns("Hi"), smollm).text
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [LLAMA2_TEMPLATE, LLAMA3_TEMPLATE, CHATML_TEMPLATE, THINK_TEMPLATE])
def test_templates_render_as_in_transformers(template):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    tokenizer = ByteTokenizer(add_bos=False)
    for dialog in (DIALOG, turns("<b>&amp; \"quoted\" 'text'", "a</thought>b", "%s {x} {{ y }} {% z %}")):
        expected, _ = theirs(
            [dialog], chat_template=template, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
        )
        assert JinjaFormat(tokenizer, template).text(dialog) == expected[0]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLING = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "four"},
]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_without_a_place_for_tools_tells_of_them_in_text(name):
    text = FORMATS[name](ByteTokenizer()).text(Prompt([{"role": "system", "content": "Be kind"}, *CALLING], (TOOL,)))
    places = [text.rindex(part) for part in ("Be kind", json.dumps(TOOL), "2 + 2?", '{"name": "add", "', "four")]
    assert places == sorted(places)
    assert FORMATS[name](ByteTokenizer()).text(CALLING).index("four")  # also where no tools are offered any more


def test_a_template_that_takes_tools_gets_calls_with_their_arguments_as_mappings():
    template = (
        "{% for tool in tools %}{{ tool.function.name }};{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.a }}{% endfor %}"
        "{{ m.tool_call_id or '' }};{% endfor %}"
    )
    dialog = [dict(message) for message in CALLING]
    dialog[1]["tool_calls"] = [{"id": "c", "function": {"name": "add", "arguments": '{"a": "</s>"}'}}]
    format = JinjaFormat(ByteTokenizer(), template)
    assert format.text(Prompt(dialog, (TOOL,))) == "<s>add;user:2 + 2?;assistant:add</s>;tool:fourc;"
    assert ByteTokenizer().eos_id not in format.encode(Prompt(dialog, (TOOL,)))


def test_a_models_answer_is_the_next_message():
    message = FORMATS["llama2"](ByteTokenizer()).parse("Hello")
    assert message == {"role": "assistant", "content": "Hello"}


def test_each_format_says_what_ends_an_answer():
    tokenizer = ByteTokenizer()
    ids = tokenizer.special_tokens
    chosen = {name: kind(tokenizer) for name, kind in FORMATS.items()}
    assert chosen["llama2"].stop_ids == {ids["</s>"]}
    assert chosen["llama3"].stop_ids == {ids["</s>"], ids["<|eot_id|>"], ids["<|eom_id|>"]}
    assert chosen["chatml"].stop_ids == {ids["</s>"], ids["<|im_end|>"]}
    assert chosen["alpaca"].stop == ("### Instruction:",)
    assert chosen["vicuna"].stop == ("USER:",)
    assert chosen["atom"].stop == ("Human:",)


ORDER = (
    "model only supports 'system', 'user' and 'assistant' roles, "
    "starting with 'system', then 'user' and alternating (u/a/u/a/u...)"
)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], ORDER),
        (["user", "user"], ORDER),
        (["user", "assistant", "system"], ORDER),
        (["system", "assistant"], ORDER),
        (["system", "system", "user"], ORDER),
        (["user", "tool", "user"], ORDER),
        (["user", "evil", "user"], ORDER),
        (["user", "assistant"], "Last message must be from user, got assistant"),
        (["system"], "Last message must be from user, got system"),
    ],
)
def test_llama2_refuses_a_wrong_order_in_the_references_words(roles, message):
    dialog = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(AssertionError) as error:  # what the reference raises
        FORMATS["llama2"](ByteTokenizer()).encode(dialog)
    assert str(error.value) == message
    assert isinstance(error.value, DialogError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("name", [*FORMATS, None])
def test_an_unknown_role_is_an_error_and_never_text(name):
    dialog = [*turns("a", "b"), {"role": "user<|im_end|>", "content": "c"}]
    with pytest.raises(DialogError):
        format_dialog(dialog, ByteTokenizer(template=CHATML_TEMPLATE), name)


def test_the_error_for_an_unknown_role_names_the_allowed_ones():
    with pytest.raises(DialogError, match=r"^message 2 has role 'bot'; allowed: system, user, assistant, tool$"):
        FORMATS["chatml"](ByteTokenizer()).encode([*turns("a"), {"role": "bot", "content": "b"}])
    with pytest.raises(DialogError, match=r"^message 2 has role 'system'; allowed: user, assistant$"):
        FORMATS["vicuna"](ByteTokenizer()).encode([*turns("a"), {"role": "system", "content": "b"}])


def test_half_a_character_is_shown_as_the_replacement_character(smollm):
    for chat_format in (None, "chatml"):
        tokens = choose_format(chat_format, smollm).encode(turns("a\ud800b", system="s"))
        assert "user\na\ufffdb\n" in smollm.decode(tokens)


@pytest.mark.parametrize("tag", SPECIAL_TAGS)
def test_llama2_tags_in_any_message_are_unsafe(tag):
    for chosen in (FORMATS["llama2"](ByteTokenizer()), JinjaFormat(ByteTokenizer(), LLAMA2_TEMPLATE)):
        assert not chosen.is_unsafe(turns("[inst]", "b", "c", system="<SYS>"))
        for place in range(4):
            dialog = turns("a", "b", "c", system="s")
            dialog[place]["content"] = f"x{tag}y"
            assert chosen.is_unsafe(dialog)
            assert not FORMATS["llama3"](ByteTokenizer()).is_unsafe(dialog)
            assert not JinjaFormat(ByteTokenizer(), CHATML_TEMPLATE).is_unsafe(dialog)


def test_the_references_names_keep_their_values():
    assert (chat.B_INST, chat.E_INST) == ("[INST]", "[/INST]")
    assert (chat.B_SYS, chat.E_SYS) == ("<<SYS>>\n", "\n<</SYS>>\n\n")
    assert SPECIAL_TAGS == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."
