"""The paper's other tables, on the demo. Each takes minutes; figures and JSON go to runs/paper.

    python tests/paper.py granularities    # attention, MLP or block; a gate for each sequence or each token
    python tests/paper.py training         # Router-Tuning, adapters, and Mixture of Depths: what each forgets
    python tests/paper.py curve            # one router, many budgets, beside static and random gates
    python tests/paper.py ablations        # weights, layers, pooling, examples

The first three are measured on the test split, with settings that were not chosen on it; ablations on examples of
neither split (see seeds.py).
"""

import argparse
import io
import random
import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from seeds import development_examples, tuned  # noqa: E402

import evaluate  # noqa: E402
import mindskip  # noqa: E402
import tune  # noqa: E402

LEFT_OUT = ("find", "yek")  # of tuning, in the table of training


def load(split: str, *flags: str) -> list[dict]:
    args = tune.parse_arguments(["--split", split, *flags])
    return tune.load_examples(args, "--split", AutoTokenizer.from_pretrained(args.model))[0]


def summary_of(model, layers, examples: list[dict]) -> dict:
    """Accuracy under routers, compared with all gates open."""
    every = dict.fromkeys(layers, True)
    dense = evaluate.score_all(model, examples, every)
    return evaluate.summarize(evaluate.score_all(model, examples, {}), dense, examples, len(layers)) | {
        "dense": evaluate.summarize(dense, dense, examples, len(layers))
    }


def cost_of(granularity: str, test: list[dict]) -> dict:
    """Speedup and KV cache with half of the gates closed: layer 1's, for one prompt of 512 tokens at a time."""
    args = evaluate.parse_arguments(["--repeats", "25"])
    dense = tune.load_model(args, test)
    routed = mindskip.add_mindskip(evaluate.copied(dense), mindskip.MindSkipConfig((1, 2), granularity))
    gates = {1: torch.zeros(8, dtype=torch.bool), 2: torch.ones(8, dtype=torch.bool)}
    prompts = evaluate.long_prompts(test, 8, 512)
    cost = evaluate.compare_cost(dense, routed, {"half": gates}, prompts, 1, args)
    found = {f"{phase} x": cost["half"][phase]["speedup"] for phase in ("prefill", "decode")}
    return found | {"kv": cost["half"]["kv_kib"] / cost["dense"]["kv_kib"]}


def granularities(seeds: list[int]) -> dict:
    """The six rows of the paper's table: accuracy, keep ratio, time and KV cache."""
    train, test, rows = load("train"), load("test"), {}
    costs = {granularity: cost_of(granularity, test) for granularity in mindskip.GRANULARITIES}
    for granularity, cost in costs.items():
        found = []
        for seed in seeds:
            args = tune.parse_arguments(["--granularity", granularity, "--seed", str(seed)])
            found.append(summary_of(*tuned(args, train), test))
            print(granularity, seed, f"{found[-1]['average']:.2f}", flush=True)
        rows.setdefault("dense", found[0]["dense"] | {"prefill x": 1, "decode x": 1, "kv": 1})
        rows["dense"]["least"] = rows["dense"]["average"]
        averages = [one["average"] for one in found]
        rows[granularity] = cost | {
            "average": statistics.mean(averages),
            "least": min(averages),
            "by_task": [statistics.mean(values) for values in zip(*(one["by_task"] for one in found))],
            "keep": statistics.mean(one["keep"] for one in found),
        }
    tasks = {name: f"{{by_task[{k}]:.1f}}" for k, name in enumerate(rows["dense"]["accuracy"])}
    columns = {"average": "{average:.2f}", "least": "{least:.2f}", "keep": "{keep:.2f}", "KV": "{kv:.2f}"}
    columns |= {name: f"{{{name}:.2f}}" for name in ("prefill x", "decode x")}
    print(evaluate.table("accuracy %", rows, tasks | columns))
    print(f"seeds {seeds}; x and KV: half of the gates closed, one prompt of 512 tokens at a time")
    return rows


TRAINED = {
    "routers (Router-Tuning)": [],
    "routers, straight-through": ["--estimator", "straight-through"],
    "routers and adapters": ["--lora-rank", "8"],
    "all": ["--train", "all"],
    "all, block-token (Mixture of Depths)": ["--train", "all", "--granularity", "block-token"],
}


