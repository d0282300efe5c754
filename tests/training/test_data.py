"""From files to documents: what is read, what is learned from, what is refused."""

import json

import numpy as np
import pytest

from euryale.runtime.tokenizer import load_tokenizer
from euryale.training import corpus
from euryale.training.corpus import is_held_out
from euryale.training.data import Piece, chat_segments, read_pieces, tokenize

END = 0


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(model_dir)


def documents(tmp_path, tokenizer, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenize(list(read_pieces((str(path),), tokenizer)), tokenizer, len(tokenizer))


def test_text_is_learned_to_its_end(tmp_path, tokenizer):
    (document,) = documents(tmp_path, tokenizer, {"text": "import os\n"})
    assert document.tokens.tolist() == [*tokenizer.encode("import os\n"), END]
    assert document.learned.all()


def test_only_completions_are_learned(tmp_path, tokenizer):
    asked, alone = documents(tmp_path, tokenizer, {"prompt": "def f(", "completion": "x):\n"}, {"prompt": "def f("})
    count = len(tokenizer.encode("def f("))
    assert asked.tokens.tolist() == [*tokenizer.encode("def f("), *tokenizer.encode("x):\n"), END]
    assert asked.learned.tolist() == [i >= count for i in range(len(asked.tokens))]
    assert asked.prompt.tolist() == alone.prompt.tolist() == tokenizer.encode("def f(")
    assert not alone.learned.any()


def test_generated_answers_are_taken_token_by_token(tmp_path, tokenizer):
    """No end is added: an answer that was cut off must not be learned as one that ended."""
    (document,) = documents(
        tmp_path, tokenizer, {"prompt_tokens": [5, 6], "tokens": [7, 8, 9], "text": "x"}, {"error": "too long"}
    )
    assert document.tokens.tolist() == [5, 6, 7, 8, 9]
    assert document.learned.tolist() == [False, False, True, True, True]


def test_chats_learn_every_answer(tmp_path, tokenizer):
    chat = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in chat]
    (document,) = documents(tmp_path, tokenizer, {"messages": messages})
    assert tokenizer.decode(document.tokens) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(document.tokens[document.learned]) == "first\nsecond\n"
    question, answer, rest = chat_segments(messages[:3], tokenizer)
    assert (question[1], answer, rest) == (False, ("first\n", True), ("# two\n", False))


def test_a_template_that_rewrites_history_is_refused(tokenizer):
    class Rewriting:
        chat_template = "x"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"{len(messages)} messages"

    with pytest.raises(ValueError, match="rewrites earlier messages"):
        chat_segments([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], Rewriting())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[1]", "a row must be an object"),
        ('{"question": "x"}', "a row needs text, prompt"),
        ('{"text": 3}', "text must be a string, not int"),
        ('{"prompt_tokens": [1.5]}', "prompt_tokens must be a list of token ids"),
        ('{"prompt_tokens": [1], "tokens": [384]}', "vocabulary has 384: they were written with another"),
        ('{"messages": [{"content": "x"}]}', "messages must be a list"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        tokenize(list(read_pieces((str(path),), tokenizer)), tokenizer, len(tokenizer))


def test_other_sources(tmp_path, tokenizer, monkeypatch, few_sources):
    (tmp_path / "note.txt").write_text("plain text")
    (piece,) = read_pieces((str(tmp_path / "note.txt"),), tokenizer)
    assert piece == Piece("note.txt", (("plain text", True),))
    monkeypatch.setattr(corpus, "standard_library_files", lambda: few_sources[:2])
    assert [p.key for p in read_pieces(("stdlib",), tokenizer)] == [p.name for p in few_sources[:2]]
    with pytest.raises(ValueError, match="there is no file nowhere"):
        list(read_pieces(("nowhere",), tokenizer))


def test_the_start_token_comes_once_and_the_end_token_last(tokenizer):
    """A tokenizer that adds special tokens by itself, as Llama's does."""

    class Adding:
        eos_token_id = 99

        def __call__(self, texts, add_special_tokens, verbose):
            return {"input_ids": [[1] * add_special_tokens + [len(t)] + [99] * add_special_tokens for t in texts]}

    pieces = [
        Piece("a", (("xx", False), ("yyy", True))),
        Piece("chat", (("xxxx", False), ("yy", True)), ends=False),
        Piece("ids", (([7], False), ([8], True)), ends=False),
    ]
    found = [d.tokens.tolist() for d in tokenize(pieces, Adding(), 100)]
    assert found == [[1, 2, 3, 99], [4, 2], [7, 8]]


def test_the_split_depends_on_the_document_alone():
    keys = [f"document {i}" for i in range(4000)]
    held = {key for key in keys if is_held_out(key, 5)}
    assert held == {key for key in reversed(keys) if is_held_out(key, 5)}
    assert 120 < len(held) < 280  # 5 % of 4000 are 200, with a standard deviation of 14
    assert held <= {key for key in keys if is_held_out(key, 10)}
    assert not any(is_held_out(key, 0) for key in keys)
    assert np.mean([is_held_out(key, 50) for key in keys]) == pytest.approx(0.5, abs=0.05)
