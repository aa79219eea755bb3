"""Templates: what they are given, and what they may not do."""

import json

import pytest
from support.chat import (
    CHATML_TEMPLATE,
    THINK_TEMPLATE,
    ByteTokenizer,
    turns,
)

from llama.chat import (
    ChatFormatError,
    DialogError,
    JinjaFormat,
    Prompt,
)


def render(template, dialog=None, **options):
    """The text of a prompt, for a template that needs no more than a fake tokenizer."""
    return JinjaFormat(ByteTokenizer(add_bos=False, **options), template).text(dialog or turns("Hi"))


def test_bos_is_added_to_a_template_without_it_and_never_doubled():
    tokenizer = ByteTokenizer()
    for template in ("{{ messages[0].content }}", "{{ bos_token }}{{ messages[0].content }}"):
        assert JinjaFormat(tokenizer, template).encode(turns("Hi")) == [tokenizer.bos_id, *b"Hi"]


def test_a_template_that_places_bos_itself_keeps_it_whatever_the_tokenizer_says():
    assert render("{{ bos_token }}Hi") == "<s>Hi"


def test_a_token_that_the_vocabulary_lacks_is_empty_in_templates():
    assert render("[{{ bos_token }}{{ eos_token }}]", controls=("<x>",)) == "[]"


def test_templates_look_into_content_as_it_is():
    dialog = turns("be_quiet <|im_end|>", "a</think>\n\nb", "up")
    assert render("{{ messages[0].content | upper }}", dialog) == "BE_QUIET <|IM_END|>"
    assert render("{{ 'yes' if '_quiet' in messages[0].content }}", dialog) == "yes"
    assert render(THINK_TEMPLATE, turns("1", "<think>hm</think>\n\n2", "3")).startswith(
        "<|im_start|>user\n1<|im_end|><|im_start|>assistant\n2<|im_end|><|im_start|>user\n3<|im_end|>"
    )


def test_a_control_string_in_content_never_stands_in_for_the_templates_own():
    """Such templates place a control token only where content has none."""
    tokenizer = ByteTokenizer(add_bos=False)
    end = tokenizer.special_tokens["<|im_end|>"]
    for template in (
        "{% set c = messages[0].content %}{{ c if '<|im_end|>' in c else c + '<|im_end|>' }}",
        "{% set c = messages[0].content %}{{ c }}{% if not c.endswith('<|im_end|>') %}<|im_end|>{% endif %}",
        "{{ (messages[0].content.split('<|im_end|>') | first) + '<|im_end|>' }}",
    ):
        chosen = JinjaFormat(tokenizer, template)
        assert chosen.encode(turns("a")) == [*b"a", end]
        for text in ("a<|im_end|>", "a<|im_end|>b"):
            tokens = chosen.encode(turns(text))
            assert tokens in ([*text.encode(), end], [*b"a", end])


def test_templates_have_what_transformers_gives_them():
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ {'a': ['é', '<']} | tojson }}") == '{"a": ["é", "<"]}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"
    assert render("{{ tools is none and documents is none and add_generation_prompt }}") == "True"
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ '<{}:{:>3}>'.format('a', 1) }}{{ '%s%%' % 5 }}") == "<a:  1>5%"
    assert render("{% if true %}\n  {% set x = 1 %}\n{% endif %}\nx") == "x"  # trim_blocks, lstrip_blocks
    assert render("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) ~ f('a') }}") == "<1><a>"
    assert render("{% for a in [1, 2] %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}") == (
        "1/2,2/2"
    )


def test_templates_see_only_role_and_content_of_a_message():
    message = {"role": "user", "content": "Hi", "name": "<|im_start|>", "tool_calls": [1]}
    assert render("{{ messages }}", [message]) == "[{'role': 'user', 'content': 'Hi'}]"


TOOL = {
    "type": "function",
    "function": {"name": "look<|im_end|>", "parameters": {"properties": {"</s>": {"type": "string"}}}},
}


def test_templates_are_told_of_tools_and_options():
    template = (
        "{% for tool in tools %}{{ tool.type }} {{ tool['function'].name }} {% endfor %}"
        "{{ 'quick' if enable_thinking is false }} {{ style }}"
    )
    prompt = Prompt(tuple(turns("Hi")), (TOOL,), {"enable_thinking": False, "style": "plain"})
    assert render(template, prompt) == "function look<|im_end|> quick plain"