def step_of(flags: list[str], train: list[dict]) -> dict:
    """Parameters trained, milliseconds of a step, and most MiB beyond the weights in one."""
    args = tune.parse_arguments([*flags, "--steps", "40"])
    model, ends = tune.load_model(args, train), []
    tune.add_trained(model, args)
    tune.tune(model, train, args, report=lambda *_: ends.append(time.perf_counter()))
    args.steps = 1
    with evaluate.Watch() as watch:
        tune.tune(model, train, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = 1e3 * statistics.median(end - start for start, end in zip(ends, ends[1:]))
    return {"trained": trained, "step": step, "peak": watch.peak_bytes / 2**20}


def training(seeds: list[int]) -> dict:
    """What is trained, on six tasks: memory, time, and accuracy on these and on the two left out."""
    train = [one for one in load("train") if one["task"] not in LEFT_OUT]
    test, rows = load("test"), {name: step_of(flags, train) for name, flags in TRAINED.items()}
    for name, flags in TRAINED.items():
        six, two, opened, keep = [], [], [], []
        for seed in seeds:
            found = summary_of(*tuned(tune.parse_arguments([*flags, "--seed", str(seed)]), train), test)
            six.append(statistics.mean(v for task, v in found["accuracy"].items() if task not in LEFT_OUT))
            two.append(statistics.mean(found["accuracy"][task] for task in LEFT_OUT))
            opened.append(statistics.mean(found["dense"]["accuracy"][task] for task in LEFT_OUT))
            keep.append(found["keep"])
            print(name, seed, f"six {six[-1]:.2f} two {two[-1]:.2f} open {opened[-1]:.2f}", flush=True)
        means = {"six": six, "two": two, "open": opened, "keep": keep}
        rows[name] |= {key: statistics.mean(values) for key, values in means.items()}
    columns = {"trained": "{trained:,}", "peak MiB": "{peak:.0f}", "ms a step": "{step:.0f}"}
    columns |= {"six tasks %": "{six:.2f}", "two left out %": "{two:.2f}", "gates open": "{open:.2f}"}
    print(evaluate.table("trained", rows, columns | {"keep": "{keep:.2f}"}))
    print(f"left out: {LEFT_OUT}; gates open: accuracy on those with every gate open; seeds {seeds}")
    return rows


def deciding(model, gates: dict[int, bool]):
    """A copy whose routers, of zeros with scores of 0.5, run and decide as told: by a threshold of 0 or 1."""
    model = evaluate.copied(model)
    for router in mindskip.routers(model):
        router.config = replace(router.config, threshold=float(not gates[router.layer]))
    return model


@torch.no_grad()
def curve(seeds: list[int]) -> dict:
    """Routers tuned once, for 0.5; the threshold of every other budget is calibrated on training data.

    Time is that of long prompts, one at a time, with the gates that one short prompt of each task got: an example
    of the demo has 20 tokens, of which no machine's clock can tell what is saved.
    """
    train, test, rows, ways = load("train"), load("test"), {}, {}
    args = evaluate.parse_arguments(["--repeats", "7"])
    chosen_train = random.Random(0).sample(train, tune.CALIBRATION)
    first = list({one["task"]: one for one in reversed(test)}.values())  # an example of each task
    for seed in seeds:
        with torch.enable_grad():
            model, layers = tuned(tune.parse_arguments(["--seed", str(seed)]), train)
        path = Path("runs/paper", f"curve{seed}.safetensors")
        mindskip.save_routers(model, path)
        for capacity in (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0):
            layers, others = evaluate.attach(model, path, capacity, chosen_train)
            with redirect_stdout(io.StringIO()):  # its tables
                found = evaluate.compare_quality(model, layers, others, chosen_train, test, args)
            quality, chosen = found["quality"], found["static_layers"]
            # (tasks, layers), where every layer but the first has a router
            found = evaluate.score_all(model, first, others)["gates"] > 0
            every, keep = [router.layer for router in mindskip.routers(model)], quality["mindskip"]["keep"]
            drawn = torch.rand(len(first), len(layers)) < keep
            static = {i: i not in chosen["best"] for i in layers}
            gates = {"mindskip": [{i: row[every.index(i)].item() for i in layers} for row in found]}
            gates["static, best"] = [static] * len(first)
            gates["random"] = [dict(zip(layers, row)) for row in drawn.tolist()]
            mindskip.remove_mindskip(model)
            for name, row in quality.items():
                tokens = statistics.mean(one["prompt"] for one in first)
                flops = partial(evaluate.forward_flops, model, tokens, tokens)
                share = flops(dict.fromkeys(layers, row["keep"])) / flops({})
                at = {"accuracy": row["average"], "keep": row["keep"], "flops": share, "time": None}
                rows.setdefault(name, {}).setdefault(str(capacity), []).append(at)
                if name in gates:
                    ways[name, str(capacity), len(rows[name][str(capacity)]) - 1] = gates[name]
            told = {name: round(row["average"], 2) for name, row in quality.items()}
            print(seed, capacity, told, flush=True)
    dense = evaluate.copied(model)
    routed = mindskip.add_mindskip(model, mindskip.MindSkipConfig(layers))
    timed = {"dense": [(dense, {})] * len(first)}
    for at, gates in ways.items():  # only ours has routers that run
        timed[at] = [(deciding(routed, one), {}) if at[0] == "mindskip" else (routed, one) for one in gates]
    prompts = evaluate.long_prompts(test, len(first), 512).split(1)
    for at, row in evaluate.measure(timed, prompts, 1, args.repeats).items():
        if at != "dense":
            rows[at[0]][at[1]][at[2]]["time"] = 1 / row["prefill"]["speedup"]
    told = {
        f"{name}, {capacity}": {key: [at[key] for at in found] for key in found[0]}
        for name, by_capacity in rows.items()
        if name != "dense"
        for capacity, found in by_capacity.items()
    }
    for row in told.values():
        row["mean"], row["spread"] = statistics.mean(row["accuracy"]), statistics.pstdev(row["accuracy"])
        row["share"], row["at"] = statistics.mean(row["flops"]), statistics.mean(row["keep"])
        row["x"] = statistics.mean(row["time"]) if None not in row["time"] else float("nan")
    columns = {"mean": "{mean:.2f}", "spread": "{spread:.2f}", "keep": "{at:.2f}"}
    print(evaluate.table("accuracy %", told, columns | {"FLOP": "{share:.3f}", "time": "{x:.2f}"}))
    print(f"seeds {seeds}; dense: 1; FLOP of the examples, time of prompts of 512 tokens, one at a time")
    plot(rows, Path("runs/paper/curve"))
    return rows


def plot(rows: dict, path: Path) -> None:
    """Accuracy against FLOPs and against measured time; bars: spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    names = {"flops": "FLOPs of prefill (dense: 1)", "time": "time of prefill, 512 tokens (dense: 1)"}
    for axis, (key, label) in zip(axes, names.items()):
        for k, (name, by_capacity) in enumerate(rows.items()):
            found = [one for one in by_capacity.values() if one[0][key] is not None]
            if name != "dense" and found:
                xs = [statistics.mean(at[key] for at in one) for one in found]
                ys = [statistics.mean(at["accuracy"] for at in one) for one in found]
                bars = [statistics.pstdev(at["accuracy"] for at in one) for one in found]
                axis.errorbar(xs, ys, bars, marker="o", capsize=3, label=name, alpha=0.8, color=f"C{k}")
        axis.set(xlabel=label, ylabel="accuracy on the test split (%)")
        axis.axhline(100, color="grey", linewidth=0.5)
    axes[0].legend()
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150)


def ablations(seeds: list[int]) -> dict:
    """One change at a time, on examples of neither split: accuracy by mean and least, and keep ratio."""
    settings = {
        "the default": [],
        "sparsity weight 0": ["--sparsity-weight", "0"],
        "sparsity weight 0.03": ["--sparsity-weight", "0.03"],
        "sparsity weight 3": ["--sparsity-weight", "3"],
        "layer 1 alone, capacity 0.5": ["--layers", "1"],
        "layer 2 alone (deeper), capacity 0.5": ["--layers", "2"],
        "layers 1, 2 and 3, capacity 0.5": ["--layers", "1,2,3"],
        "last token in place of the mean": [],
        "64 examples": ["--max-samples", "64"],
        "256 examples": ["--max-samples", "256"],
        "1,024 examples": ["--max-samples", "1024"],
    }
    tokenizer = AutoTokenizer.from_pretrained(tune.DEMO)
    held_out, rows, forward = development_examples(tokenizer, load("train"), 150), {}, mindskip.Router.forward
    for name, flags in settings.items():
        train, found = load("train", *(flags if "--max-samples" in flags else ())), []
        if name.startswith("last token"):
            mindskip.Router.forward = lambda self, x, voters: forward(
                self, x, voters & (voters.flip(1).cumsum(1).flip(1) == 1)
            )
        for seed in seeds:
            found.append(
                summary_of(*tuned(tune.parse_arguments([*flags, "--seed", str(seed)]), train), held_out)
            )
            print(name, seed, f"{found[-1]['average']:.2f} keep {found[-1]['keep']:.2f}", flush=True)
        mindskip.Router.forward = forward
        averages = [one["average"] for one in found]
        rows[name] = {"mean": statistics.mean(averages), "least": min(averages), "found": found}
        rows[name]["keep"] = statistics.mean(one["keep"] for one in found)
        rows[name]["skipped"] = (1 - rows[name]["keep"]) * len(
            flags[1].split(",") if "--layers" in flags else "12"
        )
    columns = {"mean": "{mean:.2f}", "least": "{least:.2f}", "keep": "{keep:.2f}", "skipped": "{skipped:.2f}"}
    print(evaluate.table("accuracy %", rows, columns))
    print(f"skipped: attention sublayers of each prompt; dense has {len(range(4))}; seeds {seeds}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=["granularities", "training", "curve", "ablations"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    Path("runs/paper").mkdir(parents=True, exist_ok=True)
    made = globals()[arguments.what](arguments.seeds)
    evaluate.write_json(made, Path("runs/paper", f"{arguments.what}.json"))
