"""Incremental text depends on the tokens only, for every kind of vocabulary and any division into steps."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from vocabularies import KINDS, REPLACEMENT, SMILE, TEXT, reference, smile_tokens, vocabulary

from euryale.frontend.detokenizer import BYTE_LEVEL, Detokenizer, StopMatcher, TokenBytes

# Deadlines measure the machine, not the code.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKEN_BYTES = {kind: TokenBytes(vocabulary(kind)) for kind in KINDS}
cuts = st.lists(st.integers(1, 6), max_size=100)
text = st.text(alphabet="ab th,.é日本語😀ü\u0301\n\ufffd", max_size=40) | st.text(max_size=20)
every_kind = pytest.mark.parametrize("kind", KINDS)


def token_lists(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens of the vocabulary and some ids beyond it, more often those that make and break characters."""
    tokenizer = vocabulary(kind)
    lively = {*tokenizer.encode("日😀 é  t\ufffd"), *tokenizer.all_special_ids}
    if kind in ("llama-2", "gemma"):
        names = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0xFF>", "<0x41>", "<0x20>", "▁", "▁▁", "▁�", "�"]
        lively |= set(tokenizer.convert_tokens_to_ids(names))
    return st.lists(st.integers(0, len(tokenizer) + 3) | st.sampled_from(sorted(lively)), max_size=60)


def pieces_of(kind: str, tokens: list[int], sizes=(), context=()) -> list[str]:
    detokenizer = Detokenizer(TOKEN_BYTES[kind], context)
    pieces, tokens = [], iter(tokens)
    for size in itertools.chain(sizes, itertools.repeat(1)):
        push = list(itertools.islice(tokens, size))
        if not push:
            return [*pieces, detokenizer.finish()]
        pieces.append(detokenizer.push(push))
    raise AssertionError


@relaxed
@given(st.data(), text, cuts)
@every_kind
def test_any_tokens_after_any_prompt_in_any_steps(kind, data, prompt, sizes):
    context = vocabulary(kind).encode(prompt)
    if vocabulary(kind).decode(context, skip_special_tokens=True).endswith(REPLACEMENT):
        context = []  # what is whole is not seen in the text
    tokens = data.draw(token_lists(kind))
    assert "".join(pieces_of(kind, tokens, sizes, context)) == reference(vocabulary(kind), tokens, context)


@relaxed
@given(st.data())
@every_kind
def test_after_each_token_all_whole_characters_are_out(kind, data):
    tokens = data.draw(token_lists(kind))
    detokenizer, shown = Detokenizer(TOKEN_BYTES[kind]), ""
    for count, token in enumerate(tokens, 1):
        shown += detokenizer.push([token])
        expected = reference(vocabulary(kind), tokens[:count])
        # What is held is no character yet: one U+FFFD if it stays so, two for the first bytes of a surrogate.
        assert expected in (shown, shown + REPLACEMENT, shown + 2 * REPLACEMENT)


@relaxed
@given(text, cuts)
@every_kind
def test_text_comes_back_without_half_characters(kind, text, sizes):
    tokens = vocabulary(kind).encode(text, add_special_tokens=False)
    pieces = pieces_of(kind, tokens, sizes)
    assert "".join(pieces) == vocabulary(kind).decode(tokens, skip_special_tokens=True)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["llama-2", "gemma"])
@pytest.mark.parametrize("sizes", [[1] * 120, [5, 4] * 14, [3] * 40, [120], [2, 4, 4, 4, 4] * 7])
def test_characters_of_several_byte_tokens(kind, sizes):
    tokens = smile_tokens() * 30
    text = "".join(pieces_of(kind, tokens, sizes))
    assert text == 30 * SMILE == vocabulary(kind).decode(tokens, skip_special_tokens=True)
    for cut in (8, 9, 10, 11):  # within the third character, as max_tokens may cut it
        assert "".join(pieces_of(kind, tokens[:cut], sizes)) == 2 * SMILE + REPLACEMENT * (cut > 8)


@relaxed
@given(st.binary(max_size=40) | st.lists(st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0x41, 0xE2]), max_size=40), cuts)
@pytest.mark.parametrize("kind", ["byte-level", "llama-2", "gemma"])
def test_invalid_bytes_are_replaced_as_python_does(kind, values, sizes):
    byte_level = {byte: character for character, byte in BYTE_LEVEL.items()}
    names = [byte_level[byte] if kind == "byte-level" else f"<0x{byte:02X}>" for byte in values]
    text = "".join(pieces_of(kind, vocabulary(kind).convert_tokens_to_ids(names), sizes))
    expected = bytes(values).decode("utf-8", "replace")
    assert text == (expected.removeprefix(" ") if kind == "llama-2" else expected)
    if kind == "byte-level":
        assert text == vocabulary(kind).decode(vocabulary(kind).convert_tokens_to_ids(names))


