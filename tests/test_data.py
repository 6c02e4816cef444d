"""Data: formats, who votes, what is scored, and what is cut or dropped."""

import json

import datasets
import pytest
from conftest import make_tokenizer, question_rows, save_rows
from test_tune import settings

import tune


def load(path, rows=None, tokenizer=None, split="train", **options):
    name = save_rows(path, rows) if rows is not None else str(path)
    return tune.load_examples(
        settings(dataset=name, split=split, **options), "--split", tokenizer or make_tokenizer()
    )


def parts(example: dict) -> tuple[str, str]:
    """What votes, and what is scored, as text."""
    ids, prompt = example["ids"], example["prompt"]
    return make_tokenizer().decode(ids[:prompt]), make_tokenizer().decode(ids[prompt:])


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def test_prompt_and_answer(tmp_path):
    (example,), told = load(tmp_path / "a.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    assert parts(example) == ("<s>1+1=", "2</s>") and example["task"] == "all"
    assert told.startswith("1 examples (1 read, 0 cut at 2,048 tokens, 0 dropped: no prompt or answer left")


def test_prompt_and_completion_as_texts_and_as_messages(tmp_path):
    (example,), _ = load(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    assert parts(example) == ("<s>1+1=", "2</s>")
    asked = chat(("user", "hi"), ("assistant", "yes?"), ("user", "1+1"))
    (example,), _ = load(tmp_path / "b.jsonl", [{"prompt": asked, "completion": chat(("assistant", "2"))}])
    whole = make_tokenizer().apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert parts(example) == (whole, "2<|im_end|>\n")  # the assistant's turn in the prompt is not scored


def test_alpaca_with_and_without_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "ignored"},
        {"instruction": "Greet.", "input": "", "output": "Hello", "text": "ignored"},
    ]
    (first, second), _ = load(tmp_path / "a.jsonl", rows)
    assert parts(first) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n"
        "1 and 2\n\n### Response:\n",
        "3</s>",
    )
    assert parts(second) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nGreet.\n\n### Response:\n",
        "Hello</s>",
    )


def test_every_turn_of_the_assistant_is_scored_and_all_that_precedes_it_votes(tmp_path):
    messages = chat(
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", " hello "),
        ("user", "2?"),
        ("assistant", "two"),
    )
    (first, second), told = load(tmp_path / "a.jsonl", [{"messages": messages}])
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert parts(first) == (begin, "hello<|im_end|>\n")  # the template's text, no BOS of ours in front
    more = "hello<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    assert parts(second) == (begin + more, "two<|im_end|>\n")
    assert "".join(parts(second)) == make_tokenizer().apply_chat_template(messages, tokenize=False)
    assert told.startswith("2 examples")


# Templates in the manner of well-known models, shortened.
LOOP = "{% for message in messages %}"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "Phi-3": LOOP + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
    "Llama-3, the first": "{{ bos_token }}" + LOOP + "<|im_start|>{{ message.role }}\n{{ message.content | trim }}"
                          "<|im_end|>{% endfor %}<|im_start|>{{ 'assistant\n' }}",  # asks for an answer, whatever came last
    "Llama-2": LOOP + "{% if message.role == 'user' %}{{ bos_token }}[INST] {{ message.content }} [/INST]"
               "{% else %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "Qwen3": LOOP + "<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' and loop.last %}(thought) "
             "{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}" + GENERATION,
}  # fmt: skip


@pytest.mark.parametrize("model", list(TEMPLATES))
@pytest.mark.parametrize("said", [("b", "d"), ("yes", "yes"), ("a", "assistant"), ("", "d")])
def test_turns_are_found_in_the_templates_of_well_known_models(tmp_path, model, said):
    tokenizer = make_tokenizer(TEMPLATES[model])
    turns = ("user", "a or b?"), ("assistant", said[0]), ("user", "and yes"), ("assistant", said[1])
    found, _ = load(tmp_path / "a.jsonl", [{"messages": chat(*turns)}], tokenizer)
    begin, end = {
        "Phi-3": ("", "<|im_end|>\n</s>"),
        "Llama-3, the first": ("", "<|im_end|><|im_start|>assistant\n"),
        "Llama-2": (" ", " </s>"),
        "Qwen3": ("(thought) ", "<|im_end|>\n"),
    }[model]
    assert len(found) == 2
    for example, count in zip(found, (2, 4)):
        prompt, scored = parts(example)
        assert scored == begin + turns[count - 1][1] + end
        # What a model is given when it is asked for this turn, and what it is to have said then.
        given = tokenizer.apply_chat_template(
            chat(*turns[: count - 1]), tokenize=False, add_generation_prompt=True
        )
        assert prompt == given
        assert prompt + scored == tokenizer.apply_chat_template(chat(*turns[:count]), tokenize=False)


