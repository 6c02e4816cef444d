"""Scale and long runs: accumulation, checkpointing, several processes, interruption, and losses that go wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import build_routed, question_rows, save_checkpoint, save_rows
from safetensors.torch import load_file
from test_tune import ESTIMATORS, ROOT, examples, frozen, load_model, recorded_gradients, run, settings

import mindskip
import tune
from mindskip import capacity_loss, fix_gates, last, load_routers, read_routers, router_parameters

STEPS = ["--steps", "6", "--batch-size", "8", "--max-length", "64"]


@pytest.fixture
def inputs(tmp_path) -> list[str]:
    model = save_checkpoint(tmp_path / "model")
    return ["--model", model, "--dataset", save_rows(tmp_path / "train.jsonl", question_rows())]


def gradients(estimator, checkpointing=False, capacity=0.3, rows=12, micro_batch_size=None, **changes):
    """Gradients, keep ratios and losses of two steps, with routers that decide both ways, and that stay."""
    model, records = build_routed(**changes).requires_grad_(False), []
    for weight in router_parameters(model):
        weight.requires_grad_(True).data.div_(4)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    args = settings(
        estimator=estimator,
        capacity=capacity,
        sparsity_weight=5.0,
        steps=2,
        batch_size=rows,
        lr=0.0,
        micro_batch_size=micro_batch_size,
    )
    with recorded_gradients(model) as found:
        tune.tune(model, examples(), args, report=lambda *record: records.append(record))
    return found, [record[1] for record in records], [record[2] for record in records]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("capacity", [0.0, 0.3, 1.0])  # over, about and under budget: the hinge is on or off
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 5},
        {"micro_batch_size": 1},
        {"checkpointing": True},
        {"micro_batch_size": 4, "checkpointing": True},
    ],
)
def test_accumulation_and_checkpointing_change_neither_gates_nor_gradients(changes, capacity, estimator):
    expected, losses, keeps = gradients(estimator, capacity=capacity)
    found, other_losses, other_keeps = gradients(estimator, capacity=capacity, **changes)
    assert 0.1 < keeps[0] < 0.9 and other_keeps == keeps  # gates are drawn for the step, not the part
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for one, two in zip(sum(expected, []), sum(found, []), strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_frozen_backbone_has_no_dropout(estimator):
    expected, losses, keeps = gradients(estimator)
    found, other_losses, other_keeps = gradients(estimator, attention_dropout=0.5, micro_batch_size=5)
    assert other_keeps == keeps and other_losses == pytest.approx(losses, rel=1e-5)
    for one, two in zip(sum(expected, []), sum(found, []), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
def test_no_step_is_wasted_on_a_rate_of_zero(steps):
    model, rates = frozen(), []
    args = settings(steps=steps, batch_size=8, lr=1e-2)
    tune.tune(model, examples(), args, report=lambda *record: rates.append(record[3]))
    assert all(0 < rate <= 1e-2 for rate in rates) and rates[0] == 1e-2  # of 5 steps, 1 warms up
    assert all(weight.abs().max() > 0 for weight in router_parameters(model))


def first_step(monkeypatch, **changes):
    """The gradient of the first step, its batch, the gates that it drew, and a model as it was before."""
    model, reference, seen, score = frozen(), frozen(), [], tune.score
    for one in (model, reference):
        torch.manual_seed(3)
        for weight in router_parameters(one):
            weight.data.copy_(0.25 * torch.randn(weight.shape))

    def scored(model, batch):
        result = score(model, batch)
        seen.append((batch, last(model, "gate").detach().bool()))
        return result

    monkeypatch.setattr(tune, "score", scored)
    with recorded_gradients(model) as found:
        tune.tune(model, examples(), settings(steps=2, batch_size=12, **changes))
    return found[0], *seen[0], reference


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_the_paper_s_step_is_the_gradient_of_the_paper_s_loss(capacity, monkeypatch):
    found, batch, _, model = first_step(
        monkeypatch, capacity=capacity, estimator="straight-through", sparsity_weight=5.0, logit_weight=0.0
    )
    loss = model.train()(**tune.collate(batch, "cpu"), use_cache=False).loss + 5.0 * capacity_loss(
        model, capacity
    )
    for one, two in zip(found, torch.autograd.grad(loss, router_parameters(model)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_the_drawn_step_is_that_of_its_formula_row_by_row(capacity, monkeypatch):
    """Of K draws: sum (L_k - mean L) / (K - 1) * grad log p(m_k), and the slope of the mean score over budget."""
    found, batch, gates, model = first_step(
        monkeypatch, capacity=capacity, sparsity_weight=5.0, logit_weight=0.0
    )
    layers, prompts = [router.layer for router in mindskip.routers(model)], 12
    answers = sum(len(one["ids"]) - one["prompt"] for one in batch[:prompts])
    draws, expected = len(batch) // prompts, 0.0
    assert draws > 1
    for first in range(prompts):
        nats, log_p = [], []
        for row in range(first, len(batch), prompts):
            assert batch[row] is batch[first]
            example, drawn = tune.collate([batch[row]], "cpu"), dict(zip(layers, gates[:, row].tolist()))
            with fix_gates(model, drawn), torch.no_grad():
                tokens = -model(**example).logits[0, :-1].log_softmax(-1)
            answer = range(batch[row]["prompt"], len(batch[row]["ids"]))
            nats.append(sum(tokens[t - 1, batch[row]["ids"][t]] for t in answer) / answers)
            log_p.append(0.0)
            for k, i in enumerate(layers):
                with fix_gates(model, {j: drawn[j] for j in layers[:k]}):
                    model(**example)
                score = 1 / (1 + torch.exp(-mindskip.last(model, "logit")[0, 0]))
                log_p[-1] = log_p[-1] + torch.log(score if drawn[i] else 1 - score)
                if capacity < 1:  # over budget: the slope of the mean probability
                    expected = expected + 5.0 * score / (len(layers) * len(batch))
        for k in range(draws):
            others = sum(nats[:k] + nats[k + 1 :]) / (draws - 1)
            expected = expected + (nats[k] - others) / draws * log_p[k]
    for one, two in zip(found, torch.autograd.grad(expected, router_parameters(model)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_third_term_is_the_mean_squared_logit(estimator, monkeypatch):
    with_it, batch, gates, model = first_step(monkeypatch, estimator=estimator, logit_weight=2.0)
    without, _, same, _ = first_step(monkeypatch, estimator=estimator, logit_weight=0.0)
    assert torch.equal(gates, same)
    for router, drawn in zip(mindskip.routers(model), gates):
        router.training = estimator == "straight-through"  # there gates carry a gradient to the routers below
        # thresholds that give the gates that were drawn
        router.drawn = None if router.training else 2.0 * ~drawn[:, None]
    tune.score(model, batch)
    assert torch.equal(last(model, "gate").bool(), gates)
    slopes = torch.autograd.grad(mindskip.last(model, "logit").square().mean(), router_parameters(model))
    found, expected = torch.cat(with_it) - torch.cat(without), torch.cat(slopes)
    weight = (found @ expected / (expected @ expected)).item()
    assert 0 < weight <= 2.0  # it may fade during a run
    torch.testing.assert_close(found, weight * expected, rtol=1e-3, atol=1e-5)


def test_checkpointing_leaves_frozen_lower_layers_alone(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, tuning = [], tune.tune

    def counted(model, *arguments):
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        tuning(model, *arguments)
        assert [calls.count(i) for i in range(6)] == [
            1,
            1,
            2,
            2,
            2,
            2,
        ]  # 2 to 4 are routed; none below runs again

    monkeypatch.setattr(tune, "tune", counted)
    tune.main([*inputs, "--steps", "1", "--estimator", "straight-through", "--gradient-checkpointing"])
    assert len(calls) > 10  # it was called


@pytest.mark.parametrize("flags", [["--estimator", name] for name in ESTIMATORS] + [["--train", "all"]])
def test_two_processes_tune_the_routers_that_one_does(inputs, flags, tmp_path):
    arguments = [*inputs, *STEPS, *flags]
    one = run("tune.py", *arguments, "--name", "one", folder=tmp_path)
    assert one.returncode == 0, one.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tune.py"), *arguments, "--name", "two", "--device", "cpu"]
    two = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("step 6/6") == 1  # rank 0 alone reports and writes
    (described, tensors), (expected, wanted) = (
        read_routers(tmp_path / "runs" / name) for name in ("two", "one")
    )
    for name, weight in wanted.items():
        assert weight.abs().max() > 1e-2
        torch.testing.assert_close(tensors[name], weight, rtol=1e-3, atol=1e-5)
    assert described["config"].threshold == pytest.approx(expected["config"].threshold, rel=1e-3)
    logs = [(tmp_path / "runs" / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert two["keep"] == one["keep"] and two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    if "all" in flags:  # where a gradient is almost 0, AdamW makes a full step of its rounding's sign
        weights = [load_model(tmp_path / "runs" / name / "model").state_dict() for name in ("one", "two")]
        for name, before in load_model(inputs[1]).state_dict().items():
            change = (weights[0][name] - before).abs().mean()
            assert change > 1e-5 and (weights[0][name] - weights[1][name]).abs().mean() < 0.05 * change


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_interrupted_run_goes_on_to_the_same_routers_bit_for_bit(
    inputs, estimator, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    # Over budget in the first step only: what the hinge does in the fourth depends on the keep ratio of the third.
    arguments = [*inputs, *STEPS, "--estimator", estimator, "--capacity", "0.9"]
    tune.main([*arguments, "--name", "whole"])
    save = mindskip.save_routers

    def interrupted(model, path, state=None, **about):
        if about.get("step") == 4:
            raise KeyboardInterrupt  # before the save: step 4 must be done again
        save(model, path, state, **about)

    monkeypatch.setattr(mindskip, "save_routers", interrupted)
    with pytest.raises(SystemExit) as stop:
        tune.main([*arguments, "--name", "broken"])
    assert stop.value.code == 130 and "stopped" in capfd.readouterr().err
    monkeypatch.setattr(mindskip, "save_routers", save)
    path = tmp_path / "runs" / "broken" / "routers.safetensors"
    assert read_routers(path)[0]["about"]["step"] == 3
    load_routers(load_model(inputs[1]), path)  # the last good routers are routers
    tune.main(["--resume", "runs/broken", "--device", "cpu"])
    whole, resumed = (
        load_file(tmp_path / "runs" / name / "routers.safetensors") for name in ("whole", "broken")
    )
    names = [f"layers.{i}.router.weight" for i in (2, 3, 4)]
    assert list(whole) == names  # no state of the optimiser any more
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    (one, two) = (read_routers(tmp_path / "runs" / name)[0] for name in ("whole", "broken"))
    assert one["config"] == two["config"]
    told, again = (described["about"]["arguments"] for described in (one, two))
    changed = {name for name, value in told.items() if again[name] != value}
    assert changed == {"name", "device"}  # a flag beside --resume overrides; the rest is that of the run
    logs = [(tmp_path / "runs" / name / "log.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    without_time = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert without_time[0] == without_time[1] and len(logs[0]) == 6


def test_a_killed_run_can_be_resumed(inputs, tmp_path, monkeypatch):
    arguments = [*inputs, "--steps", "100000", "--batch-size", "4", "--name", "killed"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tune.py"), *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log = tmp_path / "runs" / "killed" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 5:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    described, tensors = read_routers(log.with_name("routers.safetensors"))
    step, lines = described["about"]["step"], log.read_text().splitlines()
    assert 5 <= step and abs(len(lines) - step) <= 1
    assert "exp_avg_sq" in tensors and all(tensor.isfinite().all() for tensor in tensors.values())
    monkeypatch.chdir(tmp_path)
    tune.main(["--resume", "runs/killed", "--steps", str(step + 2)])
    described, _ = read_routers("runs/killed")
    assert "step" not in described["about"] and described["about"]["arguments"]["batch_size"] == 4
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps[-2:] == [step + 1, step + 2] and len(set(steps)) == len(steps)


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
                models[-1].lm_head.weight.data.fill_(math.inf)
            else:
                router_parameters(models[-1])[0].register_hook(lambda grad: grad * math.nan)
        return collate(examples, device)

    monkeypatch.setattr(
        tune, "add_mindskip", lambda model, config: models.append(model) or attach(model, config)
    )
    monkeypatch.setattr(tune, "collate", collated)
    with pytest.raises(SystemExit) as stop:
        tune.main([*inputs, *STEPS, "--name", "broken", "--capacity", "0"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1
    assert "step 3: " in error and "not finite; try" in error and "--lr" in error
    described, tensors = read_routers(tmp_path / "runs" / "broken" / "routers.safetensors")
    assert described["about"]["step"] == 2 and all(value.isfinite().all() for value in tensors.values())


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_progress(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    real, writes = mindskip.Path.write_bytes, []

    def full(path, data):
        if path.name == "routers.safetensors.partial" and len(writes) == 2:
            raise OSError(28, "No space left on device", str(path))
        writes.append(path)
        return real(path, data)

    monkeypatch.setattr(mindskip.Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stop:
        tune.main([*inputs, *STEPS, "--name", "full"])
    error = capfd.readouterr().err
    assert (
        stop.value.code == 2 and "No space left on device" in error and len(error.strip().splitlines()) == 1
    )
    assert read_routers(tmp_path / "runs" / "full" / "routers.safetensors")[0]["about"]["step"] == 2
