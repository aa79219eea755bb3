"""A chat's own format: a name, or a template that comes with the request; and dialogs that are cut to fit."""

import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.chat import JinjaFormat, format_dialog
from llama.chat.template import PastedFormat
from llama.service import ENDPOINTS, Call, Refusal

CHAT, TOKENIZE, APPLY = (ENDPOINTS[path] for path in ("/v1/chat/completions", "/tokenize", "/apply-template"))
USER = [{"role": "user", "content": "hi"}]
LONG = [{"role": role, "content": f"{role} {i}"} for i in range(20) for role in ("user", "assistant")] + USER
PASTED = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args(max_batch_size=8, max_seq_len=512)), ByteTokenizer(), chat_format="llama2")


def asked(llm: Llama, **fields: object) -> str:
    [query] = Call.open(llm, CHAT, {"messages": USER, **fields}).queries
    return llm.tokenizer.decode(list(query.tokens))


def refused(llm: Llama, **fields: object) -> Refusal:
    with pytest.raises(Refusal) as found:
        Call.open(llm, CHAT, {"messages": USER, **fields})
    assert "\n" not in str(found.value)
    return found.value


@pytest.mark.parametrize("field", ["chat_template", "instruction_template"])
def test_a_request_may_choose_one_of_the_formats_by_name(llm, field):
    assert asked(llm) != asked(llm, **{field: "vicuna"}) == format_dialog(USER, ByteTokenizer(), "vicuna").text[3:]


@pytest.mark.parametrize("field", ["chat_template", "instruction_template_str"])
def test_a_request_may_bring_a_template(llm, field):
    assert asked(llm, **{field: PASTED}) == "<user> hi\n<bot> "
    for endpoint in (TOKENIZE, APPLY):
        call = Call.open(llm, endpoint, {"messages": USER, field: PASTED})
        found = call.respond(llm, [])
        assert "<user> hi\n<bot> " in (found.get("prompt") or llm.tokenizer.decode(found["tokens"]))
    call = Call.open(llm, CHAT, {"messages": USER, field: PASTED, "max_tokens": 4})
    assert call.respond(llm, list(llm.run(call.queries)))["choices"][0]["finish_reason"] in ("length", "stop")
    assert llm.chat_format.name == "llama2"  # nobody else's is changed


@pytest.mark.parametrize(
    ("template", "stop", "stop_ids"),
    [
        (PASTED, ("\n<user>",), {257}),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}", (), {257}),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>{% endfor %}", (), {257, 258}),
        ("{{ messages | length }}", (), {257}),
        ("{{ raise_exception('no') }}", (), {257}),
    ],
)
def test_an_answer_ends_with_what_the_template_writes_behind_one(template, stop, stop_ids):
    format = PastedFormat(ByteTokenizer(), template)
    assert (format.stop, format.stop_ids) == (stop, stop_ids)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages }", "fails: line 1: "),
        ("\n{% for m in messages %}\n{{ m.content }", "fails: line 3: "),
        ("\n\n{{ messages[0].nothing.more }}", "fails: line 3: "),
        ("\n{{ messages.__class__ }}", "fails: line 2: attribute '__class__'"),
        ("\n{{ 'x' * 100000000 }}", "fails: line 2: it makes a value larger than any prompt"),
        ("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}", "runs longer"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: "),
        ("{% include 'a' %}", "fails: line 1: "),
        ("{{ raise_exception('only three turns') }}", "only three turns"),
        ("nobody", "'nobody' is no chat format: give one of llama2, atom, alpaca, vicuna, or a"),
        ("/etc/passwd", "'/etc/passwd' is no chat format"),
        ("chatml", "needs <|im_start|>, <|im_end|>"),
        ("{{ 1 }}" * 10_000, "at most 65536 characters"),
    ],
)
def test_a_template_that_fails_is_refused_with_its_line(llm, template, said):
    assert said in str(refused(llm, chat_template=template))


def test_a_template_that_cannot_be_compiled_is_refused_under_its_field(llm):
    assert refused(llm, instruction_template_str="{{").param == "instruction_template_str"
    both = refused(llm, chat_template="vicuna", instruction_template="vicuna")
    assert (both.param, str(both)) == (
        "instruction_template", "instruction_template is given beside chat_template: give one of them"
    )  # fmt: skip


def test_what_a_template_may_use_is_bounded_in_time(llm, monkeypatch):
    from llama.chat.sandbox import Sandbox

    monkeypatch.setattr(Sandbox, "MOST_SECONDS", -1.0)
    assert "it runs longer or writes more than any prompt" in str(refused(llm, chat_template=PASTED))


def test_a_stranger_s_template_has_less_room_to_write_however_long_the_messages_are(llm):
    doubling = "{% set ns = namespace(s=messages[0].content) %}{% for i in range(7) %}{% set ns.s = ns.s ~ ns.s %}"
    long = [{"role": "user", "content": "x" * 100_000}]
    template = doubling + "{% endfor %}{{ ns.s[:3] }}"
    assert JinjaFormat(ByteTokenizer(), template).text(long) == "<s>xxx"
    assert "any prompt" in str(refused(llm, messages=long, chat_template=template))


def test_the_oldest_turns_are_left_out_where_a_length_is_asked_for(llm):
    with pytest.raises(Refusal, match="tokens, but max_seq_len is 512"):
        Call.open(llm, CHAT, {"messages": LONG})
    for length, most in ((200, 150), (10_000, 384)):
        text = asked(llm, messages=[{"role": "system", "content": "Be kind."}, *LONG], truncation_length=length)
        assert len(text) <= most + 10
        assert text.startswith("[INST] <<SYS>>\nBe kind.")
        assert text.endswith("[INST] hi [/INST]")
        assert "user 19" in text
        assert "user 0 " not in text
    assert "user 17" not in asked(llm, messages=LONG, truncation_length=200, max_tokens=100)
    assert asked(llm, truncation_length=200) == asked(llm)
    assert "shorten it" in str(refused(llm, truncation_length=8))
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = asked(llm, messages=LONG, truncation_length=512, tools=tools, chat_template="vicuna")
    assert '"name": "f"' in text
    assert text.count("USER") < 15