def test_control_strings_in_tools_and_options_stay_text():
    tokenizer = ByteTokenizer(add_bos=False)
    template = "{{ tools | tojson }}{{ style }}<|im_end|>{{ messages[0].content }}"
    chosen = JinjaFormat(tokenizer, template)
    prompt = Prompt(tuple(turns("Hi")), (TOOL,), {"style": "<think>"})
    text = json.dumps([TOOL]) + "<think>"
    assert chosen.encode(prompt) == [*text.encode(), tokenizer.special_tokens["<|im_end|>"], *b"Hi"]


def test_a_templates_refusal_is_one_line():
    template = "{% if messages | length > 1 %}{{ raise_exception('one\nmessage ' ~ 'only') }}{% endif %}"
    with pytest.raises(DialogError, match=r"^the model's chat template refuses this dialog: one message only$"):
        render(template, turns("a", "b"))


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ['__class__'] | map('attr', '__class__') | list }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'].system('touch OWNED') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ range.__class__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages.clear() }}",
    "{% set _ = messages[0].pop('role') %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% do messages.pop() %}",
    "{{ joiner.__call__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "{{ (messages | map('tojson')).gi_frame.f_globals }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ config.items() }}",
    "{{ messages | random }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_reaches_for_python_is_refused_and_does_nothing(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dialog = turns("Hi", "Yes", "Why?")
    with pytest.raises(ChatFormatError) as error:
        render(template, dialog)
    assert "\n" not in str(error.value)
    assert dialog == turns("Hi", "Yes", "Why?")
    assert not list(tmp_path.iterdir())


BOMBS = [
    "{{ 'a' * 9999999999 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ [1] * 10 ** 9 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a' | indent(10 ** 9, true) }}",
    "{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}{% set b = m(n - 1) %}{% endif %}{% endmacro %}{{ m(50) }}",
    "{{ (['a' * 10000] * 10000) | join }}",
    "{{ range(99999) | map('center', 99999) | list }}",
    "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% set t = 'a' * 9999 %}{% for i in range(99999) %}{{ t }}{% endfor %}",
    "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + ['a' * 9999] %}{% endfor %}",
]


STOPPED = "longer or writes more than any prompt|larger than any prompt|Range too big|recursion depth"


@pytest.mark.parametrize("template", BOMBS)
def test_a_template_that_runs_or_grows_without_end_is_stopped(template):
    with pytest.raises(ChatFormatError, match=STOPPED) as error:  # and not by the end of memory
        render(template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ '%0999999999d' % 1 }}", "a format may not have a width of more than three digits"),
        ("{{ '%*d' % (999999999, 1) }}", "a format may not have a width of more than three digits"),
        ("{{ '{:>999999999}'.format(1) }}", "a format may not have a width of more than three digits"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "it makes a value larger than any prompt"),
        ("{{ '%0999999999d' | format(1) }}", "No filter named 'format'"),
        ("{{ lipsum(n=999999) }}", "'lipsum' is undefined"),
    ],
)
def test_a_format_cannot_make_a_short_value_long(template, message):
    with pytest.raises(ChatFormatError, match=message):
        render(template)


def test_a_long_dialog_is_within_the_bounds():
    dialog = turns(*["word " * 200] * 999)
    template = "{% for m in messages %}{{ m.role ~ m.content | trim | replace('word', 'another word') }}{% endfor %}"
    assert render(template, dialog).count("another") == 999 * 200
    assert len(render(CHATML_TEMPLATE, turns("<" * 10**6))) > 10**6


def test_a_broken_template_is_one_line_with_its_place():
    with pytest.raises(ChatFormatError, match=r"^the chat template fails: line 2: .*; give chat_format, one of llama2"):
        render("{{ messages }}\n{% for %}")


def test_a_dialog_that_uses_up_the_stand_ins_is_refused():
    every = "".join(map(chr, range(0xF0000, 0x10FFFE)))
    with pytest.raises(DialogError, match="private code points"):
        render(CHATML_TEMPLATE, turns(every))
    assert every[:-200] in render(CHATML_TEMPLATE, turns(every[:-200]))
