"""How much tuning depends on its seed: accuracy of the demo for several seeds, on examples of neither split.

    python tests/seeds.py                      # the defaults of tune.py, seeds 0 to 7; about a minute for each
    python tests/seeds.py --lr 3e-2 --steps 300 --seeds 0 1 2

The defaults were chosen here, so that the test split stays untouched by that choice.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "demo")]

import make  # noqa: E402

import tune  # noqa: E402
from evaluate import score_answers, summarize  # noqa: E402
from mindskip import MindSkipConfig, add_mindskip  # noqa: E402


def development_examples(tokenizer, train: list[dict], count: int) -> list[dict]:
    """`count` examples of each task, drawn as the training split was, but not among it."""
    r, seen, examples = random.Random("demo development"), {tuple(tune.prompt_of(example)) for example in train}, []
    for task in make.TASKS:
        while sum(example["task"] == task for example in examples) < count:
            prompt, answer = make.draw(r, task, test=False)[0]
            ids, end = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
            if tuple(ids) not in seen:
                examples.append({"task": task, "ids": ids + end, "labels": [-100] * len(ids) + end})
    return examples


def main() -> None:
    _, defaults = tune.parse_arguments([])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    for name in ("lr", "noise", "sparsity_weight", "capacity"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    for name in ("steps", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    settings = vars(parser.parse_args())
    tokenizer = AutoTokenizer.from_pretrained(tune.DEMO)
    train, _ = tune.load_examples(str(tune.DEMO / "data"), "train", tokenizer)
    held_out, averages = development_examples(tokenizer, train, 150), []
    for seed in settings.pop("seeds"):
        start = time.perf_counter()
        model = add_mindskip(tune.load_model(str(tune.DEMO)), MindSkipConfig((1, 2)))
        tune.tune(model, train, seed=seed, **settings)
        tune.calibrate(model, tune.subset(train, tune.CALIBRATION, seed), settings["capacity"])
        scores = score_answers(model, held_out)
        summary = summarize(scores, scores, [example["task"] for example in held_out])
        averages.append(summary["average"])
        low = {task: round(value, 1) for task, value in summary["accuracy"].items() if value < 99}
        print(f"seed {seed} | accuracy {averages[-1]:.2f} | below 99: {low} | keep {summary['keep']:.3f}"
              f" | {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    spread = statistics.pstdev(averages)
    print(f"mean {statistics.mean(averages):.2f} | spread {spread:.2f} | least {min(averages):.2f} | {settings}")


if __name__ == "__main__":
    main()