def test_conversations_that_the_template_refuses_are_dropped_and_counted(tmp_path):
    odd = "loop.index0 % 2 and message.role == 'user'"
    strict = LOOP + "{% if " + odd + " %}{{ raise_exception('roles must alternate') }}{% endif %}"
    rows = [
        {"messages": chat(("user", "A"), ("user", "B"), ("assistant", "C"))},
        {"messages": chat(("user", "A"), ("assistant", "KEPT"))},
    ]
    (example,), told = load(
        tmp_path / "a.jsonl", rows, make_tokenizer(strict + "{{ message.content }};{% endfor %}")
    )
    assert parts(example) == ("A;", "KEPT;")
    assert "2 read, 0 cut at 2,048 tokens, 1 dropped: no prompt or answer left, or refused by the" in told


def test_a_template_that_writes_the_prompt_otherwise_once_it_is_answered_is_dropped_and_counted(tmp_path):
    """As one that asks for an answer where none stands later: no prefix, so that nothing tells where a turn begins."""
    changing = make_tokenizer(
        LOOP + "{{ message.content }};{% endfor %}{% if add_generation_prompt %}(answer){% endif %}"
    )
    kept = chat(("user", "a"), ("assistant", "(answer)b"))  # what a model would say that it is asked
    rows = [{"messages": chat(("user", "a"), ("assistant", "longer than that"))}, {"messages": kept}]
    (example,), told = load(tmp_path / "a.jsonl", rows, changing)
    assert parts(example) == ("a;(answer)", "b;") and "1 dropped" in told


def test_texts_are_tokenized_as_a_whole():
    """Llama-2's way: a space is put before a text; before an answer it would be a token that no model predicts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i for i, word in enumerate(["</s>", "\u2581one", "\u2581two", "two", "<unk>", "\u2581one="])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("=", "merged_with_previous")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    ((ids, prompt),) = tune.tokenize(fast, {"prompt": "one=", "answer": "two"}, 64)
    assert fast.convert_ids_to_tokens(ids) == ["\u2581one=", "two", "</s>"] and prompt == 1


def test_a_token_that_reaches_into_the_answer_belongs_to_it(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["</s>", "<unk>", *"a=bc", "=b", "bc"])}
    tokenizer = Tokenizer(models.BPE(words, [("=", "b")], unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    ((ids, prompt),) = tune.tokenize(fast, {"prompt": "a=", "answer": "bc"}, 64)
    assert fast.convert_ids_to_tokens(ids) == ["a", "=b", "c", "</s>"] and prompt == 1


def test_of_plain_text_the_first_half_votes_and_the_second_is_scored(tmp_path):
    (example,), _ = load(tmp_path / "a.jsonl", [{"text": "abcdef"}])
    assert parts(example) == ("<s>abc", "def")
    (example,), told = load(tmp_path / "a.jsonl", [{"text": "abcdef"}], max_length=4)
    assert parts(example) == ("<s>a", "bc") and "1 cut at 4 tokens" in told  # half of what is left


def test_cut_and_dropped_examples_are_counted(tmp_path):
    rows = [
        {"prompt": "12345", "answer": "67"},  # 9 tokens with BOS and EOS: cut
        {"prompt": "1", "answer": "2"},
        {"prompt": "1234567", "answer": "8"},  # answer cut away
    ]
    examples, told = load(tmp_path / "a.jsonl", rows, max_length=8)
    assert [parts(example) for example in examples] == [("<s>12345", "67"), ("<s>1", "2</s>")]
    assert told.startswith("2 examples (3 read, 2 cut at 8 tokens, 1 dropped: no prompt or answer left")


def test_conversations_without_an_answer_are_dropped(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": "no question"}]},
    ]
    examples, told = load(tmp_path / "a.jsonl", rows)
    assert len(examples) == 1 and "2 dropped" in told


def test_samples_are_drawn_at_random_and_again_the_same(tmp_path):
    one, two = (load(tmp_path / "a.jsonl", question_rows(), max_samples=10)[0] for _ in range(2))
    assert one == two and len(one) == 10
    assert one != load(tmp_path / "a.jsonl", question_rows())[0][:10]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "part of a split"])
def test_local_files_and_folders_of_every_kind(tmp_path, kind):
    rows, name, split = question_rows(), tmp_path / f"a.{kind}", "train"
    if kind == "json":
        name.write_text(json.dumps(rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(name)
    else:
        name = tmp_path / "train.jsonl"
        save_rows(name, rows)
        save_rows(tmp_path / "test.jsonl", rows[:3])
        name = tmp_path if kind == "folder" else name
        rows, split = (rows[5:15], "train[5:15]") if kind == "part of a split" else (rows, split)
    examples, _ = load(name, split=split)
    assert [parts(example)[0] for example in examples] == ["<s>" + row["prompt"] for row in rows]
    if kind == "folder":
        assert len(load(name, split="test")[0]) == 3


def test_a_configuration_of_a_dataset(tmp_path):
    for name in ("easy", "hard"):
        (tmp_path / name).mkdir()
        save_rows(tmp_path / name / "train.jsonl", [{"prompt": name, "answer": "1"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy/train.jsonl\n"
        "- config_name: hard\n  data_files: hard/train.jsonl\n---\n"
    )
    (example,), _ = load(tmp_path, dataset_config="hard")
    assert parts(example)[0] == "<s>hard"
