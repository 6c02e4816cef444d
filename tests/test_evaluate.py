"""Measuring: scores, FLOPs, static baselines and the share of the ideal saving."""

import importlib.util
import json
from contextlib import nullcontext
from unittest import mock

import limit
import pytest
import torch
from conftest import ROUTED, build, build_routed, tokens
from test_mindskip import CLOSED, MIXED, without_attention
from test_tune import examples, load_demo, load_model, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import tune
from mindskip import (
    GRANULARITIES,
    MindSkipConfig,
    add_mindskip,
    fix_gates,
    remove_mindskip,
    routers,
    save_routers,
)


@pytest.fixture(scope="module")
def demo():
    """The demo's model with random routers, made once: some of its decisions are right, some wrong."""
    model = add_mindskip(load_model(tune.DEMO), MindSkipConfig((1, 2)))
    torch.manual_seed(0)
    for router in routers(model):
        router.weight.data.normal_()
    return model


def test_the_dense_demo_reaches_its_promise(demo):
    test = load_demo("test")
    scores = evaluate.score_all(demo, test, {1: True, 2: True})
    summary = evaluate.summarize(scores, scores, test, 2)
    assert len(summary["accuracy"]) == 8 and summary["keep"] == 1
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
    chosen = load_demo("test")[::100]
    correct = evaluate.score_all(demo, chosen, {})["correct"]
    for example, right in zip(chosen, correct.tolist()):
        prompt, answer = (
            torch.tensor([example["ids"][: example["prompt"]]]),
            example["ids"][example["prompt"] :],
        )
        output = demo.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False
        )
        assert (output[0, prompt.shape[1] :].tolist() == answer) == right
    assert 0 < correct.float().mean() < 1


def test_loss_and_standard_errors():
    model, data = build_routed(), examples(10)
    scores = evaluate.score_all(model, data, {}, batch_size=3)
    for example, nats, gates in zip(data, scores["nats"], scores["gates"]):
        ids, prompt = torch.tensor([example["ids"]]), example["prompt"]
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < prompt, -100)
        expected = model(ids, labels=labels).loss * (labels != -100).sum()  # the model's own loss, one by one
        torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(gates, tune.last(model, "gate")[:, 0])
    assert 0 < scores["gates"].mean() < 1
    data = [{**example, "task": "a" if i < 4 else "b"} for i, example in enumerate(data)]
    scores["correct"] = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 0]).bool()
    reference = {**scores, "correct": torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 0, 0]).bool()}
    summary = evaluate.summarize(scores, reference, data, 3)
    assert summary["accuracy"] == {"a": 75.0, "b": 50.0} and summary["average"] == 62.5
    # (0.75 * 0.25 / 4 + 0.5 * 0.5 / 6) / 2^2, by hand; of the difference: one of four changed
    assert summary["standard_error"] == pytest.approx(100 * ((0.1875 / 4 + 0.25 / 6) / 4) ** 0.5)
    assert summary["paired_standard_error"] == pytest.approx(100 * (0.1875 / 4 / 4) ** 0.5)
    answers = sum(len(example["ids"]) - example["prompt"] for example in data)
    assert summary["loss"] == pytest.approx(scores["nats"].sum().item() / answers)
    assert summary["keep"] == pytest.approx(scores["gates"].mean().item())


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


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_flops_formula_holds_for_every_granularity(granularity):
    model, ids = build(attn_implementation="eager"), tokens()
    add_mindskip(model, MindSkipConfig(ROUTED, granularity))
    gates = MIXED
    if granularity.endswith("token"):  # as many in each row: what a row is filled up with is computed, too
        gates = {i: torch.stack([torch.arange(20) % 4 < gate.sum()] * 4) for i, gate in MIXED.items()}
    with fix_gates(model, gates), FlopCounterMode(display=False) as counter:
        evaluate.prefill(model, ids)
    keep = {i: gate.float().mean().item() for i, gate in gates.items()}
    expected = 4 * evaluate.forward_flops(model, 20, 20, keep, granularity=granularity)
    assert sorted(keep.values()) == [0.0, 0.5, 0.5]
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_similarity_finds_the_attention_that_does_nothing(family, is_routed):
    model = build(family)
    for layer, factor in ((3, 0.0), (1, 1e-3)):
        attention = model.model.layers[layer].self_attn
        attention.o_proj.weight.data *= factor
        if hasattr(model.model.layers[layer], "post_attention_layernorm") and family != "llama":
            model.model.layers[layer].post_attention_layernorm.weight.data.fill_(
                -1.0 if family == "gemma2" else 0.0
            )
    assert evaluate.most_redundant(model, examples(), 2, 16) == (1, 3)
    if is_routed:  # the same order where norms wait for their gates
        add_mindskip(model, MindSkipConfig((1, 2, 3, 4, 5)))
        assert evaluate.most_redundant(model, examples(), 2, 16) == (1, 3)