def test_the_alphabet_of_byte_level_vocabularies():
    assert sorted(BYTE_LEVEL) == sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    for character in map(chr, (*range(0x800), *range(0x1000, 0x10000, 0x1000), 0x1F600)):
        if not "\ud800" <= character <= "\udfff":
            [(letters, _)] = split(character)
            assert bytes(BYTE_LEVEL[letter] for letter in letters) == character.encode()


@pytest.mark.parametrize(("kind", "alone"), [("llama-2", "th"), ("metaspace", "th"), ("gemma", " th")])
def test_only_a_text_s_first_word_loses_its_blank(kind, alone):
    tokenizer = vocabulary(kind)
    word, blank, start, end = tokenizer.convert_tokens_to_ids(["▁th", "▁", "<s>", "</s>"])
    assert "".join(pieces_of(kind, [end, word, end, word])) == f"{alone} th"
    for context in ([start], [start, end]):
        assert "".join(pieces_of(kind, [word], context=context)) == alone
    for context in ([word], [start, word, end], [blank], [blank, end], tokenizer.convert_tokens_to_ids(["é"])):
        assert "".join(pieces_of(kind, [word], context=context)) == " th"


def test_an_answer_does_not_complete_the_prompt_s_last_character():
    first, *rest = smile_tokens()
    assert "".join(pieces_of("llama-2", [*rest, *smile_tokens()], context=[first])) == 3 * REPLACEMENT + SMILE


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = self.longest = 0

    def __len__(self) -> int:
        return len(self.tokenizer)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        self.longest = max(self.longest, len(token_ids))
        self.num_tokens += len(token_ids)
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return self.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("kind", ["byte-level", "llama-2", "gemma"])
@pytest.mark.parametrize("what", ["text", "half a character", "invalid", "special"])
def test_a_token_is_decoded_once_however_long_the_answer(kind, what):
    tokenizer = Counting(vocabulary(kind))
    first_bytes = {"half a character": 0xF0, "invalid": 0xFF}
    byte_level = {byte: character for character, byte in BYTE_LEVEL.items()}
    if what in first_bytes:
        byte = first_bytes[what]
        name = byte_level[byte] if kind == "byte-level" else f"<0x{byte:02X}>"
        tokens = [vocabulary(kind).convert_tokens_to_ids(name)]
    else:
        tokens = vocabulary(kind).encode(TEXT) if what == "text" else [vocabulary(kind).eos_token_id]
    token_bytes = TokenBytes(tokenizer)
    tokenizer.num_tokens = tokenizer.longest = 0
    detokenizer = Detokenizer(token_bytes)
    shown = "".join(detokenizer.push(tokens) for _ in range(1000))
    assert tokenizer.longest <= 2  # the token and the one that stands before it
    assert (
        tokenizer.num_tokens <= 2 * len(set(tokens)) + 3
    )  # and the beginning once more: a blank and the token after it
    if what in first_bytes:  # each such byte shows that the one before it does not begin a character
        assert shown == REPLACEMENT * (999 if what == "half a character" else 1000)


# ---- stop strings

stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


def expected_stop(text, stops):
    """By definition: the first stop string to be completed; of those the one that begins first."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@relaxed
@given(st.text(alphabet="abc", max_size=30), stops, st.lists(st.integers(1, 5), max_size=30))
def test_stop_strings_by_definition_however_cut(text, stops, sizes):
    matcher, shown, found = StopMatcher(stops), "", None
    rest = text
    for size in itertools.chain(sizes, itertools.repeat(3)):
        piece, found = matcher.push(rest[:size])
        shown, rest = shown + piece, rest[size:]
        if found is not None or not rest:
            break
    if found is None:
        shown += matcher.finish()
    assert (shown, found) == expected_stop(text, stops)


def test_only_what_may_belong_to_a_stop_string_is_held_back():
    matcher = StopMatcher(["END.", "\n\n"])
    assert matcher.push("the E") == ("the ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("T\n") == ("ENT", None)
    assert matcher.push("a") == ("\na", None)
    assert matcher.push("EN") == ("", None)
    assert matcher.push("D. more") == ("", "END.")
