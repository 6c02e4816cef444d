"""Standard benchmarks: our adapter against the harness's own class, and who sees what when models are routed."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import WIDTH, make_tokenizer, question_rows, save_checkpoint, save_rows
from test_tune import load_model

import evaluate
from mindskip import MindSkipConfig, add_mindskip, last, load_routers, routers, save_routers

pytest.importorskip("lm_eval", reason="needs the extra `tasks`")
TASKS = str(Path(__file__).parent / "tasks")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sums of different lengths with choices of different lengths, a model, and routers that decide both ways."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "question": f"{'please add ' * (i % 4)}{i}+{7 * i}=",
            "choices": [str(8 * i), str(i), "a thousand"],
            "label": i % 3,
        }
        for i in range(30)
    ]
    save_rows(tmp_path / "sums.jsonl", rows)
    for split in ("train", "test"):
        save_rows(tmp_path / f"{split}.jsonl", question_rows())
    model = add_mindskip(load_model(save_checkpoint(tmp_path / "model")), MindSkipConfig((2, 3, 4)))
    torch.manual_seed(1)
    for router in routers(model):
        router.weight.data.copy_(4 * torch.randn(WIDTH))
    save_routers(model, tmp_path / "routers.safetensors")
    return tmp_path


def run(adapter, **options) -> dict:
    """What the harness makes of the sums."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    return simple_evaluate(adapter, tasks=["sums"], task_manager=manager, log_samples=True, **options)


def adapted(model):
    """Our adapter around a model that has routers, with every gate open."""
    return evaluate.harness_adapter(model, make_tokenizer(), dict.fromkeys((2, 3, 4), True), 7)


def its_own(model):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=7, device="cpu")


def answers(results) -> dict[int, list]:
    """By question: (log-likelihood, is greedy) of every choice."""
    found = {sample["doc_id"]: sample["filtered_resps"] for sample in results["samples"]["sums"]}
    assert len(found) == 30
    return found


@pytest.mark.parametrize("shots", [0, 2])
def test_a_dense_model_scores_as_in_the_harness_own_class(folder, shots):
    ours = run(adapted(load_routers(load_model("model"), "routers.safetensors")), num_fewshot=shots)
    theirs = run(its_own(load_model("model")), num_fewshot=shots)
    assert ours["results"]["sums"] == theirs["results"]["sums"]
    for one, two in zip(answers(ours).values(), answers(theirs).values(), strict=True):
        for (likelihood, is_greedy), (expected, was_greedy) in zip(one, two, strict=True):
            assert likelihood == pytest.approx(expected, rel=1e-5) and is_greedy == was_greedy


def test_routing_sees_the_context_alone(folder):
    """Whatever else is in the batch, an answer scores as it does alone, after a context that was routed alone."""
    model, tokenizer = load_routers(load_model("model"), "routers.safetensors"), make_tokenizer()
    adapter = evaluate.harness_adapter(model, tokenizer, {}, 7)
    results = answers(run(adapter))
    (gates,) = (kept.reshape(30, 3, 3) for kept in adapter.kept)  # questions, choices, layers
    assert torch.equal(gates, gates[:, :1].expand_as(gates)) and 0.1 < gates.mean() < 0.9
    for i, row in enumerate(map(json.loads, (folder / "sums.jsonl").read_text().splitlines())):
        context = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        for choice, (likelihood, _) in zip(row["choices"], results[i]):
            # Generation's way: the context is routed at prefill, the answer follows token by token.
            output, total = model(context, use_cache=True), 0.0
            for token in tokenizer(choice, add_special_tokens=False)["input_ids"]:
                total += output.logits[0, -1].log_softmax(-1)[token].item()
                output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
            assert likelihood == pytest.approx(total, rel=1e-4)
            assert torch.equal(gates[i, 0], last(model, "gate")[:, 0])


def test_a_context_that_is_too_long_loses_its_beginning_as_in_the_harness(folder):
    dense, model = load_model("model"), load_routers(load_model("model"), "routers.safetensors")
    for one in (dense, model):
        one.config.max_position_embeddings = 12  # questions have up to 40 tokens
    ours, theirs = answers(run(adapted(model))), answers(run(its_own(dense)))
    for one, two in zip(ours.values(), theirs.values(), strict=True):
        assert [value for value, _ in one] == pytest.approx([value for value, _ in two], rel=1e-5)


def test_the_table_of_tasks(folder, capsys):
    evaluate.main(
        [
            "--model",
            "model",
            "--routers",
            "routers.safetensors",
            "--dataset",
            ".",
            "--tasks",
            "sums,arithmetic",
            "--include-path",
            TASKS,
            "--micro-batch-size",
            "8",
            "--num-fewshot",
            "1",
        ]
    )
    results, printed = json.loads((folder / "tasks.json").read_text())["tasks"], capsys.readouterr().out
    assert list(results) == ["dense", "mindskip", "static"]
    for name, row in results.items():
        at, group = row["tasks"].values()
        assert at["metric"] == "acc_norm" and at["shots"] == 1 and group["metric"] == "acc"
        assert row["average"] == (at["value"] + group["value"]) / 2 and 0 < group["error"] < 10
        share = at["value"] / 100
        assert at["error"] == pytest.approx(100 * (share * (1 - share) / 29) ** 0.5)  # 30 questions
        assert re.search(rf"^{name} +{at['value']:.1f} \+-{at['error']:.1f} ", printed, re.MULTILINE)
    assert results["dense"]["keep"] == 1 and 0 < results["mindskip"]["keep"] < 1
    assert (
        abs(results["static"]["keep"] - results["mindskip"]["keep"]) <= 1 / 6
    )  # as many layers as round to it
