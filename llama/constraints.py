"""What an answer has to look like: a JSON schema, a regular expression or a grammar, and where an answer stands in it.

llguidance does the work. A constraint is compiled once for a vocabulary, while whoever asks waits, and copied for each
answer. Whatever somebody asks for takes a bounded time and memory, or is refused.
Source: llguidance's documentation, docs/json_schema.md and docs/syntax.md.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from llama.sampling_params import SHAPES, SamplingError, SamplingParams
from llama.tokenizer import StreamDecoder, Tokenizer

LIMITS = LLParserLimits(
    max_items_in_row=1200,  # some 300 optional properties of one object
    initial_lexer_fuel=1_000_000,  # 20 ms
    step_lexer_fuel=100_000,  # 7 ms
    step_max_items=10_000,
    max_lexer_states=20_000,  # 1 to 2 KB each
    max_grammar_size=100_000,
    verbose_errors=False,
)
LONGEST_CONSTRAINT = 64 * 1024
DEEPEST_SCHEMA = 64  # of a schema's brackets
NUM_KEPT = 64  # compiled constraints
STACK_BYTES = 64 << 20  # three times what the longest constraints take; what is not used is not there
SLOW = 0.005  # seconds; a token takes some 0.1 ms
MOST_SECONDS = 2.0  # that the slow tokens of one answer may take, of the processor's time
_T = TypeVar("_T")
_stack_lock = threading.Lock()  # a stack's size is set for all threads that start
UNKNOWN = " ⁇ ".encode()  # what sentencepiece shows for what its vocabulary lacks
WHITE_SPACE = r"\n?[ ]{0,16}"  # between JSON's tokens: room to indent, and none to go on for ever


class ConstraintError(SamplingError):
    """A constraint that cannot be kept, and why, in one line."""

    def __init__(self, param: str, message: str) -> None:
        text = " ".join(message.split())
        ValueError.__init__(self, f"{param}: {text if len(text) <= 200 else text[:199] + '…'}")
        self.param = param


class Matcher:
    """Where one answer stands in its constraint. `error` says why no answer can be had any more."""

    def __init__(self, matcher: LLMatcher, stop_ids: Collection[int], ends: Collection[int]) -> None:
        """`stop_ids` end this answer, `ends` are what the vocabulary's texts end with."""
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._ends = ends
        self._slow_seconds = 0.0

    @property
    def error(self) -> str | None:
        if self._matcher.is_error():
            return f"the constraint failed: {_explanation(self._matcher.get_error())}"
        return "the constraint takes too long: make it less ambiguous" if self._slow_seconds > MOST_SECONDS else None

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole, and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def take(self, token: int) -> None:
        """The answer's next token."""
        started = time.thread_time()
        self._matcher.consume_token(token)
        self._spend(started)

    def allowed(self, ahead: Sequence[int] = (), may_stop: bool = True) -> bytes:
        """What may come behind the tokens `ahead`, should they come: one bit an id, the lowest first.

        An answer stops where the constraint lets it end; without `may_stop`, only where nothing else can come.
        """
        started = time.thread_time()
        matcher = self._matcher
        if ahead:
            matcher = matcher.deep_copy()
            matcher.try_consume_tokens(list(ahead))
        bits = bytearray(matcher.compute_bitmask())
        for id in self._ends:
            bits[id >> 3] &= ~(1 << (id & 7))
        if matcher.is_accepting() and (may_stop or bits.count(0) == len(bits)):
            for id in self._stop_ids:
                bits[id >> 3] |= 1 << (id & 7)
        self._spend(started)
        return bytes(bits)

    def _spend(self, started: float) -> None:
        seconds = time.thread_time() - started
        if seconds > SLOW:
            self._slow_seconds += seconds


