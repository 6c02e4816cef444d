"""Measuring: scores, FLOPs, static baselines and the share of the ideal saving."""

import json

import limit
import pytest
import torch
from conftest import ROUTED, build, build_routed, routed, tokens
from test_tune import examples, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

import evaluate
import tune
from mindskip import MindSkipConfig, add_mindskip, fix_gates, save_routers

MIXED = {
    2: torch.tensor([1, 0, 1, 0]).bool(),
    3: torch.tensor([0, 0, 1, 1]).bool(),
    4: torch.tensor([0, 0, 0, 0]).bool(),
}


@pytest.fixture(scope="module")
def demo():
    return tune.load_model(str(tune.DEMO)), AutoTokenizer.from_pretrained(tune.DEMO)


def test_the_dense_demo_reaches_its_promise(demo):
    model, tokenizer = demo
    test = tune.load_examples(str(tune.DEMO / "data"), "test", tokenizer)[0]
    scores = evaluate.score_answers(model, test)
    summary = evaluate.summarize(scores, scores, [example["task"] for example in test])
    assert len(summary["accuracy"]) == 8
    assert summary["average"] >= 97 and min(summary["accuracy"].values()) >= 90


def test_the_splits_of_the_demo_are_disjoint():
    splits = [
        [json.loads(line) for line in (tune.DEMO / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    ]
    prompts = [{row["prompt"].split("|")[0] for row in split} for split in splits]
    assert not prompts[0] & prompts[1] and min(map(len, prompts)) > 500
    for path, bound in (("model.safetensors", 4e6), ("data", 1e6)):
        files = [p for p in [tune.DEMO / path, *(tune.DEMO / path).glob("*")] if p.is_file()]
        assert 0 < sum(file.stat().st_size for file in files) <= bound


def test_a_score_is_what_greedy_decoding_gets_right(demo):
    model, tokenizer = demo
    chosen = tune.load_examples(str(tune.DEMO / "data"), "test", tokenizer)[0][::100]
    torch.manual_seed(0)
    add_mindskip(model, MindSkipConfig((1, 2)))
    try:
        for skip in routed(model):
            skip.router.weight.data.normal_()  # random decisions: some answers right, some wrong
        correct = evaluate.score_answers(model, chosen)["correct"]
        for example, right in zip(chosen, correct.tolist()):
            prompt = torch.tensor([tune.prompt_of(example)])
            answer = example["ids"][prompt.shape[1] :]
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False
            )
            assert (output[0, prompt.shape[1] :].tolist() == answer) == right
        assert 0 < correct.float().mean() < 1
    finally:
        evaluate.remove_mindskip(model)


def test_loss_and_standard_errors():
    model, data = build(), examples(10)
    scores = evaluate.score_answers(model, data, batch_size=3)
    for example, loss in zip(data, scores["loss"]):
        ids, labels = torch.tensor([example["ids"]]), torch.tensor([example["labels"]])
        expected = model(ids, labels=labels).loss * (labels != -100).sum()  # the model's own loss, one by one
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    scores["correct"] = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 0]).bool()
    reference = {**scores, "correct": torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 0, 0]).bool()}
    summary = evaluate.summarize(scores, reference, ["a"] * 4 + ["b"] * 6)
    assert summary["accuracy"] == {"a": 75.0, "b": 50.0} and summary["average"] == 62.5
    # (0.75 * 0.25 / 4 + 0.5 * 0.5 / 6) / 2^2, by hand; of the difference: one of four changed
    assert summary["standard_error"] == pytest.approx(100 * ((0.1875 / 4 + 0.25 / 6) / 4) ** 0.5)
    assert summary["paired_standard_error"] == pytest.approx(100 * (0.1875 / 4 / 4) ** 0.5)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_flops_formula_equals_the_counter(phase, family):
    # Eager attention and experts: the counter does not see inside the fused kernels.
    model, ids = build_routed(family, attn_implementation="eager"), tokens(length=20)
    model.set_experts_implementation("eager")
    with torch.no_grad(), fix_gates(model, MIXED):
        cache, token = evaluate.prefill(model, ids)
        with FlopCounterMode(display=False) as counter:
            if phase == "prefill":
                evaluate.prefill(model, ids)
            else:
                evaluate.decode(model, cache, token, 1)
    keep = {i: gate.float().mean().item() for i, gate in MIXED.items()}
    visible = 20 if phase == "prefill" else 21
    expected = 4 * evaluate.forward_flops(model, 20 if phase == "prefill" else 1, visible, keep)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_similarity_finds_the_attention_that_does_nothing():
    for family in ("llama", "gemma2", "olmo2"):
        model = build(family)
        for layer, factor in ((3, 0.0), (1, 1e-3)):
            attention = model.model.layers[layer].self_attn
            attention.o_proj.weight.data *= factor
            if hasattr(model.model.layers[layer], "post_attention_layernorm") and family != "llama":
                model.model.layers[layer].post_attention_layernorm.weight.data.fill_(
                    -1.0 if family == "gemma2" else 0.0
                )
        assert set(evaluate.similarity_order(model, examples(), 16)[:2]) == {1, 3}, family


