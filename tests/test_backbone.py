"""What is trained beside the routers (the backbone, or adapters), and what else one router can tell."""

import io
import json
from pathlib import Path

import pytest
import torch
from conftest import ROUTED, build, need_adapters, question_rows, save_checkpoint, save_rows, tokens
from test_bad_input import refused
from test_tune import ESTIMATORS, examples, frozen, load_model, recorded_gradients, settings
from transformers import AutoTokenizer

import evaluate
import mindskip
import tune
from mindskip import fix_gates, last, load_routers, routers


@pytest.fixture(params=["llama", "qwen3"])
def flags(request, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    model = save_checkpoint(tmp_path / "model", request.param)
    data = save_rows(tmp_path / "rows.jsonl", question_rows())
    return ["--model", model, "--dataset", data, "--steps", "3", "--batch-size", "4", "--name", "more"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_backbone_gets_the_gradient_of_the_task_loss_under_the_drawn_gates(estimator, monkeypatch):
    """Routers are zero, so that the backbone cannot change gates: only the answers' loss is left."""
    model, reference, seen, score = frozen().requires_grad_(True), build(), [], tune.score

    def scored(model, batch):
        result = score(model, batch)
        seen.append((batch, last(model, "gate").detach().bool()))
        return result

    monkeypatch.setattr(tune, "score", scored)
    weights = [parameter for name, parameter in model.named_parameters() if "router" not in name]
    with recorded_gradients(model, weights) as found:
        tune.tune(model, examples(), settings(steps=1, batch_size=12, estimator=estimator, train="all"))
    ((batch, gates),) = seen
    mindskip.add_mindskip(reference, mindskip.MindSkipConfig(ROUTED))
    with fix_gates(reference, dict(zip(ROUTED, gates))):
        nats, _ = score(reference, batch)
    answers = sum(len(one["ids"]) - one["prompt"] for one in batch)  # of all draws
    expected = [p for name, p in reference.named_parameters() if "router" not in name]
    assert gates.all() == (estimator == "straight-through")
    for one, two in zip(found[0], torch.autograd.grad(nats.sum() / answers, expected, allow_unused=True)):
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two, rtol=1e-4, atol=1e-6)


def test_training_all_saves_a_model_and_routers_that_go_together(flags):
    before = load_model(flags[1])
    tune.main([*flags, "--train", "all", "--backbone-lr", "0.01", "--lr", "1"])
    after = load_model("runs/more/model")
    changed = [name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(changed) == len(list(before.parameters()))
    steps = [(p - before.get_parameter(name)).abs().max() for name, p in after.named_parameters()]
    assert 0.005 < max(steps) < 3 * 0.01 * 1.01  # AdamW: at most its learning rate, at each of three steps
    asked = "--routers runs/more --model runs/more/model --split train".split()
    cost = "--prompt-length 8 --batch-size 1 --repeats 2 --new-tokens 1".split()
    evaluate.main([*asked, "--dataset", flags[3], *cost])


@pytest.mark.parametrize(
    "trained, given", [(["--train", "all"], "--model"), (["--lora-rank", "2"], "--adapter")]
)
def test_routers_on_another_model_than_theirs_are_told(trained, given, flags, capsys):
    if "--lora-rank" in trained:
        need_adapters()
    tune.main([*flags, *trained])
    ours = ["--routers", "runs/more", *flags[:2], "--explain", "1+1="]
    capsys.readouterr()
    evaluate.main(ours)
    folder = {"--model": "runs/more/model", "--adapter": "runs/more/adapter"}[given]
    told = capsys.readouterr().out
    base = f"{folder} without an adapter" if given == "--model" else f"{flags[1]} with --adapter {folder}"
    assert f"WARNING: these routers were tuned on {base}\n" in told
    evaluate.main([*ours, given, folder])
    assert "WARNING" not in capsys.readouterr().out


def test_adapters_and_routers_are_saved_apart_and_loaded_in_either_order(flags):
    need_adapters()
    base = {name: p.clone() for name, p in load_model(flags[1]).named_parameters()}
    tune.main([*flags, "--lora-rank", "2", "--backbone-lr", "0.05"])
    first = load_routers(load_model(flags[1], adapter="runs/more/adapter"), "runs/more")
    second = load_routers(load_model(flags[1]), "runs/more")
    second.load_adapter("runs/more/adapter")
    ids = tokens()
    with torch.no_grad():
        logits, gates = first(ids).logits, last(first, "gate")
        assert torch.equal(second.eval()(ids).logits, logits) and torch.equal(last(second, "gate"), gates)
        dense = load_routers(load_model(flags[1]), "runs/more")
        assert (dense(ids).logits - logits).abs().max() > 1e-3  # adapters do something
    for name, parameter in dense.named_parameters():
        assert "router" in name or torch.equal(parameter, base[name])


def test_routers_tuned_on_an_earlier_run_s_model_leave_its_folder_alone(flags):
    """In a run of the same name. What is saved beside routers is told by what was trained, not by its name."""
    tune.main([*flags, "--train", "all"])
    paths = {path: path.stat().st_mtime_ns for path in Path("runs/more/model").iterdir()}
    tune.main(["--model", "runs/more/model", *flags[2:], "--overwrite"])
    assert {path: path.stat().st_mtime_ns for path in Path("runs/more/model").iterdir()} == paths
    assert mindskip.read_routers("runs/more")[0]["about"]["base_model"] == "runs/more/model"


def test_what_cannot_be_gone_on_with_is_refused(flags, tmp_path, capfd):
    tune.main([*flags, "--train", "all"])
    assert "this run is finished" in refused(tune.main, ["--resume", "runs/more"], tmp_path, capfd)
    described, tensors = mindskip.read_routers("runs/more")
    model = load_routers(load_model(flags[1]), "runs/more")
    state = {name: torch.zeros(3, 64) for name in ("exp_avg", "exp_avg_sq")} | {"keep": torch.ones(1)}
    mindskip.save_routers(model, "runs/more/routers.safetensors", state, **described["about"], step=1)
    assert "only routers have progress" in refused(tune.main, ["--resume", "runs/more"], tmp_path, capfd)
    told = refused(tune.main, [*flags[:4], "--adapter", "nothing"], tmp_path, capfd)
    assert "--adapter nothing" in told


def test_one_router_serves_other_budgets_without_tuning(flags, capsys):
    tune.main([*flags, "--lr", "1", "--layers", "2,3,4"])
    before = mindskip.read_routers("runs/more")
    ours = ["--routers", "runs/more", *flags[:4], "--split", "train"]
    evaluate.main([*ours, "--capacity", "0.25,0.75", "--prompt-length", "9999"])  # nothing is timed
    found = json.loads(Path("runs/more/capacities.json").read_text())
    rows = [found[f"capacity {capacity}"]["quality"]["mindskip"]["keep"] for capacity in (0.25, 0.75)]
    assert rows == [pytest.approx(0.25, abs=0.05), pytest.approx(0.75, abs=0.05)]
    after = mindskip.read_routers("runs/more")
    assert before[0] == after[0] and all(torch.equal(after[1][name], one) for name, one in before[1].items())
    assert capsys.readouterr().out.count("accuracy %") == 2


@pytest.mark.parametrize("granularity", ["attention-sequence", "block-token"])
def test_explaining_a_prompt_tells_scores_gates_and_the_answer(granularity, flags, capsys, monkeypatch):
    tune.main([*flags, "--lr", "1", "--layers", "2,3,4", "--granularity", granularity])
    model, tokenizer = (
        load_routers(load_model(flags[1]), "runs/more"),
        AutoTokenizer.from_pretrained(flags[1]),
    )
    texts = ["1+1=", "22+9="]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(texts)))  # an empty line is no prompt
    capsys.readouterr()
    evaluate.main(["--routers", "runs/more", *flags[:4], "--explain", "-", "--new-tokens", "4"])
    parts = capsys.readouterr().out.strip().split("\n\n")
    for text, part in zip(texts, parts, strict=True):
        title, *rows, answer = part.splitlines()
        given = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            model(**given)
        logits, gates = last(model, "logit")[:, 0].reshape(3, -1), last(model, "gate")[:, 0].reshape(3, -1)
        threshold = routers(model)[0].config.threshold
        for i, row, logit, gate in zip((2, 3, 4), rows, logits, gates, strict=True):
            told = row.split(maxsplit=4)
            assert told[:4] == ["layer", str(i), f"{logit.sigmoid().mean():.3f}", f"{threshold:.3f}"]
            if granularity == "attention-sequence":
                assert told[4] == ("open" if gate.all() else "closed")
            else:
                assert (
                    len(told[4]) - told[4].count(".") == gate[1:].sum() + 3 * gate[0]
                )  # <s>, then characters
        ids = model.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
        expected = f"answer: {tokenizer.decode(ids, skip_special_tokens=True)}"
        assert answer.strip() == expected.strip() and title.startswith(text)