def in_deep_stack(function: Callable[..., _T], *args: Any) -> _T:
    """What a function returns that may recurse deeply outside of Python.

    llguidance descends a grammar rule by rule, a schema reference by reference: some thousand ended the process where a
    thread has the usual 8 MB.
    """
    with ThreadPoolExecutor(1) as pool:
        with _stack_lock:
            before = threading.stack_size(STACK_BYTES)
            try:
                future = pool.submit(function, *args)
            finally:
                threading.stack_size(before)
        return future.result()


class Constraints:
    """The constraints of one vocabulary. Several threads may use them.

    vocab_size: of the model, which may have more ids than the tokenizer; those are never allowed. stop_ids: what
    ends a text, which is allowed where the constraint lets it end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> None:
        self._words = _Words(tokenizer, vocab_size, stop_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled = lru_cache(NUM_KEPT)(partial(in_deep_stack, self._compile))

    def prepare(self) -> None:
        """Makes llguidance's vocabulary, which holds all threads for up to a second: else the first constraint does."""
        self._built()

    def validate(self, params: SamplingParams) -> None:
        """Raises ConstraintError for a constraint that cannot be kept."""
        if params.shape is not None:
            self._compiled(*params.shape)

    def matcher(self, params: SamplingParams, stop_ids: Collection[int]) -> Matcher | None:
        """The constraint of one more answer, which `stop_ids` end; None where there is none."""
        if params.shape is None:
            return None
        return Matcher(self._compiled(*params.shape).deep_copy(), stop_ids, self._words.ends)

    def _compile(self, kind: str, text: str) -> LLMatcher:
        """The constraint at the start of an answer. What this returns is only copied."""
        grammar = _grammar(kind, text)
        tokenizer = self._built()
        matcher = self._matcher(kind, tokenizer, grammar)
        if self._words.drops_space:  # where the answer's first token begins with a space, its text does not
            starts = Matcher(matcher, (), self._words.ends).allowed()
            spaces = self._words.spaces
            is_spaced = any(starts[id >> 3] >> (id & 7) & 1 for id in spaces)
            matcher = self._matcher(kind, tokenizer, _behind('" "' if is_spaced else '" "?', grammar))
        return matcher

    def _matcher(self, kind: str, tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out what leads nowhere, and is there for every copy
        if matcher.is_error():
            raise ConstraintError(kind, _explanation(matcher.get_error()))
        return matcher

    def _built(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._words.read()
                self._tokenizer = LLTokenizer(self._words, eos_token=self._words.ends)
        return self._tokenizer


class _Words:
    """A vocabulary as llguidance wants it: by id the bytes of each token, or a name that no text can spell."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.bos_token_id = None
        self.ends = sorted(stop_ids) or [vocab_size]  # an id that no row of logits has
        self.eos_token_id = self.ends[0]
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        self.drops_space = False  # that of an answer's first token is not shown, as sentencepiece has it

    def read(self) -> None:
        names = {id: name for name, id in self._tokenizer.special_tokens.items()}
        num_words = self._tokenizer.n_words
        for id in range(max(self._vocab_size, num_words, self.ends[-1] + 1)):
            word = self._tokenizer.token_bytes(id) if id < num_words and id not in names else b""
            if word in (b"", UNKNOWN):
                word = names.get(id, f"<|unused_{id}|>").encode()
                self.special_token_ids.append(id)
            self.tokens.append(word)
        spaces = [id for id, word in enumerate(self.tokens) if word == b" "]
        spaced = next((id for id, word in enumerate(self.tokens) if word.startswith(b" ") and len(word) > 1), None)
        self.drops_space = any(not self._shown(id).startswith(" ") for id in (*spaces, spaced) if id is not None)
        self.spaces = [id for id in spaces if not (self.drops_space and self._shown(id))]
        for id in set(spaces).difference(self.spaces):  # a space in bytes, which is shown: it is never said
            self.special_token_ids.append(id)
            self.tokens[id] = f"<|unused_{id}|>".encode()
        self._ids = {word: id for id, word in reversed(list(enumerate(self.tokens)))}
        self._longest = max(map(len, self._ids))

    def _shown(self, id: int) -> str:
        """What the text of an answer begins with that begins with this token."""
        decoder = StreamDecoder(self._tokenizer)
        return decoder.push(id) + decoder.flush()

    def __call__(self, text: str) -> list[int]:
        """The ids of a text in the midst of another, which spell it to the byte."""
        for before in "\n", "x", ".":
            start = self._tokenizer.encode(before, bos=False, eos=False)
            ids = self._tokenizer.encode(before + text, bos=False, eos=False)
            rest = ids[len(start) :]
            if ids[: len(start)] == start and b"".join(self.tokens[id] for id in rest) == text.encode():
                return rest
        return self._longest_words(text.encode())

    def _longest_words(self, text: bytes) -> list[int]:
        """The same without the vocabulary's own rules, where those join the text with whatever stands before it."""
        ids, at = [], 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._ids), None)
            if size is None:
                raise ValueError(f"the vocabulary cannot spell {text[at : at + 1]!r}")
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


