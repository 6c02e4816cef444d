"""Bad input: one line that names the value and the remedy, exit status 2, no traceback, and nothing written or lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build, build_routed, make_tokenizer, question_rows, save_checkpoint, save_rows
from safetensors.torch import load_file, save_file
from test_tune import ROOT

import evaluate
import mindskip
import tune


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model, data and routers, made once."""
    folder = tmp_path_factory.mktemp("originals")
    save_checkpoint(folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        save_rows(folder / "data" / f"{split}.jsonl", question_rows())
    mindskip.save_routers(build_routed(vocab_size=128), folder / "routers.safetensors")
    return folder


@pytest.fixture
def folder(originals, tmp_path, monkeypatch):
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def refused(main, arguments: list[str], folder: Path, capfd) -> str:
    """The one line in which a command ends."""
    before = tree(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capfd.readouterr().err
    assert stop.value.code == 2, error
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error, error
    assert tree(folder) == before
    return error


# ---- arguments and data of tune.py ----


def rows(*found):
    return lambda folder: save_rows(folder / "rows.jsonl", list(found))


def text(content: str, name: str = "rows.jsonl"):
    return lambda folder: (folder / name).write_text(content)


def edit_config(**changes):
    def edit(folder):
        path = folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_weights(change):
    def edit(folder):
        path = folder / "model" / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return edit


def without_chat_template(folder):
    make_tokenizer(chat_template=None).save_pretrained(folder / "model")
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)


def gpt2(folder):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=4, n_head=2, vocab_size=128, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")


def small_vocabulary(folder):
    build(vocab_size=12).save_pretrained(folder / "model")


def truncated(path: str):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:1000])


def pickled(folder):
    torch.save(load_file(folder / "model" / "model.safetensors"), folder / "model" / "pytorch_model.bin")
    (folder / "model" / "model.safetensors").unlink()


def used(folder):
    (folder / "runs" / "used").mkdir(parents=True)
    (folder / "runs" / "used" / "log.jsonl").write_text("precious\n")


def finished(folder):
    (folder / "runs" / "done").mkdir(parents=True)
    shutil.copy(folder / "routers.safetensors", folder / "runs" / "done")


def halfway(folder, arguments=None, **more):
    """A run that was stopped after three steps, on other data."""
    (folder / "runs" / "halfway").mkdir(parents=True)
    model = build_routed(vocab_size=128)
    state = {"exp_avg": torch.ones(1), "keep": torch.ones(1)} | more
    about = {"step": 3, "arguments": arguments or vars(tune.parse_arguments(["--layers", "2,3,4"]))}
    about["fingerprints"] = {"data": 1, "weights": 2}
    mindskip.save_routers(model, folder / "runs" / "halfway" / "routers.safetensors", state, **about)


def nothing(folder):
    pass


