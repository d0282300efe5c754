"""Small tokenizers of every kind that the supported models have, and the text that each must give.

``reference`` is the definition that incremental text is tested against; it knows nothing of increments.
"""

from collections.abc import Sequence
from functools import cache

from bare import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
SMILE = "\U0001f600"
TEXT = "hello world, the quick brown fox 日本語 😀😀 éé"
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("byte-level", "llama-2", "gemma", "metaspace", "words", "demo")


@cache
def vocabulary(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of this kind; see KINDS."""
    if kind == "demo":
        return PreTrainedTokenizerFast.from_pretrained(ROOT / "demo" / "model")
    makers = {"byte-level": _byte_level, "metaspace": _metaspace, "words": _words}
    tokenizer = makers[kind]() if kind in makers else _byte_fallback(kind)
    tokenizer.add_tokens(["<call me>", AddedToken("é!", normalized=False)])
    tokenizer.add_special_tokens(["<|turn|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def _byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: tokens are strings of bytes that need not begin or end with a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _byte_fallback(kind: str) -> Tokenizer:
    """As Llama 2 and Mistral, which strip the text's first blank, and as Gemma, which does not. Characters outside the
    vocabulary are single bytes; the library decodes a run of them as a whole or not at all."""
    pieces = [*SPECIAL, *BYTES, *"▁abcdefghijklmnopqrstuvwxyz,.é", "▁t", "▁th", "▁▁", "▁▁▁▁", "\n", "�", "▁�"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁", "▁"), ("▁▁", "▁▁"), ("▁", "�")]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _metaspace() -> Tokenizer:
    """As the newer conversions of SentencePiece models: the first token loses all its leading blanks."""
    pieces = [*SPECIAL, *"▁abcdefghijklmnopqrstuvwxyz,.é", "▁th", "▁▁▁▁", "日", "�", "▁�"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def _words() -> Tokenizer:
    """Whole words without a decoder, which are joined by blanks."""
    words = [*SPECIAL, *TEXT.split(), "<0x41>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def smile_tokens() -> list[int]:
    """The four byte tokens of SMILE in the vocabularies with byte fallback."""
    return vocabulary("llama-2").convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in SMILE.encode()])


def reference(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], context: Sequence[int] = ()) -> str:
    """The text of ``tokens`` after ``context``, which must end with a whole character.

    It is what the tokenizer decodes, after every run of byte tokens has been made valid UTF-8 as
    ``bytes.decode("utf-8", "replace")`` does it: with an invalid byte in it, the library loses the whole run.
    """
    before, tokens = _mend(tokenizer, context), _mend(tokenizer, tokens)
    text = tokenizer.decode(before, skip_special_tokens=True)
    assert not text.endswith(REPLACEMENT)
    return tokenizer.decode(before + tokens, skip_special_tokens=True).removeprefix(text)


def _mend(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> list[int]:
    mended: list[int] = []
    run = b""
    numbers = {tokenizer.convert_tokens_to_ids(name): byte for byte, name in enumerate(BYTES)}
    has_fallback = len(numbers) == 256
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    shown = [token for token in tokens if token not in special and tokenizer.convert_ids_to_tokens(token) is not None]
    for token in [*shown, None]:
        if has_fallback and token in numbers:
            run += bytes([numbers[token]])
            continue
        valid = run.decode("utf-8", "replace").encode()
        mended += [tokenizer.convert_tokens_to_ids(BYTES[byte]) for byte in valid]
        mended += [token] if token is not None else []
        run = b""
    return mended
