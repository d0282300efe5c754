"""Incremental text is the whole text, for two kinds of tokenizer, however the tokens are cut into pushes."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from euryale.frontend.detokenizer import GARBAGE_TOKENS, REPLACEMENT, WINDOW_TOKENS, Detokenizer, StopMatcher

# Deadlines measure the machine, not the code.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXT = "hello world, the quick brown fox 日本語 😀😀 éé"


def byte_level_tokenizer():
    """As GPT-2, Llama 3 and Qwen: tokens are strings of bytes that need not end with a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback_tokenizer():
    """As Llama 2 and Mistral: a word begins with its space, the text's first one without, and rare characters are
    single bytes, of which a run decodes as a whole or not at all."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz,.é",
        "▁t",
        "▁th",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", "t"), ("▁t", "h")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BYTE_LEVEL, BYTE_FALLBACK = byte_level_tokenizer(), byte_fallback_tokenizer()
cuts = st.lists(st.integers(1, 6), max_size=200)
text = st.text(alphabet="ab th,.é日本語😀ü\u0301\n", max_size=80) | st.text(max_size=40)


def pieces_of(tokenizer, tokens, sizes=(), context=()):
    detokenizer = Detokenizer(tokenizer, context)
    pieces, tokens = [], iter(tokens)
    for size in itertools.chain(sizes, itertools.repeat(1)):
        push = list(itertools.islice(tokens, size))
        if not push:
            return [*pieces, detokenizer.finish()]
        pieces.append(detokenizer.push(push))
    raise AssertionError


@relaxed
@given(text, cuts)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_text(tokenizer, text, sizes):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, tokens, sizes)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@relaxed
@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=150), cuts)
def test_arbitrary_byte_level_tokens(tokens, sizes):
    pieces = pieces_of(BYTE_LEVEL, tokens, sizes)
    assert "".join(pieces) == BYTE_LEVEL.decode(tokens, skip_special_tokens=True)


@settings(relaxed, max_examples=40)
@given(st.lists(st.sampled_from([*BYTE_LEVEL.encode("😀日"), 1]), min_size=50, max_size=200), cuts)
def test_broken_characters_for_a_long_time(tokens, sizes):
    pieces = pieces_of(BYTE_LEVEL, tokens, sizes)
    assert "".join(pieces) == BYTE_LEVEL.decode(tokens, skip_special_tokens=True)


@relaxed
@given(st.lists(st.integers(0, len(BYTE_FALLBACK) - 1), max_size=100), cuts)
def test_arbitrary_byte_fallback_tokens_do_no_harm(tokens, sizes):
    # A broken byte spoils its whole run, also what was rightly shown before, so equality cannot be asked for.
    assert isinstance("".join(pieces_of(BYTE_FALLBACK, tokens, sizes)), str)


@relaxed
@given(text.filter(lambda text: REPLACEMENT not in text), st.data())
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_with_the_prompt_as_context(tokenizer, text, data):
    tokens = tokenizer.encode("the text is" + text, add_special_tokens=False)
    split = data.draw(st.integers(1, len(tokens)))
    before = tokenizer.decode(tokens[:split], skip_special_tokens=True)
    if before.endswith(REPLACEMENT):
        return  # the prompt ends within a character
    pieces = pieces_of(tokenizer, tokens[split:], context=tokens[:split])
    assert before + "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_context_of_whole_characters_counts_wherever_its_last_tokens_begin():
    tokens = BYTE_FALLBACK.encode("the text is00\x80\x80𐀀𐀀0 ", add_special_tokens=False)  # all but the last are bytes
    pieces = pieces_of(BYTE_FALLBACK, tokens[-1:], context=tokens[:-1])
    assert "".join(pieces) == " "


def test_the_context_keeps_the_first_space():
    prompt, answer = (BYTE_FALLBACK.encode(text, add_special_tokens=False) for text in ("a", "th"))
    assert "".join(pieces_of(BYTE_FALLBACK, answer)) == "th"
    assert "".join(pieces_of(BYTE_FALLBACK, answer, context=prompt)) == " th"


def test_special_tokens_have_no_text_and_do_not_become_the_context():
    word, end = BYTE_FALLBACK.encode("th", add_special_tokens=False), BYTE_FALLBACK.eos_token_id
    tokens = word * 10 + [end] * 40 + word
    assert "".join(pieces_of(BYTE_FALLBACK, tokens)) == BYTE_FALLBACK.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces_of(BYTE_FALLBACK, [end] * 40)) == ""


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.longest = self.total = 0

    def decode(self, tokens, skip_special_tokens):
        self.longest = max(self.longest, len(tokens))
        self.total += len(tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)


WHOLE_CHARACTERS = WINDOW_TOKENS + 8  # the window, and the tokens of the character that makes it too long and the next


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "longest"),
    [
        (BYTE_LEVEL, BYTE_LEVEL.encode(TEXT) * 30, WHOLE_CHARACTERS),
        (BYTE_FALLBACK, BYTE_FALLBACK.encode("日本語") * 100, WHOLE_CHARACTERS),
        (BYTE_LEVEL, BYTE_LEVEL.encode("日")[:1] * 1000, WHOLE_CHARACTERS + GARBAGE_TOKENS),
        (BYTE_LEVEL, [1] * 1000, WHOLE_CHARACTERS),
    ],
)
def test_a_token_costs_the_same_late_as_early(tokenizer, tokens, longest):
    tokenizer = Counting(tokenizer)
    pieces_of(tokenizer, tokens)
    assert tokenizer.longest <= longest
    assert tokenizer.total <= 2 * longest * len(tokens)  # two decodes a push at most, but for garbage now and then


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