@pytest.mark.parametrize("granularity", ["mlp-token", "block-sequence"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_similarity_finds_what_each_granularity_can_skip(family, granularity):
    model = build(family)
    for i, factor in ((3, 0.0), (1, 1e-3)):
        layer = model.model.layers[i]
        if family == "gemma2":  # the norm after the MLP is part of what it adds
            layer.post_feedforward_layernorm.weight.data.fill_(factor - 1.0)
        else:
            layer.mlp.down_proj.weight.data *= factor
        if granularity == "block-sequence":
            layer.self_attn.o_proj.weight.data *= factor
            if family == "gemma2":
                layer.post_attention_layernorm.weight.data.fill_(-1.0)
    add_mindskip(model, MindSkipConfig((1, 2, 3, 4, 5), granularity))
    assert evaluate.most_redundant(model, examples(), 2, 16) == (1, 3)


def test_a_row_is_a_way_to_set_gates_on_one_model(tmp_path):
    model, ids = build(), tokens()
    save_routers(build_routed(), tmp_path / "routers.safetensors")
    expected = model(ids).logits
    layers, ours = evaluate.attach(model, tmp_path)
    assert layers == ROUTED and ours == {1: True, 5: True}
    every = dict.fromkeys(range(1, 6), True)
    with fix_gates(model, every):
        assert torch.equal(model(ids).logits, expected)
    with fix_gates(model, ours):
        assert torch.equal(model(ids).logits, build_routed()(ids).logits)
    with fix_gates(model, every | {2: False, 5: False}):
        torch.testing.assert_close(model(ids).logits, without_attention(build(), (2, 5))(ids).logits)
    assert torch.equal(remove_mindskip(model)(ids).logits, expected)


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """Of compare_quality on a small model: rows, static layers, mindskip's gates, and all that was scored."""
    save_routers(build_routed(), tmp_path / "routers.safetensors")
    model, asked, score_all = build(), [], evaluate.score_all
    layers, ours = evaluate.attach(model, tmp_path)
    tasks = [{**example, "task": str(i % 2)} for i, example in enumerate(examples(400))]

    def scored(model, some, gates, **options):
        asked.append((gates, score_all(model, some, gates, **options)))
        return asked[-1][1]

    monkeypatch.setattr(evaluate, "score_all", scored)
    args = evaluate.parse_arguments([])
    found = evaluate.compare_quality(model, layers, ours, examples(100, seed=1), tasks, args)
    (gates,) = (one["gates"] for given, one in asked if given == ours and len(one["gates"]) == 400)
    return found["quality"], found["static_layers"], gates[:, [i - 1 for i in ROUTED]], asked


def test_static_rows_close_as_many_layers_as_the_router(compared):
    rows, chosen, gates, asked = compared
    keep = rows["mindskip"]["keep"]
    assert gates.shape == (400, 3) and keep == pytest.approx(gates.mean().item()) and 0.2 < keep < 0.8
    count = round(3 * (1 - keep))
    assert set(chosen) == {"similarity", "router", "best"}
    for name, closed in chosen.items():
        assert len(closed) == count and rows[f"static, {name}"]["keep"] == pytest.approx(1 - count / 3)
    searched = {tuple(i for i, gate in one.items() if gate is False) for one, _ in asked} - {()}
    assert len(searched) == {1: 5, 2: 10}[count]  # every subset of layers 1 to 5
    assert rows["static, best"]["average"] == max(
        row["average"] for name, row in rows.items() if "static" in name
    )
    assert rows["dense"]["keep"] == 1 and rows["dense"]["paired_standard_error"] == 0


def test_the_router_s_static_layers_are_those_that_it_closes_most_often(compared):
    _, chosen, _, asked = compared
    (often,) = [scores["gates"].mean(0) for _, scores in asked if len(scores["gates"]) == 100]  # on train
    by_layer = {layer: often[layer - 1].item() for layer in ROUTED}  # layers 1 to 5 are wrapped
    assert set(chosen["router"]) == set(sorted(by_layer, key=by_layer.get)[: len(chosen["router"])])


def test_random_gates_are_as_many_and_differ(compared):
    rows, _, gates, asked = compared
    assert rows["random"]["keep"] == pytest.approx(rows["mindskip"]["keep"], abs=0.05)  # 1,200 draws or more
    for given, scores in asked:
        if isinstance(given.get(ROUTED[0]), torch.Tensor):
            drawn = scores["gates"][:, [i - 1 for i in ROUTED]]  # layers 1 to 5 are wrapped
            assert not torch.equal(drawn, gates) and (drawn.T.unique(dim=0).shape == drawn.T.shape)
            break
    else:
        raise AssertionError("no row had drawn gates")


def test_measured_bytes_shrink_with_the_kept_rows():
    dense, model, ids = build(), build_routed(), tokens(length=32)
    closed = {i: torch.tensor([gate] * 4) for i, gate in CLOSED.items()}
    halves = [{i: gate[:2] for i, gate in closed.items()}] * 2
    rows = {"dense": [(dense, {})] * 2, "static": [(model, half) for half in halves]}
    results = evaluate.measure(rows, ids.split(2), 2, 2)
    bytes_of_dense = 6 * 2 * 4 * 2 * 34 * 16 * 4  # layers, k and v, rows, heads, tokens, head dim, float32
    assert results["dense"]["kv_kib"] == bytes_of_dense / 1024
    assert results["static"]["kv_kib"] == results["dense"]["kv_kib"] / 2  # 3 of 6 layers
    assert 0 < results["static"]["peak_mib"] < results["dense"]["peak_mib"]
    for row in results.values():
        assert 0 < row["prefill"]["least"] <= row["prefill"]["speedup"] <= row["prefill"]["most"]
        assert len(row["prefill"]["all"]) == 2 and row["prefill"]["median"] > 0
    assert results["dense"]["prefill"]["speedup"] == results["dense"]["decode"]["speedup"] == 1


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_the_limit_and_the_control_follow_the_decisions(size):
    dense, model, ids, asked = build(), build_routed(), tokens(), {}
    measure, expected = evaluate.measure, dense(ids).logits
    args = evaluate.parse_arguments(["--new-tokens", "2", "--repeats", "2"])
    with mock.patch("evaluate.measure", lambda rows, *more: asked.update(rows) or measure(rows, *more)):
        cost = evaluate.compare_cost(dense, model, {"mindskip": {}, "mixed": MIXED}, ids, size, args)
    assert list(cost) == ["dense", "mindskip", "mindskip, removed", "mixed", "mixed, removed", "multiply"]
    for way in ("mindskip", "mixed"):
        limit = cost[f"{way}, removed"]
        assert limit["kv_kib"] == cost[way]["kv_kib"] < cost["dense"]["kv_kib"] == cost["multiply"]["kv_kib"]
        assert limit["keep"] == cost[way]["keep"] and limit["prefill_gflop"] == cost[way]["prefill_gflop"]
    assert cost["mixed"]["keep"] == pytest.approx(
        sum(gate.float().mean().item() for gate in MIXED.values()) / 3
    )
    assert cost["mixed"]["kept"] == {i: gate.float().mean() for i, gate in MIXED.items()}
    assert not cost["dense"]["kept"] and not cost["multiply"]["kept"]
    assert torch.equal(dense(ids).logits, expected)
    with fix_gates(model, MIXED):
        expected, multiplied = model(ids).logits, evaluate.multiplied(dense, MIXED)(ids).logits
    torch.testing.assert_close(multiplied, expected, atol=1e-5, rtol=1e-5)
    for (multiply, _), group in zip(asked["multiply"], ids.split(size)):
        torch.testing.assert_close(multiply(group).logits, model(group).logits, atol=1e-4, rtol=1e-4)
    if size == 1:  # where all rows agree, attention is removed from the very layers that are closed
        for way in ("mindskip", "mixed"):
            rows = zip(asked[way], asked[f"{way}, removed"], ids.split(1), strict=True)
            for (routed, gates), (limit, _), group in rows:
                with fix_gates(routed, gates):
                    expected = routed(group).logits
                torch.testing.assert_close(limit(group).logits, expected, atol=1e-4, rtol=1e-4)


def test_no_limit_is_given_where_layers_are_of_another_kind():
    args = evaluate.parse_arguments(["--new-tokens", "2", "--repeats", "2"])
    cost = evaluate.compare_cost(build("gemma2"), build_routed("gemma2"), {"mindskip": {}}, tokens(), 4, args)
    assert list(cost) == ["dense", "mindskip", "multiply"]


@torch.no_grad()
@pytest.mark.parametrize("gates", [CLOSED, dict.fromkeys(ROUTED, True), MIXED])
def test_decoding_waits_for_no_device(gates):
    """What asks for a tensor's value, or for a shape that depends on it, makes the processor wait for a GPU."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits.append(function.__name__)
            return function(*args, **(kwargs or {}))

    counts = []
    for model in (build(), build_routed()):
        with fix_gates(model, gates) if counts else nullcontext():
            cache, token = evaluate.prefill(model, tokens())
            waits = []
            with Waits():
                evaluate.decode(model, cache, token, 2)
        names = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select")
        counts.append(sum(any(name in wait for name in names) for wait in waits))
    assert counts[1] == counts[0] and len(waits) > 100


def test_what_if_times_a_model_of_which_only_the_configuration_is_there(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build().config.save_pretrained("model")
    arguments = [
        "--what-if",
        "--model",
        "model",
        "--prompt-length",
        "8,16",
        "--batch-size",
        "2",
        "--repeats",
        "2",
    ]
    evaluate.main(
        [*arguments, "--new-tokens", "2", "--keep", "0.5", "--layers", "2,4", "--dtype", "bfloat16"]
    )
    told, cost = (
        capfd.readouterr().out,
        json.loads((tmp_path / "runs/what-if/what-if.json").read_text())["cost"],
    )
    assert "random weights" in told and "cpu bfloat16" in told
    assert list(cost) == ["8 tokens, 2 at a time", "16 tokens, 2 at a time"]
    for rows in cost.values():
        assert set(rows) == {
            "dense",
            "multiply",
            *(f"rows {way}{end}" for way in ("agree", "differ") for end in ("", ", removed")),
        }
        for name, row in rows.items():
            assert row["keep"] == (1.0 if name in ("dense", "multiply") else 0.5)
            assert len(row["decode"]["all"]) == 2 and row["decode"]["speedup"] > 0
        assert rows["rows agree"]["kept"] == {"2": 0.0, "4": 1.0} and rows["rows differ"]["kept"] == {
            "2": 0.5,
            "4": 0.5,
        }


def test_closed_gates_save_the_operations_of_removed_attention():
    assert limit.operations_share() >= 0.98  # one addition for each closed layer is left


def test_long_prompts_are_long_and_of_one_task_each():
    data = [{"task": name, "ids": [i, i]} for i, name in enumerate("ab")]
    assert evaluate.long_prompts(data, 3, 5).tolist() == [[0] * 5, [1] * 5, [0] * 5]


def test_tables_are_aligned():
    rows = {"long": {"value": 1.0}, "x": {"value": 22.5}}
    assert evaluate.table("a", rows, {"bb": "{value:.1f}"}) == "a       bb\nlong   1.0\nx     22.5"


def test_evaluate_end_to_end(tmp_path):
    plot = ["--plot"] * (importlib.util.find_spec("matplotlib") is not None)  # the extra `plot`
    done = run("tune.py", "--steps", "3", "--batch-size", "16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(
        "evaluate.py", "--repeats", "2", "--prompt-length", "64", "--new-tokens", "2", *plot, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "demo" / "results.json").read_text())
    names = {"dense", "mindskip", "static, similarity", "static, best", "static, router", "random"}
    assert set(results["quality"]) == names and next(iter(results["quality"])) == "dense"
    for name in [*names, "multiply"]:
        assert any(line.startswith(name) for line in done.stdout.splitlines())
    assert results["quality"]["static, best"]["average"] >= results["quality"]["static, router"]["average"]
    assert abs(results["quality"]["mindskip"]["keep"] - 0.5) <= 0.02
    assert list(results["cost"]) == ["64 tokens, 1 at a time", "64 tokens, 8 at a time"]
    for cost in results["cost"].values():
        assert list(cost) == [
            "dense",
            "mindskip",
            "mindskip, removed",
            "static",
            "multiply",
        ]
        assert cost["dense"]["prefill_gflop"] > cost["mindskip"]["prefill_gflop"]
        assert cost["multiply"]["kv_kib"] == cost["dense"]["kv_kib"] > cost["static"]["kv_kib"]
    assert (tmp_path / "runs" / "demo" / "results.png").exists() == bool(plot)