FILE = ["--dataset", "rows.jsonl"]
TUNE = {
    "capacity above 1": (["--capacity", "1.5"], nothing, "--capacity: 1.5: must be between 0 and 1"),
    "capacity below 0": (["--capacity", "-0.1"], nothing, "--capacity: -0.1: must be between 0 and 1"),
    "capacity that is no number": (["--capacity", "half"], nothing, "invalid float value: 'half'"),
    "layer 0": (["--layers", "0,3"], nothing, "never layer 0): got (0, 3)"),
    "a layer twice": (["--layers", "3,3"], nothing, "got (3, 3)"),
    "a layer out of range": (["--layers", "3,8"], nothing, "layers (3, 8): only the attention of layers [1, 2, 3, 4, 5] can be routed"),
    "layers that are no numbers": (["--layers", "all"], nothing, "invalid int value: 'all'"),
    "an unknown granularity": (["--granularity", "head-token"], nothing, "invalid choice: 'head-token'"),
    "no rank": (["--lora-rank", "0"], nothing, "--lora-rank: 0: must be between 1 and"),
    "adapters on a trained backbone": (["--lora-rank", "8", "--train", "all"], nothing, "--lora-rank 8: adapters need"),
    "something else to train": (["--train", "half"], nothing, "--train: invalid choice: 'half'"),
    "an infinite rate of the backbone": (["--backbone-lr", "inf"], nothing, "--backbone-lr: inf: must be between"),
    "an adapter that is not there": (["--adapter", "nowhere"], nothing, "--adapter nowhere: "),
    "no steps": (["--steps", "0"], nothing, "--steps: 0: must be between 1 and"),
    "an infinite learning rate": (["--lr", "inf"], nothing, "--lr: inf: must be"),
    "a learning rate that is no number": (["--lr", "nan"], nothing, "--lr: nan: must be"),
    "an unknown estimator": (["--estimator", "guess"], nothing, "--estimator: invalid choice: 'guess'"),
    "a negative weight": (["--logit-weight", "-1"], nothing, "--logit-weight: -1: must be"),
    "an empty batch": (["--batch-size", "0"], nothing, "--batch-size: 0: must be"),
    "an empty micro-batch": (["--micro-batch-size", "0"], nothing, "--micro-batch-size: 0: must be"),
    "no samples": (["--max-samples", "0"], nothing, "--max-samples: 0: must be"),
    "no length": (["--max-length", "1"], nothing, "--max-length: 1: must be between 2 and"),
    "an abbreviation": (["--cap", "0.5"], nothing, "unrecognized arguments: --cap"),
    "a path for a name": (["--name", "../elsewhere"], nothing, "must be the name of a folder in runs/"),
    "an unknown kind of attention": (["--attn-implementation", "fast"], nothing, '`attn_implementation="fast"` is not supported'),
    "a kind of attention that is not installed": (
        ["--attn-implementation", "flash_attention_2"], nothing, "FlashAttention2"),
    "no such model": (["--model", "nowhere"], nothing, "--model nowhere: no such folder"),
    "a folder without a model": (["--model", "data"], nothing, "config.json"),
    "a Hub id that cannot be had": (["--model", "some/model"], nothing, "some/model"),
    "a model whose layers cannot be routed": ([], gpt2, "only the attention of layers [] can be routed"),
    "a model that brings code": (
        [], edit_config(model_type="mine", auto_map={"AutoConfig": "my.Config"}), "`trust_remote_code=True`"),
    "a model of an unknown type": ([], edit_config(model_type="mine"), "mine"),
    "weights that are cut short": ([], truncated("model/model.safetensors"), "header"),
    "weights that are pickled": ([], pickled, "safetensors"),
    "weights that are not finite": (
        [], edit_weights(lambda weights: weights["model.norm.weight"].fill_(float("nan"))), "model.norm.weight is not"),
    "weights of which one is missing": (
        [], edit_weights(lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight")), "1 weights are missing"),
    "weights that the model does not know": (
        [], edit_weights(lambda weights: weights.update({"model.layers.3.self_attn.q_proj.bias": torch.ones(64)})),
        "1 weights are unexpected, among them model.layers.3.self_attn.q_proj.bias"),
    "more layers than the configuration says": (
        [], edit_config(num_hidden_layers=5, layer_types=None), "weights are unexpected, among them model.layers.5."),
    "examples longer than the model": (
        [], edit_config(max_position_embeddings=4), "--model model has 4 positions, not 14; lower --max-length"),
    "a revision of a folder": (["--revision", "main"], nothing, "--revision main is for a Hub id"),
    "text that is not UTF-8": (FILE, lambda folder: (folder / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}'), "--dataset rows.jsonl"),
    "an empty conversation": (FILE, rows({"messages": []}), "1 dropped: no prompt or answer left, or refused by the template)"),
    "a role that nobody has": (FILE, rows({"messages": [{"role": "?", "content": "a"}]}), "1 dropped: no prompt or answer left"),
    "a template with a mistake": (
        FILE, lambda folder: (rows({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})(folder),
        make_tokenizer(chat_template="{{ 1 / 0 }}").save_pretrained(folder / "model")), "row 0: cannot read messages: division by zero"),
    "weights of another shape": ([], edit_config(intermediate_size=80), "18 weights are mismatched"),
    "a configuration without sense": ([], edit_config(num_attention_heads=0), "--model model"),
    "a tokenizer file that is broken": ([], text('{"model": {"type": "WrdLevel"}}', "model/tokenizer.json"), "--model"),
    "a tokenizer of another model": ([], small_vocabulary, "--model model: the tokenizer gives token 36, but the model has 12"),
    "a seed that is too large": (["--seed", "99999999999"], nothing, "--seed: 99999999999: must be between 0 and"),
    "a learning rate without sense": (["--lr", "1e38"], nothing, "--lr: 1e38: must be"),
    "an instruction that is missing": (FILE, rows({"instruction": None, "output": "b"}), "row 0: cannot read"),
    "no name": (["--name", ""], nothing, "--name"),
    "the folder above": (["--name", ".."], nothing, "--name"),
    "no such dataset": (["--dataset", "nowhere"], nothing, "--dataset nowhere"),
    "no such file": (["--dataset", "rows.jsonl"], nothing, "No such file or directory: 'rows.jsonl'"),
    "no such split": (["--split", "dev"], nothing, 'Unknown split "dev"'),
    "no such configuration": (["--dataset-config", "hard"], nothing, "hard"),
    "an empty dataset": (FILE, text(""), "--dataset rows.jsonl, --split train: no examples"),
    "an empty split": (["--split", "train[:0]"], nothing, "--split train[:0]"),
    "other columns": (
        FILE, rows({"question": "a", "reply": "b"}), "found columns ['question', 'reply']; accepted are ["),
    "answers cut away entirely": (["--max-length", "4"], nothing, "40 dropped: no prompt or answer left"),
    "text that is a number": (FILE, rows({"prompt": 1, "answer": "2"}), "row 0: cannot read prompt, answer: "),
    "an answer that is missing": (FILE, rows({"prompt": "a", "answer": "b"}, {"prompt": "c"}), "row 1: cannot read"),
    "messages that are text": (FILE, rows({"messages": "hello"}), "row 0: cannot read messages"),
    "messages without a chat template": (
        FILE, lambda folder: (rows({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})(folder), without_chat_template(folder)), "chat template"),
    "JSON that is broken": (FILE, text('{"prompt": "a", "ans'), "Missing a closing quotation mark"),
    "Parquet that is none": (["--dataset", "rows.parquet"], text("PAR", "rows.parquet"), "--dataset rows.parquet"),
    "another kind of file": (["--dataset", "rows.txt"], text("a", "rows.txt"), "--dataset rows.txt"),
    "a used folder": (["--name", "used"], used, "choose another --name, --overwrite or --resume it"),
    "a file in place of the folder": (["--name", "x"], text("no folder", "runs"), "Not a directory: 'runs/x'"),
    "nothing to resume": (["--resume", "runs/nothing"], nothing, "runs/nothing"),
    "progress without its moments": (["--resume", "runs/halfway"], halfway, "its progress lacks {'exp_avg_sq'}"),
    "progress on other data": (
        ["--resume", "runs/halfway"], lambda folder: halfway(folder, exp_avg_sq=torch.ones(1)), "data or weights changed"),
    "another budget for a run that began": (["--resume", "runs/halfway", "--capacity", "0.25"],
        lambda folder: halfway(folder, exp_avg_sq=torch.ones(1)), "--resume runs/halfway: that run has {'capacity': 0.5}"),
    "another training for a run that began": (["--resume", "runs/halfway", "--train", "all"],
        lambda folder: halfway(folder, exp_avg_sq=torch.ones(1)), "--resume runs/halfway: that run has {'train': 'routers'}"),
    "progress of another version": (["--resume", "runs/halfway"],
        lambda folder: halfway(folder, exp_avg_sq=torch.ones(1), arguments={"layers": [2, 3, 4]}), "--resume runs/halfway: "),
    "a finished run to resume": (["--resume", "runs/done"], finished, "--resume runs/done: this run is finished"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(TUNE))
def test_tune_refuses(case, folder, capfd):
    arguments, prepare, message = TUNE[case]
    prepare(folder)
    assert message in refused(tune.main, ["--model", "model", "--dataset", "data", *arguments], folder, capfd)


def test_adapters_without_their_package(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = ["--model", "model", "--dataset", "data", "--lora-rank", "2"]
    assert "pip install -e '.[lora]'" in refused(tune.main, arguments, folder, capfd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "main, arguments", [(tune.main, []), (evaluate.main, ["--routers", "routers.safetensors"])]
)
def test_a_device_that_is_not_there(main, arguments, folder, capfd):
    arguments = ["--model", "model", "--dataset", "data", "--device", "cuda", *arguments]
    assert "--device cuda: not available here; use --device cpu" in refused(main, arguments, folder, capfd)


def test_device_map_without_accelerate(folder, capfd, monkeypatch):
    monkeypatch.setattr(transformers.integrations.accelerate, "is_accelerate_available", lambda: False)
    arguments = ["--model", "model", "--dataset", "data", "--device-map", "auto"]
    assert "accelerate" in refused(tune.main, arguments, folder, capfd)


def test_processes_that_do_not_divide_the_batch(folder, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    error = refused(tune.main, ["--model", "model", "--dataset", "data", "--batch-size", "16"], folder, capfd)
    assert "--batch-size 16: must be a multiple of the 3 processes" in error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(folder, capfd):
    (folder / "runs" / "full").mkdir(parents=True)
    (folder / "runs" / "full" / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stop:
        tune.main(["--model", "model", "--dataset", "data", "--name", "full", "--overwrite"])
    error = capfd.readouterr().err
    assert (
        stop.value.code == 2 and "No space left on device" in error and len(error.strip().splitlines()) == 1
    )


@pytest.mark.parametrize(
    "main, extra", [(tune.main, []), (evaluate.main, ["--routers", "routers.safetensors"])]
)
def test_a_read_only_disk(main, extra, folder, capfd, monkeypatch):
    def mkdir(path, *arguments, **options):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(tune.Path, "mkdir", mkdir)  # tests may run as root, whom no permission stops
    error = refused(main, ["--model", "model", "--dataset", "data", *extra], folder, capfd)
    assert "Read-only file system" in error


# ---- evaluate.py ----


def save_other(**changes):
    model = mindskip.add_mindskip(build(**{"vocab_size": 128, **changes}), mindskip.MindSkipConfig((2, 3, 4)))
    return lambda folder: mindskip.save_routers(model, folder / "routers.safetensors")


def foreign(folder):
    build().save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "routers.safetensors")


def pickled_routers(folder):
    torch.save({"layers.2.router.weight": torch.ones(64)}, folder / "routers.safetensors")


def edit_routers(change):
    def edit(folder):
        path = folder / "routers.safetensors"
        with mindskip.safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return edit


def not_finite(tensors, metadata):
    tensors["layers.3.router.weight"][5] = float("inf")


def one_missing(tensors, metadata):
    del tensors["layers.3.router.weight"]


def one_short(tensors, metadata):
    tensors["layers.3.router.weight"] = torch.ones(1)  # would broadcast


def broken_metadata(tensors, metadata):
    metadata["mindskip"] = metadata["mindskip"].replace(
        '"granularity": "attention-sequence"', '"granularity": "mlp"'
    )


def no_such_layer(tensors, metadata):
    metadata["mindskip"] = metadata["mindskip"].replace("[2, 3, 4]", "[2, 3, 77]")
    tensors["layers.77.router.weight"] = tensors.pop("layers.4.router.weight")


EVALUATE = {
    "routers of a layer that is not there": ([], edit_routers(no_such_layer), "layers (2, 3, 77)"),
    "no routers": (["--routers", "nowhere"], nothing, "--routers nowhere: no such file"),
    "no such file": (["--routers", "runs/x.safetensors"], nothing, "no such file, and not a Hub id"),
    "a run that is not there": (["--routers", "runs/nope"], halfway, "--routers runs/nope: no such file"),
    "routers on a Hub that cannot be had": (["--routers", "some/routers"], nothing, "some/routers"),
    "a truncated routers file": ([], truncated("routers.safetensors"), "holds no MindSkip routers"),
    "a foreign safetensors file": ([], foreign, "holds no MindSkip routers"),
    "a pickled file": ([], pickled_routers, "holds no MindSkip routers"),
    "routers that are not finite": ([], edit_routers(not_finite), "a router is not finite"),
    "metadata that is null": ([], edit_routers(lambda _, metadata: metadata.update(mindskip="null")), "holds no MindSkip routers"),
    "metadata that is nested": (
        [], edit_routers(lambda _, metadata: metadata.update(mindskip="[" * 100_000)), "holds no MindSkip routers"),
    "timed prompts longer than the model": (["--prompt-length", "250"], nothing, "--model model has 256 positions, not 258; lower"),
    "shots without tasks": (["--num-fewshot", "5"], nothing, "--tasks None: name tasks"),
    "a limit without tasks": (["--task-limit", "5"], nothing, "--tasks None: name tasks"),
    "no tasks": (["--tasks", ""], nothing, "--tasks : name tasks"),
    "a router that is missing": ([], edit_routers(one_missing), "layers.3.router.weight"),
    "a router of another length": ([], edit_routers(one_short), "or not of 64 weights"),
    "a granularity of another kind": ([], edit_routers(broken_metadata), "granularity must be"),
    "routers of another width": ([], save_other(hidden_size=32), "'hidden_size': 32"),
    "routers of another depth": ([], save_other(num_hidden_layers=8), "'num_hidden_layers': 8"),
    "routers of another type": ([], save_other(family="qwen3"), "'model_type': 'qwen3'"),
    "too few repeats": (["--repeats", "1"], nothing, "--repeats: 1: must be between 2 and"),
    "no prompt": (["--prompt-length", "0"], nothing, "--prompt-length: 0: must be"),
    "no micro-batch": (["--micro-batch-size", "0"], nothing, "--micro-batch-size: 0: must be"),
    "a budget above 1": (["--capacity", "0.5,2"], nothing, "--capacity: 0.5,2: must be between 0 and 1"),
    "nothing to explain": (["--explain", ""], nothing, "--explain: an empty prompt"),
    "two runs at a time": (["--capacity", "0.5", "--explain", "a"], nothing, "argument --explain: not allowed with argument --capacity"),
    "no such split": (["--split", "dev"], nothing, 'Unknown split "dev"'),
    "no such calibration split": (["--calibration-split", "dev"], nothing, "--calibration-split dev: Unknown split"),
    "an output folder that is a file": (["--output", "routers.safetensors"], nothing, "routers.safetensors"),
    "negative shots": (["--num-fewshot", "-1"], nothing, "--num-fewshot: -1: must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(EVALUATE))
def test_evaluate_refuses(case, folder, capfd):
    arguments, prepare, message = EVALUATE[case]
    prepare(folder)
    arguments = [
        "--model",
        "model",
        "--dataset",
        "data",
        "--routers",
        "routers.safetensors",
        "--prompt-length",
        "64",
        *arguments,
    ]
    assert message in refused(evaluate.main, arguments, folder, capfd)


@pytest.mark.parametrize("option, package", [(["--tasks", "boolq"], "lm_eval"), (["--plot"], "matplotlib")])
def test_an_extra_that_is_not_installed(option, package, folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    arguments = ["--model", "model", "--dataset", "data", "--routers", "routers.safetensors", *option]
    assert "pip install -e" in refused(evaluate.main, arguments, folder, capfd)


@pytest.mark.parametrize(
    "task, message",
    [
        ("boolqq", "--tasks boolqq: "),
        ("several", "a group without a metric"),
        ("repeat", "--tasks repeat: {'generate_until'} is not supported"),
    ],
)
def test_tasks_that_cannot_be_scored(task, message, folder, capfd):
    pytest.importorskip("lm_eval", reason="needs the extra `tasks`")
    save_rows(folder / "sums.jsonl", [{"question": "1+1=", "choices": ["2", "3"], "label": 0}])
    arguments = ["--model", "model", "--dataset", "data", "--routers", "routers.safetensors"]
    arguments += ["--tasks", task, "--include-path", str(Path(__file__).parent / "tasks")]
    assert message in refused(evaluate.main, arguments, folder, capfd)


def outcome(folder, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)


def small_run(folder, *more) -> list[str]:
    arguments = ["--model", "model", "--dataset", "data", "--steps", "3", "--layers", "2,3", *more]
    tune.main(arguments)
    return [
        "--model",
        "model",
        "--dataset",
        "data",
        "--routers",
        "runs/demo",
        "--repeats",
        "2",
        "--prompt-length",
        "9",
    ]


def test_logits_that_are_not_finite_stop_the_evaluation(folder, capfd, monkeypatch):
    arguments, score = small_run(folder), tune.score

    def scored(model, examples):
        nats, correct = score(model, examples)
        return nats.masked_fill(torch.tensor([one["ids"] == row for one in examples]), float("nan")), correct

    row = tune.load_examples(tune.parse_arguments(arguments[:4]), "--split", make_tokenizer())[0][7]["ids"]
    monkeypatch.setattr(tune, "score", scored)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2 and "the loss of examples [7] is not finite" in capfd.readouterr().err
    assert not (folder / "runs" / "demo" / "results.json").exists()


def test_a_budget_that_is_missed_and_routers_of_another_model_are_told(folder, capfd):
    arguments = small_run(folder, "--lr", "0", "--capacity", "0.5")
    assert "WARNING: 1.00 of the gates are open, not 0.5" in capfd.readouterr().out
    shutil.copytree(folder / "model", folder / "copy")
    evaluate.main(["--model", "copy", *arguments[2:]])
    assert "WARNING: these routers were tuned on model" in capfd.readouterr().out


@pytest.mark.parametrize("more", [["--explain", "1+é="], ["--capacity", "0.5"]])
def test_routers_of_an_unfinished_run_and_unknown_letters_are_told(more, folder, capfd):
    halfway(folder)
    arguments = ["--model", "model", "--dataset", "data", "--routers", "runs/halfway"]
    evaluate.main([*arguments, *more])
    told = capfd.readouterr().out
    assert "UNFINISHED: routers of step 3, not calibrated" in told
    assert ("does not know all of '1+é='" in told) == ("--explain" in more)


def test_one_example_of_a_task_has_no_standard_error(folder, capfd):
    save_rows(
        folder / "data" / "test.jsonl", question_rows(11)
    )  # 0 to 3 have one digit, 4 to 9 two, 10 three
    evaluate.main(small_run(folder))
    row = json.loads((folder / "runs" / "demo" / "results.json").read_text())["quality"]["mindskip"]
    assert row["standard_error"] is None and row["paired_standard_error"] is None and row["average"] >= 0
    assert " - " in capfd.readouterr().out


def test_a_second_run_of_the_same_name_is_refused_while_the_first_lives(folder, capfd):
    small_run(folder)
    lock = tune.FileLock(folder / "runs" / "demo" / "lock")
    with lock, pytest.raises(SystemExit):
        small_run(folder, "--overwrite")
    assert "another run writes there" in capfd.readouterr().err
    small_run(folder, "--overwrite")


def test_torchrun_without_its_variables_deletes_nothing(folder, capfd, monkeypatch):
    small_run(folder)
    before = tree(folder)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        small_run(folder, "--overwrite")
    assert "WORLD_SIZE" in capfd.readouterr().err and tree(folder) == before


def test_no_memory_on_a_cpu_is_one_line(folder, capfd, monkeypatch):
    monkeypatch.setattr(tune, "tune", lambda *arguments: torch.empty(2**60))
    with pytest.raises(SystemExit) as stop:
        small_run(folder)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "out of memory" in error and len(error.strip().splitlines()) == 1


def test_another_failure_that_speaks_of_memory_is_not_called_so(folder, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "tune", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        small_run(folder)


def test_moments_that_are_not_finite_leave_the_routers_alone(tmp_path):
    model, path = build_routed(), tmp_path / "routers.safetensors"
    mindskip.save_routers(model, path)
    before = path.read_bytes()
    model_after = build_routed()
    state = {name: torch.full((3, 64), float("nan")) for name in ("exp_avg", "exp_avg_sq")} | {
        "keep": torch.ones(1)
    }
    examples = [{"task": "all", "ids": [1, 5, 6, 7], "prompt": 2}] * 16
    args = tune.parse_arguments(["--steps", "3", "--batch-size", "4"])
    with pytest.raises(ValueError, match="finite"):
        tune.tune(
            model_after, examples, args, 1, state, lambda *step: mindskip.save_routers(model_after, path)
        )
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / "x.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="x: .*No space left"):
        mindskip.write(b"data", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_names_that_a_terminal_does_not_know(folder):
    for split in ("train", "test"):
        save_rows(folder / "data" / f"{split}.jsonl", [{**row, "task": "größe"} for row in question_rows()])
    arguments = small_run(folder)
    done = outcome(folder, ROOT / "evaluate.py", *arguments, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "gr??e" in done.stdout, done.stderr


def test_a_reader_that_stops_reading(folder):
    arguments = " ".join(["--model", "model", "--dataset", "data", "--steps", "30"])
    done = outcome(folder, "-c", "", env=os.environ)  # python starts at all
    assert done.returncode == 0
    shell = f"{sys.executable} {ROOT / 'tune.py'} {arguments} | head -n 1"
    done = subprocess.run(shell, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.stdout.startswith("model model") and not done.stderr


ITSELF = {  # what libraries may tell beside an error shows only here, where nothing captures their loggers
    "tune.py": (
        ["--model", "model"],
        edit_weights(lambda weights: weights.popitem()),
        "1 weights are missing",
    ),
    "evaluate.py": (["--routers", "none"], nothing, "--routers none: no such file"),
}


@pytest.mark.parametrize("script", list(ITSELF))
def test_the_command_itself_ends_so(script, folder):
    arguments, prepare, message = ITSELF[script]
    prepare(folder)
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and not done.stdout
    assert message in done.stderr