def test_rows_put_the_model_back(tmp_path):
    model, ids = build(), tokens()
    save_routers(build_routed(), tmp_path / "routers.safetensors")
    expected = model(ids).logits
    config = MindSkipConfig(ROUTED)
    gates = {i: gate.float()[:, None, None] for i, gate in MIXED.items()}
    rows = [evaluate.dense(), evaluate.mindskip(tmp_path / "routers.safetensors"), evaluate.static("static", [2, 5]),
            evaluate.random_gates(config, 0.5, seed=0), evaluate.multiply(gates)]  # fmt: skip
    for row in rows:
        with row.using(model, 4):
            assert torch.equal(model(ids).logits, expected) == (row.name == "dense")
        assert torch.equal(model(ids).logits, expected)
    with rows[-1].using(model, 4):
        multiplied = model(ids).logits
    with fix_gates(add_mindskip(model, config), MIXED):
        torch.testing.assert_close(multiplied, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_random_gates_are_as_many_and_differ():
    row, model, gates = evaluate.random_gates(MindSkipConfig(ROUTED), 0.3, seed=0), build(), []
    for _ in range(2):
        with row.using(model, 400):
            model(tokens(rows=400, length=2))
            gates.append(torch.stack([skip.gate.flatten() for skip in routed(model)]))
    assert torch.stack(gates).mean().item() == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(gates[0], gates[1])


def test_measured_bytes_shrink_with_the_kept_rows():
    model, ids = build(), tokens(length=32)
    results = evaluate.measure(
        model, [evaluate.dense(), evaluate.static("static", list(ROUTED))], ids, 2, 2, lambda *a: None
    )
    assert results["static"]["kv_bytes"] == results["dense"]["kv_bytes"] // 2  # 3 of 6 layers
    assert (
        results["dense"]["kv_bytes"] == 6 * 2 * 4 * 2 * 34 * 16 * 4
    )  # layers, k and v, rows, heads, tokens, head dim, float32
    assert 0 < results["static"]["peak_bytes"] < results["dense"]["peak_bytes"]


def test_closed_gates_save_the_operations_of_removed_attention():
    assert limit.operations_share() >= 0.95


def test_long_prompts_are_long_and_of_one_task_each():
    data = [{"task": name, "ids": [i, i]} for i, name in enumerate("ab")]
    assert evaluate.long_prompts(data, 3, 5).tolist() == [[0] * 5, [1] * 5, [0] * 5]


def test_tables_are_aligned():
    assert evaluate.table(["a", "bb"], [["long", "1"], ["x", "22.5"]]) == "a       bb\nlong     1\nx     22.5"


def test_evaluate_end_to_end(tmp_path):
    done = run("tune.py", "--steps", "3", "--batch-size", "16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(
        "evaluate.py", "--repeats", "2", "--prompt-length", "64", "--new-tokens", "2", "--draws", "1", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "demo" / "results.json").read_text())
    names = ["dense", "mindskip", "static, similarity", "static, best", "static, router", "random"]
    assert list(results["quality"]) == names
    for name in [*names, "multiply"]:
        assert any(line.startswith(name) for line in done.stdout.splitlines())
    assert results["quality"]["static, best"]["average"] >= results["quality"]["static, router"]["average"]
    assert abs(results["quality"]["mindskip"]["keep"] - 0.5) <= 0.02
    assert results["cost"]["dense"]["prefill_gflops"] > results["cost"]["mindskip"]["prefill_gflops"]
    assert results["cost"]["multiply"]["kv_bytes"] == results["cost"]["dense"]["kv_bytes"]
