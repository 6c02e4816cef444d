"""How much tuning depends on its seed: accuracy of the demo for several seeds, on examples of neither split.

    python tests/seeds.py                      # the defaults of tune.py, seeds 0 to 15
    python tests/seeds.py --estimator straight-through --seeds 0 1 2
    python tests/seeds.py --capacity 0.25      # every other flag is one of tune.py's

The defaults were chosen on such examples with other seeds (100 to 115), so that the test split and seeds 0 to 15 stay
untouched by that choice.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "demo")]

import make  # noqa: E402

import tune  # noqa: E402
from evaluate import score_all, summarize  # noqa: E402


def development_examples(tokenizer, train: list[dict], count: int) -> list[dict]:
    """`count` examples of each task, drawn as the training split was, but not among it."""
    r, seen = random.Random("demo development"), {tuple(one["ids"][: one["prompt"]]) for one in train}
    examples = []
    for task in make.TASKS:
        while sum(example["task"] == task for example in examples) < count:
            prompt, answer = make.draw(r, task, test=False)[0]
            ids = tokenizer(prompt)["input_ids"]
            end = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
            if tuple(ids) not in seen:
                examples.append({"task": task, "ids": ids + end, "prompt": len(ids)})
    return examples


def tuned(args, train: list[dict]):
    """What tune.py makes, without its files: (model, routed layers)."""
    model = tune.load_model(args, train)
    layers = tune.add_trained(model, args).layers
    tune.tune(model, train, args)
    chosen = random.Random(args.seed).sample(train, min(tune.CALIBRATION, len(train)))
    tune.calibrate(model, chosen, args.capacity)
    return model, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(16)))
    mine, flags = parser.parse_known_args()
    args = tune.parse_arguments(flags)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, _ = tune.load_examples(args, "--split", tokenizer)
    held_out, averages = development_examples(tokenizer, train, 150), []
    for args.seed in mine.seeds:
        start = time.perf_counter()
        model, layers = tuned(args, train)
        seconds = time.perf_counter() - start
        dense = score_all(model, held_out, dict.fromkeys(layers, True))
        if not averages:
            average = summarize(dense, dense, held_out, len(layers))["average"]
            print(f"dense | accuracy {average:.2f} | layers {layers} routed", flush=True)
        summary = summarize(score_all(model, held_out, {}), dense, held_out, len(layers))
        averages.append(summary["average"])
        low = {task: round(value, 1) for task, value in summary["accuracy"].items() if value < 99}
        told = f"below 99: {low} | keep {summary['keep']:.3f} | {seconds:.0f} s"
        print(f"seed {args.seed} | accuracy {averages[-1]:.2f} | {told}", flush=True)
    names = ("capacity", "estimator", "sparsity_weight", "logit_weight", "steps", "batch_size", "lr")
    told = " | ".join(f"{name} {getattr(args, name)}" for name in names)
    mean, spread = statistics.mean(averages), statistics.pstdev(averages)
    print(f"mean {mean:.2f} | least {min(averages):.2f} | spread {spread:.2f} | {told}")


if __name__ == "__main__":
    main()
