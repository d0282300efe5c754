"""Data: how files become documents, what is in the loss mask, and what is refused."""

import json

import numpy as np
import pytest

from euryale.frontend.tokenizer import load_tokenizer
from euryale.training import corpus
from euryale.training.corpus import is_held_out
from euryale.training.data import Piece, chat_pieces, read_pieces, tokenize

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
    assert asked.tokens.tolist() == [*tokenizer.encode("def f(x):\n"), END]
    assert tokenizer.decode(asked.tokens[asked.learned][:-1]) == "x):\n"
    assert asked.learned.tolist() == [i >= count for i in range(len(asked.tokens))]
    assert asked.prompt.tolist() == alone.prompt.tolist() == tokenizer.encode("def f(")
    assert not alone.learned.any()


def test_generated_answers_are_taken_token_by_token(tmp_path, tokenizer):
    """No end token is added: a truncated answer must not be learned as a complete one."""
    (document,) = documents(
        tmp_path, tokenizer, {"prompt_tokens": [5, 6], "tokens": [7, 8, 9], "text": "x"}, {"error": "too long"}
    )
    assert document.tokens.tolist() == [5, 6, 7, 8, 9]
    assert document.learned.tolist() == [False, False, True, True, True]


def test_chats_learn_every_answer(tmp_path, tokenizer):
    """A chat is tokenized as a whole, as the front end does it."""
    chat = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in chat]
    answered, asking = documents(tmp_path, tokenizer, {"messages": messages}, {"messages": messages[:3]})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert answered.tokens.tolist() == tokenizer.encode(rendered)
    assert tokenizer.decode(answered.tokens[answered.learned]) == "first\nsecond\n"
    assert tokenizer.decode(answered.prompt) == rendered.removesuffix("second\n")
    assert tokenizer.decode(asking.tokens[asking.learned]) == "first\n"
    assert asking.prompt.tolist() == asking.tokens.tolist()  # the chat ends with a question


class Forgetful:
    """A template that drops the reasoning of every answer but the last, as those of reasoning models do."""

    chat_template = "x"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        last = len(messages) - 1
        texts = [m["content"] if i == last else m["content"].split("!")[-1] for i, m in enumerate(messages)]
        return "".join(f"<{t}>" for t in texts) + ("<" if add_generation_prompt else "")


def test_a_template_that_forgets_makes_a_document_of_every_answer():
    contents = ["a", "hm!b", "c", "well!d"]
    messages = [{"role": "assistant" if i % 2 else "user", "content": c} for i, c in enumerate(contents)]
    first, second = chat_pieces("key", messages, Forgetful())
    assert [(p.text, p.text[slice(*p.learned[0])]) for p in (first, second)] == [
        ("<a><hm!b>", "hm!b>"),
        ("<a><b><c><well!d>", "well!d>"),
    ]
    assert first.key == second.key
    assert [p.text for p in chat_pieces("key", messages[:3], Forgetful())] == ["<a><hm!b>", "<a><b><c><"]


def test_a_template_that_changes_the_question_is_refused():
    class Rewriting:
        chat_template = "x"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"{len(messages)} messages"

    with pytest.raises(ValueError, match="changes a question after its answer"):
        chat_pieces("", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], Rewriting())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[1]", "a row must be an object, one per line"),
        ('{"question": "x"}', "a row needs text, prompt"),
        ('{"text": 3}', "text must be a string, not int"),
        ('{"prompt_tokens": [1.5]}', "prompt_tokens must be a list of token ids"),
        ('{"prompt_tokens": [1], "tokens": [384]}', "vocabulary has 384: use data of this model's tokenizer"),
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
    assert piece == Piece("note.txt", "plain text", learned=((0, 10),))
    monkeypatch.setattr(corpus, "standard_library_files", lambda: few_sources[:2])
    assert [p.key for p in read_pieces(("stdlib",), tokenizer)] == [p.name for p in few_sources[:2]]
    with pytest.raises(ValueError, match="there is no file nowhere"):
        list(read_pieces(("nowhere",), tokenizer))


def test_the_start_token_comes_once_and_the_end_token_last():
    """The tokenizer adds special tokens by itself, as Llama's does; every letter is a token."""

    class Adding:
        eos_token_id, is_fast = 99, True

        def __call__(self, texts, add_special_tokens, return_offsets_mapping, verbose):
            around = [1] * add_special_tokens, [99] * add_special_tokens
            ids = [around[0] + [ord(c) - 87 for c in t] + around[1] for t in texts]
            extra = [(0, 0)] * add_special_tokens
            return {
                "input_ids": ids,
                "offset_mapping": [extra + [(i, i + 1) for i in range(len(t))] + extra for t in texts],
            }

    pieces = [
        Piece("asked", "abc", learned=((1, 3),)),
        Piece("text", "abc", learned=((0, 3),)),
        Piece("chat", "abcd", learned=((1, 2), (3, 4)), chat=True),
        Piece("ids", tokens=(7, 8), learned=((1, 2),)),
    ]
    found = tokenize(pieces, Adding(), 100)
    assert [d.tokens.tolist() for d in found] == [[1, 10, 11, 12, 99], [1, 10, 11, 12, 99], [10, 11, 12, 13], [7, 8]]
    assert [d.learned.tolist() for d in found] == [
        [False, False, True, True, True],
        [True] * 5,
        [False, True, False, True],
        [False, True],
    ]


def test_the_split_depends_on_the_document_alone():
    keys = [f"document {i}" for i in range(4000)]
    held = {key for key in keys if is_held_out(key, 5)}
    assert 120 < len(held) < 280  # 5 % of 4000 are 200, with a standard deviation of 14
    assert held <= {key for key in keys if is_held_out(key, 10)}
    assert not any(is_held_out(key, 0) for key in keys)
    assert np.mean([is_held_out(key, 50) for key in keys]) == pytest.approx(0.5, abs=0.05)
