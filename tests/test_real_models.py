"""Real checkpoints: families, Hub ids, dtypes and devices, through the commands that a user types."""

import hashlib
import importlib.util
import json
import shutil

import huggingface_hub.constants
import pytest
import torch
import transformers
from conftest import FAMILIES, MORE, build_routed, question_rows, save_checkpoint, save_rows
from safetensors.torch import load_file, save_file
from test_tune import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import tune
from mindskip import load_routers, read_routers, router_parameters, routers, save_routers

TUNE = ["--steps", "3", "--batch-size", "8", "--max-samples", "16"]
EVALUATE = [
    "--repeats",
    "2",
    "--prompt-length",
    "16",
    "--new-tokens",
    "2",
    "--batch-size",
    "2",
    "--max-samples",
    "12",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        save_rows(tmp_path / "data" / f"{split}.jsonl", question_rows())
    return tmp_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub with what `publish(owner/name, folder)` puts there, as a download would leave it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"

    def publish(name: str, source, ref: str = "main") -> str:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / ref).write_text(commit)
        return name

    publish.commit = commit
    return publish


def digest(folder) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_family_through_tune_save_load_generate_and_evaluate(family, folder):
    model_name = save_checkpoint(folder / "model", family)
    before = digest(folder / "model")
    arguments = ["--model", model_name, "--dataset", str(folder / "data")]
    tune.main([*arguments, *TUNE, "--name", "tiny"])
    assert digest(folder / "model") == before

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_name),
        AutoTokenizer.from_pretrained(model_name),
    )
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_routers(model, "runs/tiny/routers.safetensors")
    assert all(weight.abs().max() > 0 for weight in router_parameters(model))
    assert len(router_parameters(model)) == (2 if family == "lfm2" else 3)  # of 5 layers with attention, of 6
    state = model.state_dict()  # a mixture's own routers among it: untouched
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.items())
    batch = tokenizer(["1+2=", "20+401="], return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for text, row in zip(["1+2=", "20+401="], together):
        alone = tokenizer(text, return_tensors="pt")
        expected = model.generate(**alone, max_new_tokens=6, do_sample=False)[
            0, alone["input_ids"].shape[1] :
        ]
        found = row[batch["input_ids"].shape[1] :]
        assert found[: len(expected)].tolist() == expected.tolist()

    evaluate.main([*arguments, *EVALUATE, "--routers", "runs/tiny/routers.safetensors"])
    results = json.loads((folder / "runs" / "tiny" / "results.json").read_text())
    assert all(cost["dense"]["prefill_gflop"] > 0 for cost in results["cost"].values())
    assert 0 < results["quality"]["mindskip"]["keep"] < 1


def test_a_model_from_the_hub_and_what_the_routers_tell_of_it(folder, hub):
    save_checkpoint(folder / "model")
    name = hub("someone/tiny", folder / "model", ref="v2")
    arguments = ["--model", name, "--revision", "v2", "--dataset", str(folder / "data")]
    tune.main([*arguments, *TUNE, "--name", "tiny", "--capacity", "0.25"])
    path = folder / "runs" / "tiny" / "routers.safetensors"
    described, _ = read_routers(path)
    assert described["about"]["base_model"] == name and described["about"]["revision"] == hub.commit
    assert described["about"]["keep_ratio"] == pytest.approx(0.25, abs=0.02)
    assert described["about"]["versions"] == {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    config = described["config"]
    assert (config.granularity, config.layers, config.capacity) == ("attention-sequence", (2, 3, 4), 0.25)
    assert 0 < config.threshold < 1
    (folder / "upload").mkdir()
    shutil.copy(path, folder / "upload")
    evaluate.main([*arguments, *EVALUATE, "--routers", hub("someone/tiny-routers", folder / "upload")])
    assert (folder / "runs" / "tiny-routers" / "results.json").is_file()


def test_routers_load_from_a_hub_id_a_folder_and_a_file(folder, hub):
    (folder / "mine").mkdir()
    model = build_routed()
    save_routers(model, folder / "mine" / "routers.safetensors")
    for source in (
        hub("someone/routers", folder / "mine"),
        folder / "mine",
        folder / "mine" / "routers.safetensors",
    ):
        loaded = load_routers(transformers.AutoModelForCausalLM.from_config(model.config), source)
        assert all(torch.equal(a, b) for a, b in zip(router_parameters(loaded), router_parameters(model)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_backbones_get_float32_routers(dtype, folder):
    arguments = [
        "--model",
        save_checkpoint(folder / "model"),
        "--dataset",
        str(folder / "data"),
        "--dtype",
        dtype,
    ]
    tune.main([*arguments, *TUNE, "--name", "low", "--gradient-checkpointing", "--micro-batch-size", "3"])
    weights = load_file(folder / "runs" / "low" / "routers.safetensors").values()
    assert all(weight.dtype == torch.float32 and weight.abs().max() > 0 for weight in weights)
    evaluate.main([*arguments, *EVALUATE, "--routers", "runs/low"])


def test_attention_implementations_decide_alike(folder):
    model_name = save_checkpoint(folder / "model")
    for kind in ("eager", "sdpa"):
        tune.main(
            [
                "--model",
                model_name,
                "--dataset",
                str(folder / "data"),
                *TUNE,
                "--name",
                kind,
                "--attn-implementation",
                kind,
            ]
        )
        assert load_model(model_name, attn_implementation=kind).config._attn_implementation == kind
    one, two = (load_file(folder / "runs" / kind / "routers.safetensors") for kind in ("eager", "sdpa"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs the extra `accelerate`")
def test_device_map_gives_the_routers_that_one_device_does(folder):
    arguments = ["--model", save_checkpoint(folder / "model"), "--dataset", str(folder / "data"), *TUNE]
    tune.main([*arguments, "--name", "one"])
    tune.main([*arguments, "--name", "spread", "--device-map", "auto"])
    one, two = (load_file(folder / "runs" / name / "routers.safetensors") for name in ("one", "spread"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    model = load_routers(load_model(arguments[1], device_map="auto"), "runs/one")
    for router in routers(model):
        assert router.weight.device == model.model.layers[router.layer].self_attn.o_proj.weight.device


def test_only_safetensors_are_read(folder):
    save_checkpoint(folder / "model")
    torch.save(load_file(folder / "model" / "model.safetensors"), folder / "model" / "pytorch_model.bin")
    (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_model(folder / "model")


def test_weights_that_are_not_finite_are_refused(folder):
    save_checkpoint(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight is not finite"):
        load_model(folder / "model")


def test_tasks_may_have_any_name(folder, capsys):
    names = ["1", "a]b", "{x}", "two words: 2!"]
    rows = [{**row, "task": names[i % 4]} for i, row in enumerate(question_rows())]
    save_rows(folder / "data" / "test.jsonl", rows)
    save_routers(build_routed(vocab_size=128), folder / "routers.safetensors")
    arguments = ["--model", save_checkpoint(folder / "model"), "--dataset", str(folder / "data")]
    evaluate.main([*arguments, *EVALUATE[:-2], "--routers", "routers.safetensors"])
    results, printed = json.loads((folder / "results.json").read_text()), capsys.readouterr().out
    for name in names:
        assert name in results["quality"]["mindskip"]["accuracy"] and name in printed
