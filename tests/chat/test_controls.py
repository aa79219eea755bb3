"""Nothing that a person types becomes a control token."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.chat import (
    CHATML_TEMPLATE,
    CONTENT,
    LLAMA2_TEMPLATE,
    LLAMA3_TEMPLATE,
    PIECES,
    PLAIN,
    TEXT,
    ByteTokenizer,
    joined,
    parts,
    plain_chatml,
    plain_llama2,
    plain_llama3,
    spread,
    turns,
)

from llama.chat import (
    FORMATS,
    JinjaFormat,
    choose_format,
)


def dialogs(roles):
    """Dialogs of the given roles in the given order, with any content."""
    contents = st.tuples(*[CONTENT] * len(roles))
    return contents.map(lambda texts: [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])


ROLES = {
    "llama2": ("system", "user", "assistant", "user"),
    "llama3": ("system", "user", "assistant", "tool"),
    "chatml": ("tool", "user", "assistant", "system"),
    "atom": ("system", "user", "assistant", "user"),
    "alpaca": ("system", "user", "assistant", "user"),
    "vicuna": ("system", "user", "assistant", "user"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_only_control_tokens_are_the_formats_own(name):
    tokenizer = ByteTokenizer()
    chosen = FORMATS[name](tokenizer)

    @spread(200)
    @given(dialogs(ROLES[name]))
    @example([{"role": role, "content": ""} for role in ROLES[name]])
    def check(dialog):
        expected = joined(PLAIN[name](dialog, tokenizer.special_tokens))
        assert parts(tokenizer, chosen.encode(dialog)) == expected

    check()


# Templates that take content apart and put it together, and what they must come to: each maps the contents of a
# dialog to the text between the template's own control tokens. None: only the control tokens are compared.
MEDDLERS = {
    "{{ eos_token }}{{ '<|' + messages[0].content + '|>' }}{{ eos_token }}": lambda c: f"<|{c[0]}|>",
    "{{ eos_token }}{{ '<' ~ messages[0].content ~ messages[1].content }}{{ eos_token }}": (lambda c: f"<{c[0]}{c[1]}"),
    "{{ eos_token }}{{ messages | map(attribute='content') | join('') }}{{ eos_token }}": "".join,
    "{{ eos_token }}{{ messages[0].content | trim }}{{ messages[1].content.strip() }}{{ eos_token }}": (
        lambda c: c[0].strip() + c[1].strip()
    ),
    "{{ eos_token }}{% for m in messages %}{{ m.content[::-1] }}{% endfor %}{{ eos_token }}": (
        lambda c: "".join(text[::-1] for text in c)
    ),
    "{{ eos_token }}{{ messages[0].content[1:] ~ messages[1].content[:-1] }}{{ eos_token }}": (
        lambda c: c[0][1:] + c[1][:-1]
    ),
    "{{ eos_token }}{{ messages[0].content | list | join('') }}{{ eos_token }}": lambda c: c[0],
    "{{ eos_token }}{{ messages[0].content | replace(' ', '') }}{{ eos_token }}": lambda c: c[0].replace(" ", ""),
    "{{ eos_token }}{{ messages[0].content | tojson }}{{ eos_token }}": None,
    "{{ eos_token }}{{ messages[0].content | upper }}{{ messages[1].content | lower }}{{ eos_token }}": None,
    "{{ eos_token }}{{ messages[0].content.split('|') | join('|') }}{{ eos_token }}": lambda c: c[0],
    "{{ eos_token }}{% if '<' in messages[0].content %}{{ messages[0].content }}{% endif %}{{ eos_token }}": None,
    "{{ eos_token }}{{ messages[0].content.replace('x', '').replace('<|IM_END|>', '<|im_end|>') }}{{ eos_token }}": (
        None
    ),
    "{% set ns = namespace(t='') %}{{ eos_token }}{% for m in messages %}{% set ns.t = ns.t + m.content %}"
    "{% endfor %}{{ ns.t }}{{ eos_token }}": "".join,
    "{{ eos_token }}{% set t %}{{ messages[0].content }}{{ messages[1].content }}{% endset %}{{ t }}{{ eos_token }}": (
        lambda c: c[0] + c[1]
    ),
}


@pytest.mark.parametrize("template", MEDDLERS)
def test_a_template_cannot_assemble_control_tokens_out_of_content(template):
    tokenizer = ByteTokenizer()
    chosen = JinjaFormat(tokenizer, template)
    mark = tokenizer.eos_id

    @spread(100)
    @given(dialogs(("user", "assistant", "user")))
    @example(turns("<|im_", "end|>", ""))
    @example(turns("im_end", "", ""))
    @example(turns("|im_end|>", "<|im_end|>", "<"))
    @example(turns("< | i m _ e n d | >", "HA", "LT"))
    @example(turns(">|dne_mi|<", ">dnuos<", ""))
    @example(turns("<|IM_END|>", "<|im_end|>", "<|im_xend|>"))
    def check(dialog):
        found = parts(tokenizer, chosen.encode(dialog))
        assert found[:2] == [tokenizer.bos_id, mark]
        assert found[-1] == mark
        between = found[2:-1]
        assert all(isinstance(part, str) for part in between)
        if MEDDLERS[template]:
            assert "".join(between) == MEDDLERS[template]([message["content"] for message in dialog])

    check()


@pytest.mark.parametrize(
    ("template", "plain", "roles"),
    [
        (LLAMA2_TEMPLATE, plain_llama2, ("system", "user", "assistant", "user")),
        (LLAMA3_TEMPLATE, plain_llama3, ("system", "user", "assistant", "user")),
        (CHATML_TEMPLATE, plain_chatml, ("system", "user", "assistant", "tool")),
    ],
    ids=["llama2", "llama3", "chatml"],
)
def test_a_jinja_format_places_its_own_control_tokens_and_no_others(template, plain, roles):
    tokenizer = ByteTokenizer(bos="<|begin_of_text|>" if plain is plain_llama3 else "<s>")
    chosen = JinjaFormat(tokenizer, template)

    @spread(150)
    @given(dialogs(roles))
    def check(dialog):
        expected = joined(plain(dialog, tokenizer.special_tokens))
        assert parts(tokenizer, chosen.encode(dialog)) == expected

    check()


@pytest.mark.parametrize("chat_format", [None, "chatml"])
def test_the_default_models_prompt_holds_only_its_own_control_tokens(smollm, chat_format):
    chosen = choose_format(chat_format, smollm)
    controls = smollm.special_tokens
    contents = st.lists(st.one_of(st.sampled_from([*PIECES, *controls]), TEXT), max_size=6).map("".join)

    def shown(part):  # the vocabulary lacks a few bytes of rare characters
        return smollm.decode(smollm.encode(part, bos=False, eos=False)) if isinstance(part, str) else part

    @spread(120)
    @given(st.tuples(contents, contents, contents))
    def check(texts):
        dialog = turns(*texts[1:], system=texts[0])
        expected = joined(plain_chatml(dialog, controls | {"<s>": ""}))
        assert parts(smollm, chosen.encode(dialog)) == [shown(part) for part in expected]

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, "own"])
def test_the_only_control_tokens_are_the_formats_own_in_a_long_search(name):
    template = CHATML_TEMPLATE if name == "own" else None
    tokenizer = ByteTokenizer(template=template)
    chosen = choose_format(None if template else name, tokenizer)
    plain = PLAIN["chatml" if template else name]

    @spread(10_000)
    @given(dialogs(ROLES["chatml" if template else name]))
    def check(dialog):
        expected = joined(plain(dialog, tokenizer.special_tokens))
        assert parts(tokenizer, chosen.encode(dialog)) == expected

    check()
