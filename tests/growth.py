"""How saving, and what routing itself costs, grow: with prompts, rows, routed layers and examples.

    python tests/growth.py      # one thread, some minutes; tests/growth.png with the extra `plot`

On the random Llama of tests/limit.py (width 512, 8 layers); the time of tuning on the demo.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from limit import limit_model  # noqa: E402

import evaluate  # noqa: E402
import tune  # noqa: E402
from mindskip import MindSkipConfig, add_mindskip  # noqa: E402

LENGTHS, EXAMPLES = {1: (128, 512, 1024, 2048, 4096), 4: (128, 512, 1024)}, (64, 256, 1024)


def saving(args) -> dict[str, dict]:
    """Half of the gates of 4 of 8 layers closed: speedup and bytes, by length of the prompt and rows."""
    dense, layers = limit_model()
    routed, rows = add_mindskip(evaluate.copied(dense), MindSkipConfig(layers)), {}
    for size, lengths in LENGTHS.items():
        for length in lengths:
            ways = {"agree": {i: torch.full((size,), k % 2 == 0) for k, i in enumerate(layers)}}
            if size > 1:
                ways["differ"] = {i: torch.arange(size) % 2 == k % 2 for k, i in enumerate(layers)}
            prompts = torch.arange(size * length).remainder(2000).view(size, length)
            cost = evaluate.compare_cost(dense, routed, ways, prompts, size, args)
            for way in ways:
                name = f"{size} rows of {length:,}" + (f", {way}" if size > 1 else "")
                rows[name] = cost[way] | {
                    "dense_kv": cost["dense"]["kv_kib"] / 1024,
                    "kv": cost[way]["kv_kib"] / 1024,
                }
                rows[name] |= {"size": size, "length": length, "way": way}
    return rows


def routing(args) -> dict[str, dict]:
    """Every gate open, decided by routers: what deciding costs, by the number of routed layers."""
    dense, _ = limit_model()
    rows = {"dense": [(dense, {})]}
    for count in (1, 2, 4, 7):
        routed = add_mindskip(evaluate.copied(dense), MindSkipConfig(tuple(range(8 - count, 8))))
        rows[f"{count} routed"] = [(routed, {})]
    rows = evaluate.measure(rows, [torch.arange(512)[None]], args.new_tokens, args.repeats)
    for row in rows.values():
        for phase in ("prefill", "decode"):
            row[phase]["cost"] = 100 * (1 / row[phase]["speedup"] - 1)
    return rows


def tuning() -> dict[str, dict]:
    """Seconds that one pass over so many examples of the demo takes."""
    rows, settings = {}, tune.parse_arguments([])
    train, _ = tune.load_examples(settings, "--split", AutoTokenizer.from_pretrained(tune.DEMO))
    for count in EXAMPLES:
        args = tune.parse_arguments(["--steps", str(count // settings.batch_size)])
        model = add_mindskip(tune.load_model(args, train), MindSkipConfig((1, 2)))
        start = time.perf_counter()
        tune.tune(model, train[:count], args)
        rows[f"{count:,} examples"] = {"seconds": time.perf_counter() - start, "examples": count}
    return rows


def plot(saved: dict, routed: dict, tuned: dict, path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    styles = {(1, "agree"): "1 row", (4, "agree"): "4 rows that agree", (4, "differ"): "4 rows that differ"}
    for (size, way), label in styles.items():
        some = [row for row in saved.values() if (row["size"], row["way"]) == (size, way)]
        for phase, line in (("prefill", "-"), ("decode", "--")):
            speedups = [row[phase]["speedup"] for row in some]
            left.plot([row["length"] for row in some], speedups, line, marker="o", label=f"{label}, {phase}")
    left.set(
        title="half of the gates closed", xlabel="tokens of the prompt", ylabel="speedup (x)", xscale="log"
    )
    left.set_xticks(LENGTHS[1], [f"{length:,}" for length in LENGTHS[1]])
    left.minorticks_off()
    left.axhline(1, color="grey", linewidth=0.5)
    left.legend(fontsize=7)
    counts = [int(name.split()[0]) for name in list(routed)[1:]]
    for phase in ("prefill", "decode"):
        middle.plot(
            counts, [row[phase]["cost"] for row in list(routed.values())[1:]], marker="o", label=phase
        )
    middle.set(title="every gate open", xlabel="routed layers of 8", ylabel="more time than dense (%)")
    middle.axhline(0, color="grey", linewidth=0.5)
    middle.legend()
    right.plot(
        [row["examples"] for row in tuned.values()], [row["seconds"] for row in tuned.values()], marker="o"
    )
    right.set(title="one pass of tuning on the demo", xlabel="examples", ylabel="seconds", ylim=0)
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    with torch.no_grad():
        saved, routed = saving(args), routing(args)
    columns = {
        name: cell for name, cell in evaluate.COST.items() if name in ("prefill ms", "x", "decode ms", "x ")
    }
    print(evaluate.table("half closed", saved, columns | {"KV MiB": "{kv:.1f} of {dense_kv:.1f}"}) + "\n")
    cost = {"prefill": "{prefill[cost]:+.1f}%", "decode": "{decode[cost]:+.1f}%"}
    print(evaluate.table("every gate open, more time than dense", routed, cost) + "\n")
    tuned = tuning()
    print(evaluate.table("one pass of tuning", tuned, {"seconds": "{seconds:.1f}"}))
    try:
        plot(saved, routed, tuned, HERE / "growth.png")
    except ImportError:
        print("no figure: it needs the extra `plot`")


if __name__ == "__main__":
    main()
