"""Tuning: what changes, that the budget is met, and what bad input gets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROUTED, VOCABULARY, build, routed
from transformers import AutoTokenizer

import tune
from mindskip import (
    MindSkipConfig,
    add_mindskip,
    keep_ratio,
    load_routers,
    read_routers,
    remove_mindskip,
    router_parameters,
    save_routers,
)

ROOT = Path(__file__).resolve().parents[1]


def examples(count: int = 64, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    def example(prompt, answer):
        return {"task": "all", "ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    return [example(ids(4, 12), [*ids(1, 5), 2]) for _ in range(count)]


def tuned(model, **changes):
    arguments = dict(capacity=0.5, sparsity_weight=1.0, noise=1.0, steps=20, batch_size=16, lr=1e-2, seed=0)
    model.requires_grad_(False)
    tune.tune(model, examples(), **{**arguments, **changes})
    return model


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("family", ["llama", "mixtral"])  # mixtral has routers of its own, which must stay
def test_tuning_changes_the_routers_and_nothing_else(family):
    model = add_mindskip(build(family), MindSkipConfig(ROUTED))
    mine = {id(parameter) for parameter in router_parameters(model)}
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    tuned(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]) != (id(tensor) in mine), name
    assert not model.training


def test_tuning_is_reproducible():
    first, second, other = (
        [w.detach().clone() for w in router_parameters(tuned(add_mindskip(build(), MindSkipConfig(ROUTED)), seed=seed))]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert any(not torch.equal(a, b) for a, b in zip(first, other))


def test_the_sparsity_loss_closes_gates():
    pressed = tuned(add_mindskip(build(), MindSkipConfig(ROUTED)), sparsity_weight=30.0, capacity=0.0, steps=40)
    pressed(tune.collate(examples(), "cpu")["input_ids"])
    assert keep_ratio(pressed) < 0.5  # open everywhere before tuning


@pytest.mark.parametrize("capacity", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_calibration_meets_the_budget(capacity):
    model = tuned(add_mindskip(build(), MindSkipConfig(ROUTED)), steps=5)
    many = examples(400, seed=1)
    measured = tune.calibrate(model, many, capacity)
    assert measured == pytest.approx(capacity, abs=0.01)
    # The threshold that was set is what decides: measured again, from outside, gate by gate.
    gates = []
    with torch.no_grad():
        for i in range(0, 400, 50):
            batch = tune.collate(many[i : i + 50], "cpu")
            model(batch["input_ids"], attention_mask=batch["attention_mask"], voters=batch["voters"])
            gates.append(keep_ratio(model))
    assert sum(gates) / len(gates) == pytest.approx(capacity, abs=0.01)


def test_collate_lets_prompts_vote_and_answers_carry_the_loss():
    first = {"ids": [5, 6, 7, 8, 2], "labels": [-100, -100, -100, 8, 2]}
    batch = tune.collate([first, {"ids": [9, 10, 11, 2], "labels": [-100, 10, -100, 2]}], "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [9, 10, 11, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 2], [-100, 10, -100, 2, -100]]
    assert batch["voters"].tolist() == [[True, True, True, False, False], [True, False, False, False, False]]


def test_exploration_opens_a_gate_with_the_probability_of_its_score():
    model = add_mindskip(build(), MindSkipConfig(ROUTED)).train()
    ids = torch.full((4000, 2), 5)
    first = routed(model)[0]  # those above it see other inputs
    first.router.weight.data.normal_(std=0.05)
    model(ids, use_cache=False)
    score = first.score.clone()
    torch.manual_seed(0)
    with tune.exploration(model, tune.logistic_noise(3, 4000, 1.0)):
        model(ids, use_cache=False)
        # 4,000 draws: four standard deviations are below 0.032
        assert first.gate.mean().item() == pytest.approx(score.mean().item(), abs=0.032)
        assert set(first.gate.flatten().tolist()) == {0.0, 1.0}
    model(ids, use_cache=False)
    assert torch.equal(first.score, score)


def test_batches_visit_every_example_before_any_again():
    stream = tune.batches(list(range(10)), 4, seed=0)
    seen = [example for _ in range(5) for example in next(stream)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))


def test_the_default_layers_are_the_deepest_half_but_the_last():
    assert tune.default_layers(build(num_hidden_layers=32)) == tuple(range(15, 31))
    assert tune.default_layers(build(num_hidden_layers=8)) == (3, 4, 5, 6)


def test_a_short_run_on_the_demo_meets_the_budget(tmp_path):
    done = run("tune.py", "--steps", "12", "--capacity", "0.4", "--name", "short", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"step 12/12 \| loss \d+\.\d+ \| keep \d\.\d\d \(target 0\.40\) \| [\d,]+ tok/s \| eta", done.stdout
    )
    folder = tmp_path / "runs" / "short"
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert json.loads((folder / "arguments.json").read_text())["capacity"] == 0.4
    model, tokenizer = tune.load_model(str(tune.DEMO)), AutoTokenizer.from_pretrained(tune.DEMO)
    load_routers(model, folder / "routers.safetensors")
    batch = tune.collate(tune.load_examples(str(tune.DEMO / "data"), "test", tokenizer)[0], "cpu")
    with torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"], voters=batch["voters"], use_cache=False)
    assert keep_ratio(model) == pytest.approx(0.4, abs=0.02)
    assert routed(model)[0].config.layers == (1, 2)


def test_the_python_of_the_readme_runs_and_tunes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    model, tokenizer = tune.load_model(str(tune.DEMO)), AutoTokenizer.from_pretrained(tune.DEMO)
    save_routers(add_mindskip(model, MindSkipConfig((1, 2))), tmp_path / "runs" / "demo" / "routers.safetensors")
    load, use = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(load, names)
    assert len(router_parameters(names["model"])) == 2
    remove_mindskip(names["model"])
    chosen = tune.load_examples(str(tune.DEMO / "data"), "train", tokenizer)[0][:64]
    batches = [{**tune.collate(chosen, "cpu")}] * 3
    exec("import torch\nfrom mindskip import *\n" + use, names | {"batches": batches})
    _, weights = read_routers(tmp_path / "routers.safetensors")
    assert all(weight.abs().max() > 0 for weight in weights.values())
