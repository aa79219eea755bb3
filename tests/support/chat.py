"""A tokenizer of bytes with control tokens, dialogs, and the chat formats once more, as plainly as can be written."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from llama.chat import FORMATS, SPECIAL_TAGS


class ByteTokenizer:
    """One token for each byte; control tokens follow. Stands for any tokenizer that keeps the interface."""

    CONTROLS = (
        *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"),
        *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        *("[TOOL]", "[/TOOL]", "HALT", "\n\n\n\n"),  # added words and white space, as real vocabularies have
    )

    def __init__(self, controls=CONTROLS, *, bos="<s>", eos="</s>", add_bos=True, template=None, kind="bytes"):
        self.special_tokens = {token: 256 + place for place, token in enumerate(controls)}
        self.n_words = 256 + len(controls)
        self.bos_id = self.special_tokens.get(bos, -1)
        self.eos_id = self.special_tokens.get(eos, -1)
        self.pad_id = -1
        self.stop_ids = frozenset({self.eos_id})
        self.add_bos = add_bos
        self.chat_template = template
        self.kind = kind

    def encode(self, s, bos, eos):
        return [self.bos_id] * bos + list(s.encode()) + [self.eos_id] * eos

    def encode_pieces(self, pieces):
        return [id for piece in pieces for id in ([piece] if isinstance(piece, int) else piece.encode())]

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode()


def turns(*contents, system=None):
    """A dialog of alternating user and assistant messages."""
    roles = ("user", "assistant")
    dialog = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return dialog if system is None else [{"role": "system", "content": system}, *dialog]


def parts(tokenizer, tokens):
    """Tokens as what they mean: control tokens as ids, the text between them decoded."""
    controls = set(tokenizer.special_tokens.values())
    found, text = [], []
    for token in [*tokens, None]:
        if token is not None and token not in controls:
            text.append(token)
            continue
        if text:
            found.append(tokenizer.decode(text))
            text = []
        if token is not None:
            found.append(token)
    return found


def joined(pieces):
    """Segments with touching texts put together and empty ones left out."""
    found = []
    for piece in pieces:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        elif piece != "":
            found.append(piece)
    return found


def plain_llama2(dialog, ids):
    dialog = [dict(message) for message in dialog]
    if dialog[0]["role"] == "system":
        merged = "<<SYS>>\n" + dialog[0]["content"] + "\n<</SYS>>\n\n" + dialog[1]["content"]
        dialog = [{"role": dialog[1]["role"], "content": merged}, *dialog[2:]]
    pieces = []
    for user, answer in zip(dialog[::2], dialog[1::2]):  # noqa: B905
        pieces += [
            ids["<s>"],
            f"[INST] {user['content'].strip()} [/INST] {answer['content'].strip()} ",
            ids["</s>"],
        ]
    return [*pieces, ids["<s>"], f"[INST] {dialog[-1]['content'].strip()} [/INST]"]


def plain_llama3(dialog, ids, tool="ipython"):
    pieces = [ids["<|begin_of_text|>"]]
    for message in dialog:
        role = tool if message["role"] == "tool" else message["role"]
        pieces += [ids["<|start_header_id|>"], role, ids["<|end_header_id|>"]]
        pieces += ["\n\n" + message["content"].strip(), ids["<|eot_id|>"]]
    return [*pieces, ids["<|start_header_id|>"], "assistant", ids["<|end_header_id|>"], "\n\n"]


def plain_chatml(dialog, ids):
    pieces = [ids["<s>"]]
    for message in dialog:
        pieces += [ids["<|im_start|>"], message["role"] + "\n" + message["content"], ids["<|im_end|>"], "\n"]
    return [*pieces, ids["<|im_start|>"], "assistant\n"]


def plain_atom(dialog, ids):
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    pieces = []
    for message in dialog:
        pieces += [ids["<s>"], f"{names[message['role']]}: {message['content'].strip()}\n", ids["</s>"]]
    return [*pieces, ids["<s>"], "Assistant: "]


def plain_alpaca(dialog, ids):
    system, rest = FORMATS["alpaca"].PREAMBLE, dialog
    if dialog[0]["role"] == "system":
        system, rest = dialog[0]["content"].strip(), dialog[1:]
    pieces = [ids["<s>"], system + "\n\n"]
    for message in rest:
        content = message["content"].strip()
        if message["role"] == "user":
            pieces += ["### Instruction:\n" + content + "\n\n"]
        else:
            pieces += ["### Response:\n" + content, ids["</s>"], "\n\n"]
    return [*pieces, "### Response:\n"]


def plain_vicuna(dialog, ids):
    system, rest = FORMATS["vicuna"].PREAMBLE, dialog
    if dialog[0]["role"] == "system":
        system, rest = dialog[0]["content"].strip(), dialog[1:]
    pieces = [ids["<s>"], system + " "]
    for message in rest:
        content = message["content"].strip()
        pieces += ["USER: " + content + " "] if message["role"] == "user" else ["ASSISTANT: " + content, ids["</s>"]]
    return [*pieces, "ASSISTANT:"]


PLAIN = {
    "llama2": plain_llama2,
    "llama3": plain_llama3,
    "chatml": plain_chatml,
    "atom": plain_atom,
    "alpaca": plain_alpaca,
    "vicuna": plain_vicuna,
}


# Published templates of Llama 2 and Llama 3 chat models.
LLAMA2_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}
{% set loop_messages = messages %}
{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}
{% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}"""


LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)


THINK_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}<|im_end|>{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


DIALOG = turns(" Hello? ", "Yes!\n", "What is\n1 + 1? 你好", system=" Be brief. ")


# What people may type: control strings, whole and in pieces, and whatever else could become one.
PIECES = [
    *ByteTokenizer.CONTROLS,
    *SPECIAL_TAGS,
    *(
        "<|im_",
        "start|>",
        "<|",
        "|>",
        "im_end",
        "<|im_end",
        "|im_end|>",
        "eot_id",
        "<",
        ">",
        "|",
        "[",
        "]",
        "/",
    ),
    *(
        "< |im_end|>",
        "<|im_<|im_end|>end|>",
        "<|IM_END|>",
        "＜|im_end|＞",
        "<｜im_end｜>",
        "<|im\u200b_end|>",
    ),
    *(
        "\x00",
        "\x00259\x00",
        "\x00256,257\x00",
        "\udb80\udc00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ),
    *(
        "\U000f0000",
        "\U000f0001\U000f0002",
        "\U0010fffd",
        "\ue000",
        "\ufffd",
        "<0x0A>",
        "\u2581",
        "\x1f",
        "\x85",
    ),
    *(
        "{{ eos_token }}",
        "{% raw %}",
        "{# c #}",
        "{}",
        "%s",
        "\\n",
        "&lt;s&gt;",
        "<pad>",
        "<|im_start|>system\nx",
    ),
    *(
        " ",
        "\n",
        "\n\n",
        "\t",
        "\u3000",
        "user",
        "assistant",
        "USER:",
        "### Instruction:",
        "Human:",
        "é",
        "你好",
    ),
]


TEXT = st.characters(codec="utf-8")


CONTENT = st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(PIECES), TEXT), max_size=6).map("".join)


def spread(num_examples):
    """So many generated dialogs, always the same ones. In an ordinary run they hold over 10,000 contents in all."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=health,
    )
