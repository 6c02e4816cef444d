"""Scale and long runs: accumulation, checkpointing, several processes, interruption, and losses that go wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
from conftest import ROUTED, build, question_rows, save_checkpoint, save_rows
from safetensors.torch import load_file
from test_tune import ROOT, examples, run

import tune
from mindskip import MindSkipConfig, add_mindskip, capacity_loss, load_routers, read_routers, router_parameters

STEPS = ["--steps", "6", "--batch-size", "8", "--max-length", "64"]


@pytest.fixture
def inputs(tmp_path) -> list[str]:
    model = save_checkpoint(tmp_path / "model")
    return ["--model", model, "--dataset", save_rows(tmp_path / "train.jsonl", question_rows())]


def gradients(micro_batch_size=None, checkpointing=False, capacity=0.3, rows=12, **changes):
    """Gradients, gates kept and loss of the first step."""
    model = add_mindskip(build(**changes), MindSkipConfig(ROUTED)).requires_grad_(False)
    if checkpointing:
        tune.checkpoint_activations(model)
    records, found, weights = [], [], router_parameters(model)
    optimizer = tune.router_optimizer(model, 1e-2)
    optimizer.register_step_pre_hook(lambda *_: found.append([w.grad.clone() for w in weights]))
    tune.tune(model, examples(), capacity=capacity, sparsity_weight=5.0, noise=1.0, steps=2, batch_size=rows, lr=1e-2,
              seed=0, micro_batch_size=micro_batch_size, optimizer=optimizer, report=records.append)  # fmt: skip
    return found[0], records[0]


@pytest.mark.parametrize("capacity", [0.0, 0.3, 1.0])  # over, about and under budget: the hinge is on or off
@pytest.mark.parametrize("changes", [{"micro_batch_size": 5}, {"micro_batch_size": 1}, {"checkpointing": True},
                                     {"micro_batch_size": 4, "checkpointing": True}])  # fmt: skip
def test_accumulation_and_checkpointing_change_neither_gates_nor_gradients(changes, capacity):
    (expected, plain), (found, other) = gradients(capacity=capacity), gradients(capacity=capacity, **changes)
    assert 0.1 < plain["keep"] < 0.9 and other["keep"] == plain["keep"]  # noise is drawn for the step, not the part
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for one, two in zip(expected, found):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)  # sums in another order


def test_a_frozen_backbone_has_no_dropout():
    (expected, plain), (found, other) = gradients(), gradients(attention_dropout=0.5, micro_batch_size=5)
    assert other["keep"] == plain["keep"] and other["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for one, two in zip(expected, found):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
def test_no_step_is_wasted_on_a_rate_of_zero(steps):
    model, records = add_mindskip(build(), MindSkipConfig(ROUTED)).requires_grad_(False), []
    tune.tune(model, examples(), capacity=0.5, sparsity_weight=1.0, noise=1.0, steps=steps, batch_size=8, lr=1e-2,
              seed=0, report=records.append)  # fmt: skip
    assert all(0 < record["lr"] <= 1e-2 for record in records) and records[0]["lr"] == 1e-2  # of 5 steps, 1 warms up
    assert all(weight.abs().max() > 0 for weight in router_parameters(model))


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_the_gradient_of_a_step_is_that_of_the_papers_loss(capacity):
    (found, _), model = gradients(capacity=capacity), add_mindskip(build(), MindSkipConfig(ROUTED))
    (batch,) = islice(tune.batches(examples(), 12, seed=0), 1)
    torch.manual_seed(1)  # as tune does before its first step
    with tune.exploration(model.train(), tune.logistic_noise(3, 12, 1.0)):
        loss = model(**tune.collate(batch, "cpu"), use_cache=False).loss + 5.0 * capacity_loss(model, capacity)
    for one, two in zip(found, torch.autograd.grad(loss, router_parameters(model)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_checkpointing_leaves_frozen_lower_layers_alone():
    model, calls = add_mindskip(build(), MindSkipConfig(ROUTED)).requires_grad_(False).train(), []
    for weight in router_parameters(model):
        weight.requires_grad_(True)
    tune.checkpoint_activations(model)
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    model(**tune.collate(examples(), "cpu"), use_cache=False).loss.backward()
    assert [calls.count(i) for i in range(6)] == [1, 1, 2, 2, 2, 2]  # 2 to 4 are routed; none below is computed again


def test_two_processes_tune_the_routers_that_one_does(inputs, tmp_path):
    one = run("tune.py", *inputs, *STEPS, "--name", "one", folder=tmp_path)
    assert one.returncode == 0, one.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tune.py"), *inputs, *STEPS, "--name", "two", "--device", "cpu"]
    two = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("step 6/6") == 1  # rank 0 alone reports and writes
    (described, tensors), (expected, wanted) = (read_routers(tmp_path / "runs" / name) for name in ("two", "one"))
    for name, weight in wanted.items():
        assert weight.abs().max() > 1e-2
        torch.testing.assert_close(tensors[name], weight, rtol=1e-3, atol=1e-5)
    assert described["config"].threshold == pytest.approx(expected["config"].threshold, rel=1e-3)
    logs = [(tmp_path / "runs" / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert two["keep"] == one["keep"] and two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_routers_bit_for_bit(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tune.main([*inputs, *STEPS, "--name", "whole"])
    save = tune.save_routers

    def interrupted(model, path, state, **about):
        if about.get("step") == 4:
            raise KeyboardInterrupt  # after the log, before the save: step 4 must be done again
        save(model, path, state, **about)

    monkeypatch.setattr(tune, "save_routers", interrupted)
    with pytest.raises(SystemExit) as stop:
        tune.main([*inputs, *STEPS, "--name", "broken"])
    assert stop.value.code == 130 and "same command and --resume" in capfd.readouterr().err
    monkeypatch.setattr(tune, "save_routers", save)
    path = tmp_path / "runs" / "broken" / "routers.safetensors"
    assert read_routers(path)[0]["about"]["step"] == 3
    load_routers(tune.load_model(inputs[1]), path)  # the last good routers are routers
    tune.main([*inputs, *STEPS, "--name", "broken", "--resume", "--micro-batch-size", "8"])
    whole, resumed = (load_file(tmp_path / "runs" / name / "routers.safetensors") for name in ("whole", "broken"))
    assert list(whole) == [f"layers.{i}.router.weight" for i in (2, 3, 4)]  # no state of the optimiser any more
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    thresholds = [read_routers(tmp_path / "runs" / name)[0]["config"] for name in ("whole", "broken")]
    assert thresholds[0] == thresholds[1]
    logs = [(tmp_path / "runs" / name / "log.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    without_time = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert without_time[0] == without_time[1] and len(logs[0]) == 6


def test_a_killed_run_can_be_resumed(inputs, tmp_path):
    arguments = [*inputs, "--steps", "100000", "--batch-size", "4", "--name", "killed"]
    process = subprocess.Popen([sys.executable, str(ROOT / "tune.py"), *arguments], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    log = tmp_path / "runs" / "killed" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 5:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    described, tensors = read_routers(log.with_name("routers.safetensors"))
    lines = log.read_text().splitlines()
    assert 5 <= described["about"]["step"] and len(lines) - 1 <= described["about"]["step"] <= len(lines)
    assert "layers.3.exp_avg_sq" in tensors


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_routers(
    inputs, what, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    models, collate, attach = [], tune.collate, tune.add_mindskip

    def collated(examples, device):
        models[-1].passes = getattr(models[-1], "passes", 0) + 1
        if models[-1].passes == 3:  # one pass a step
            if what == "loss":
                models[-1].lm_head.weight.data.fill_(float("inf"))
            else:
                router_parameters(models[-1])[0].register_hook(lambda grad: grad * float("nan"))
        return collate(examples, device)

    monkeypatch.setattr(tune, "add_mindskip", lambda model, config: models.append(model) or attach(model, config))
    monkeypatch.setattr(tune, "collate", collated)
    with pytest.raises(SystemExit) as stop:
        tune.main([*inputs, *STEPS, "--name", "broken", "--capacity", "0"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1
    assert "step 3: " in error and "not finite; try a lower --lr" in error
    described, tensors = read_routers(tmp_path / "runs" / "broken" / "routers.safetensors")
    assert described["about"]["step"] == 2 and all(value.isfinite().all() for value in tensors.values())


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_progress(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    real = tune.Path.write_bytes

    def full(path, data):
        if path.name == "routers.safetensors.partial" and len(writes) == 3:
            raise OSError(28, "No space left on device", str(path))
        writes.append(path)
        return real(path, data)

    writes = []
    monkeypatch.setattr(tune.Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stop:
        tune.main([*inputs, *STEPS, "--name", "full"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "No space left on device" in error and len(error.strip().splitlines()) == 1
    assert read_routers(tmp_path / "runs" / "full" / "routers.safetensors")[0]["about"]["step"] == 2
