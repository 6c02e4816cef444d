"""Data: formats, who votes, what is scored, and what is cut or dropped."""

import json

import datasets
import pytest
from conftest import make_tokenizer, question_rows, save_rows

import tune


def load(path, rows=None, tokenizer=None, **options):
    name = save_rows(path, rows) if rows is not None else str(path)
    return tune.load_examples(name, "train", tokenizer or make_tokenizer(), **options)


def parts(example: dict) -> tuple[str, list[str]]:
    """What votes, and the runs of tokens that are scored, as text."""
    tokenizer, runs, before = make_tokenizer(), [], -1
    for i, label in enumerate(example["labels"]):
        if label != -100:
            assert label == example["ids"][i]
            runs = runs + [[label]] if i != before + 1 or not runs else [*runs[:-1], [*runs[-1], label]]
            before = i
    return tokenizer.decode(tune.prompt_of(example)), [tokenizer.decode(run) for run in runs]


def test_prompt_and_answer(tmp_path):
    (example,), told = load(tmp_path / "a.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    assert parts(example) == ("<s>1+1=", ["2</s>"]) and example["task"] == "all"
    assert told == "1 examples (1 read, 0 cut at 2,048 tokens, 0 dropped: no prompt or answer left)"


def test_alpaca_with_and_without_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "ignored"},
        {"instruction": "Greet.", "input": "", "output": "Hello", "text": "ignored"},
    ]
    (first, second), _ = load(tmp_path / "a.jsonl", rows)
    assert parts(first) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n",
        ["3</s>"],
    )
    assert parts(second) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nGreet.\n\n### Response:\n",
        ["Hello</s>"],
    )


def test_every_turn_of_the_assistant_is_scored_and_only_what_precedes_the_first_votes(tmp_path):
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", " hello "), ("user", "2?"), ("assistant", "two")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,), _ = load(tmp_path / "a.jsonl", [row])
    assert parts(example) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ["hello<|im_end|>", "two<|im_end|>"],
    )
    whole = make_tokenizer().apply_chat_template(row["messages"], tokenize=False)
    assert make_tokenizer().decode(example["ids"]) == whole  # the template's text, no BOS of ours in front


# Templates in the manner of well-known models, shortened. {m} stands for the loop over messages.
TEMPLATES = {
    "Phi-3": "{m}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
    "Llama-3, the first": "{{ bos_token }}{m}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>"
                          "{% endfor %}<|im_start|>assistant\n",
    "Llama-2": "{m}{% if message.role == 'user' %}{{ bos_token }}[INST] {{ message.content }} [/INST]"
               "{% else %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "Qwen3": "{m}<|im_start|>{{ message.role }}\n"
             "{% if message.role == 'assistant' and loop.last %}(thought) {% endif %}"
             "{{ message.content }}<|im_end|>\n{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("model", list(TEMPLATES))
@pytest.mark.parametrize("said", [("b", "d"), ("yes", "yes"), ("a", "assistant"), ("", "d")])
def test_turns_are_found_in_the_templates_of_well_known_models(tmp_path, model, said):
    tokenizer = make_tokenizer(TEMPLATES[model].replace("{m}", "{% for message in messages %}"))
    turns = [("user", "a or b?"), ("assistant", said[0]), ("user", "and yes"), ("assistant", said[1])]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,), _ = load(tmp_path / "a.jsonl", [row], tokenizer)
    end = "</s>" if model == "Llama-2" else "<|im_end|>"
    prompt, scored = parts(example)
    # Llama-2 puts a space between answer and end of turn, which is neither's.
    expected = [piece for turn in said for piece in ((turn, end) if model == "Llama-2" else (turn + end,)) if piece]
    assert scored == expected
    assert "a or b?" in prompt and "and yes" not in prompt and "<|im_end|>" not in prompt.partition("a or b?")[2][11:]
    assert make_tokenizer().decode(example["ids"]) == tokenizer.apply_chat_template(row["messages"], tokenize=False)


def test_conversations_that_the_template_refuses_or_changes_are_dropped_and_counted(tmp_path):
    alternate = (
        "{% if loop.index0 % 2 and message.role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    )
    strict = make_tokenizer("{% for message in messages %}" + alternate + "{{ message.content | upper }};{% endfor %}")
    rows = [
        {"messages": [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]},
        {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "changed"}]},
        {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "KEPT"}]},
    ]
    (example,), told = load(tmp_path / "a.jsonl", rows, strict)
    assert parts(example) == ("A;", ["KEPT"])
    assert "3 read, 0 cut at 2,048 tokens, 2 dropped: no prompt or answer left, or refused by the chat" in told


def test_texts_are_tokenized_as_a_whole():
    """Llama-2's way: a space is put before a text; before an answer it would be a token that no model predicts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["</s>", "\u2581one", "\u2581two", "two", "<unk>", "\u2581one="])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("=", "merged_with_previous")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    ids, labels = tune.tokenize(*tune.prompt_text("one=", "two"), fast, is_chat=False)
    assert fast.convert_ids_to_tokens(ids) == ["\u2581one=", "two", "</s>"] and labels == [-100, *ids[1:]]


def test_of_plain_text_the_first_half_votes_and_the_second_is_scored(tmp_path):
    (example,), _ = load(tmp_path / "a.jsonl", [{"text": "abcdef"}])
    assert parts(example) == ("<s>abc", ["def"])
    (example,), told = load(tmp_path / "a.jsonl", [{"text": "abcdef"}], max_length=4)
    assert parts(example) == ("<s>a", ["bc"]) and "1 cut at 4 tokens" in told  # half of what is left


def test_cut_and_dropped_examples_are_counted(tmp_path):
    rows = [
        {"prompt": "12345", "answer": "67"},  # 9 tokens with BOS and EOS: cut
        {"prompt": "1", "answer": "2"},
        {"prompt": "1234567", "answer": "8"},  # answer cut away
    ]
    examples, told = load(tmp_path / "a.jsonl", rows, max_length=8)
    assert [parts(example) for example in examples] == [("<s>12345", ["67"]), ("<s>1", ["2</s>"])]
    assert told == "2 examples (3 read, 2 cut at 8 tokens, 1 dropped: no prompt or answer left)"


def test_conversations_without_an_answer_are_dropped(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"role": "assistant", "content": "no question"}]}]  # fmt: skip
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
    examples, _ = tune.load_examples(str(name), split, make_tokenizer())
    assert [parts(example)[0] for example in examples] == ["<s>" + row["prompt"] for row in rows]
    if kind == "folder":
        assert len(tune.load_examples(str(name), "test", make_tokenizer())[0]) == 3


def test_a_configuration_of_a_dataset(tmp_path):
    for name in ("easy", "hard"):
        (tmp_path / name).mkdir()
        save_rows(tmp_path / name / "train.jsonl", [{"prompt": name, "answer": "1"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy/train.jsonl\n"
        "- config_name: hard\n  data_files: hard/train.jsonl\n---\n"
    )
    (example,), _ = tune.load_examples(str(tmp_path), "train", make_tokenizer(), config="hard")
    assert parts(example)[0] == "<s>hard"