# ---- from what was given to llguidance's grammars


def _grammar(kind: str, text: str) -> str:
    if len(text) > LONGEST_CONSTRAINT:
        raise ConstraintError(kind, f"it has {len(text)} characters, at most {LONGEST_CONSTRAINT} are taken")
    try:
        return _READERS[kind](text)
    except ConstraintError:
        raise
    except Exception as error:  # a converter's own errors are of any kind
        raise ConstraintError(kind, str(error)) from error


def _from_schema(text: str) -> str:
    schema = json.loads(text)
    options = schema.get("x-guidance")  # llguidance's own
    is_lenient = isinstance(options, dict) and options.get("lenient") is True
    for depth, part in _objects(schema):
        if depth > DEEPEST_SCHEMA:
            raise ConstraintError("json_schema", f"it is nested more than {DEEPEST_SCHEMA} deep")
        if part.get("uniqueItems") is False:  # says nothing
            del part["uniqueItems"]
        least, required = part.get("minProperties"), part.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        is_loose = part.get("additionalProperties") is not False and not is_lenient
        if is_loose and isinstance(least, int) and least > max(1, num_required):
            message = f"minProperties {least} is not supported beside additionalProperties: a name may come twice"
            raise ConstraintError("json_schema", message)
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})


def _objects(value: Any, depth: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every object in a tree of JSON, with its depth; not far beyond the limit."""
    if depth > DEEPEST_SCHEMA + 1:
        return
    if isinstance(value, dict):
        yield depth, value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item, depth + 1)


def _from_grammar(text: str) -> str:
    return LLMatcher.grammar_from_lark(any_to_lark(text))


_READERS: dict[str, Callable[[str], str]] = {
    "json_schema": _from_schema,
    "regex": LLMatcher.grammar_from_regex,
    "grammar": _from_grammar,
}
assert tuple(_READERS) == SHAPES


def _behind(start: str, grammar: str) -> str:
    """A grammar, with something of Lark's in front."""
    is_lark = not grammar.lstrip().startswith("{")
    parts = [{"lark_grammar": grammar}] if is_lark else json.loads(grammar)["grammars"]
    parts[0] |= {"name": "answer"}
    return json.dumps({"grammars": [{"lark_grammar": f"start: {start} @answer"}, *parts]})


def _explanation(error: str) -> str:
    """What llguidance says, without what it knows of the vocabulary, and quotes and shows of the grammar."""
    if found := re.search(r"Unimplemented keys: (\[.*\])", error):
        return f"{', '.join(json.loads(found[1]))} is not supported"
    if found := re.search(r"the vocabulary cannot spell b'[^']*'", error):
        return found[0]
    error = re.sub(r"; following special tokens are available: .*|<non-verbose/>", "", error)
    error = " ".join(line for line in error.splitlines() if line.strip() and not line.startswith(" "))
    return "no text can satisfy it" if error in ("", "NoExtensionBias", "InternalError") else error
