"""Router-Tuning: train only the routers of a frozen model, on a small dataset, towards a budget of attention.

    python tune.py                                    # the demo: 2 CPU cores, half a minute, under 1 GB
    python tune.py --capacity 0.25 --name quarter     # a tighter budget
    python evaluate.py --routers runs/demo/routers.safetensors

The loss is the paper's (arXiv 2410.13184v6, Eq. 9/10), on the answer's tokens:

    L = L_task + lambda * ReLU(mean gate - capacity)

Differs from the paper:
    one budget    the mean runs over all routed layers and the whole batch of an optimiser step; a
                  hinge for each layer at micro-batch 1 sees only 0 and 1, and enforces nothing.
    calibration   the hinge stops pushing at the budget, so training ends somewhere below it. Afterwards
                  the threshold is set to the quantile of the scores on training data that opens just
                  `capacity` of the gates. Without this the keep ratio misses the capacity.
    exploration   while tuning, logistic noise is added to the logit, so that a gate opens with probability
                  `score`; a straight-through step was first meant for such units (arXiv 1308.3432). Without
                  it all gates start at the threshold and close together, and an input that needs two
                  layers learns nothing from opening one. --noise 0 is the paper's step; on the demo it
                  costs points, and they depend on the seed.
    lambda, lr    0.3 and 3e-2 for the demo, whose routers start at zero and see 300 steps; the paper's grid
                  for lambda ends at 0.1, the released script has 0 (no pressure at all), and lr 1e-5.
"""

import argparse
import json
import platform
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from mindskip import (
    MindSkip,
    MindSkipConfig,
    add_mindskip,
    capacity_loss,
    keep_ratio,
    router_parameters,
    save_routers,
)

DEMO = Path(__file__).resolve().parent / "tests" / "demo"
CALIBRATION = 2048  # training examples that set the threshold


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line; whatever is wrong with the input ends here, with exit status 2."""

    def __init__(self, prog: str, description: str):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def refuse_bad_input(self):
        """Around the set-up of a run: what bad input raises there becomes an error of the command line."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(" ".join(str(error).split()))


def parse_arguments(argv: list[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("tune.py", "Tune the routers of a frozen model.")
    what = parser.add_argument_group("model and data")
    what.add_argument("--model", default=str(DEMO), help="local folder or Hub id of a decoder")
    what.add_argument("--dataset", default=str(DEMO / "data"), help="local folder or Hub id; columns prompt, answer")
    what.add_argument("--split", default="train", help="split to tune on")
    what.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    what.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                      help="of the backbone; auto: bfloat16 on cuda, else float32")  # fmt: skip
    method = parser.add_argument_group("method")
    method.add_argument("--layers", type=layer_list, help="routed layers, as 3,4; None: the deepest half but the last")
    method.add_argument("--granularity", default=MindSkipConfig.granularity, choices=[MindSkipConfig.granularity])
    method.add_argument("--capacity", type=float, default=MindSkipConfig.capacity, help="target keep ratio, in [0, 1]")
    method.add_argument("--sparsity-weight", type=float, default=0.3, metavar="LAMBDA", help="lambda of the loss")
    method.add_argument("--noise", type=float, default=1.0, help="scale of the exploration; 0: the paper's hard step")
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=300, help="optimiser steps")
    run.add_argument("--batch-size", type=int, default=64, help="sequences in a step")
    run.add_argument("--lr", type=float, default=3e-2, help="peak, after 10%% warm-up; then cosine to zero")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--name", default="demo", help="results go to runs/NAME")
    run.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run of that name")
    return parser, parser.parse_args(argv)


def layer_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# ---------------------------------------------------------------------------------------------
# Model and data


def check_model_name(name: str) -> str:
    """Refuse what is neither a folder nor like a Hub id, before anything asks the Hub."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name[0] in "./~"):
        raise ValueError(f"--model {name}: no such folder, and not a Hub id (owner/name)")
    return name


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> torch.nn.Module:
    """A frozen decoder in eval mode, on its device. ValueError or OSError if the model or the device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device != "cpu" and not getattr(torch, device).is_available():
        raise ValueError(f"--device {device}: not available here; use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    model = AutoModelForCausalLM.from_pretrained(check_model_name(name), dtype=getattr(torch, dtype))
    return model.to(device).eval().requires_grad_(False)


def load_examples(name: str, split: str, tokenizer) -> list[dict]:
    """Tokenized examples: {task, prompt: [ids], answer: [ids], ending with EOS}.

    Raises:
        ValueError: if the dataset or split is not there, is empty, or has no columns prompt and answer.
    """
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--dataset {name}, --split {split}: {error}") from error
    if not {"prompt", "answer"} <= set(rows.column_names):
        raise ValueError(f"--dataset {name}: needs columns prompt and answer, found {rows.column_names}")
    if not len(rows):
        raise ValueError(f"--dataset {name}, --split {split}: no examples")
    prompts = tokenizer(list(rows["prompt"]))["input_ids"]
    answers = tokenizer(list(rows["answer"]), add_special_tokens=False)["input_ids"]
    tasks = rows["task"] if "task" in rows.column_names else ["all"] * len(rows)
    return [
        {"task": task, "prompt": prompt, "answer": answer + [tokenizer.eos_token_id]}
        for task, prompt, answer in zip(tasks, prompts, answers)
    ]


def collate(examples: list[dict], device: torch.device | str) -> dict[str, torch.Tensor]:
    """One right-padded batch of the model's arguments; each is (B, T). Prompt tokens vote, answers carry the loss."""
    width = max(len(e["prompt"]) + len(e["answer"]) for e in examples)

    def rows(prompt, answer, padding):
        lists = [prompt(e["prompt"]) + answer(e["answer"]) for e in examples]
        return torch.tensor([row + [padding] * (width - len(row)) for row in lists], device=device)

    return {
        "input_ids": rows(list, list, 0),
        "attention_mask": rows(lambda p: [1] * len(p), lambda a: [1] * len(a), 0),
        "labels": rows(lambda p: [-100] * len(p), list, -100),
        "voters": rows(lambda p: [True] * len(p), lambda a: [False] * len(a), False),
    }


def subset(examples: list[dict], count: int, seed: int) -> list[dict]:
    """At most `count` examples, drawn at random: a dataset may come sorted by task."""
    return random.Random(seed).sample(examples, min(count, len(examples)))


def batches(examples: list[dict], size: int, seed: int):
    """Endless shuffled batches; every example once before any comes again."""
    generator, order = random.Random(seed), []
    while True:
        while len(order) < size:
            order += generator.sample(range(len(examples)), len(examples))
        yield [examples[i] for i in order[:size]]
        order = order[size:]


# ---------------------------------------------------------------------------------------------
# The training step


def routed(model) -> list[MindSkip]:
    return [module for module in model.modules() if isinstance(module, MindSkip)]


@contextmanager
def exploration(model, noise: float, seed: int):
    """Add logistic noise to every router's logit: at noise 1 a gate opens with probability `score`."""
    device = router_parameters(model)[0].device
    generator = torch.Generator(device).manual_seed(seed)

    def explore(router, args, score):  # (B, 1, 1)
        uniform = torch.rand(score.shape, generator=generator, device=device).clamp(1e-6, 1 - 1e-6).to(score.device)
        return torch.sigmoid(torch.logit(score) + noise * torch.logit(uniform))

    handles = [skip.router.register_forward_hook(explore) for skip in routed(model)] if noise > 0 else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tune(model, examples: list[dict], *, capacity: float, sparsity_weight: float, noise: float, steps: int,
         batch_size: int, lr: float, seed: int, report=lambda record: None) -> None:  # fmt: skip
    """Train the routers in place; `report` gets one dict of numbers a step.

    Logged: loss (task loss, nats a token), keep (keep ratio of the step), lr, tokens (in the step).
    """
    optimizer = torch.optim.AdamW(router_parameters(model), lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    for parameter in router_parameters(model):
        parameter.requires_grad_(True)
    model.train()
    with exploration(model, noise, seed):
        for step, chosen in zip(range(1, steps + 1), batches(examples, batch_size, seed)):
            batch = collate(chosen, model.device)
            # ----- one step: the answer's loss, the budget, and a gradient that reaches routers only -----
            task_loss = model(**batch, use_cache=False).loss
            loss = task_loss + sparsity_weight * capacity_loss(model, capacity)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            # -----------------------------------------------------------------------------------------
            report({"step": step, "loss": task_loss.item(), "keep": keep_ratio(model),
                    "lr": schedule.get_last_lr()[0], "tokens": int(batch["attention_mask"].sum())})  # fmt: skip
    model.eval()


@torch.no_grad()
def calibrate(model, examples: list[dict], capacity: float, batch_size: int = 256, passes: int = 4) -> float:
    """Set the threshold that opens `capacity` of the gates on these examples; returns the keep ratio there.

    A gate changes what the layers above it see, and so their scores: a few passes find the fixed point.
    """
    skips = routed(model)
    for _ in range(passes):
        scores, kept = [], []
        for i in range(0, len(examples), batch_size):
            batch = collate(examples[i : i + batch_size], model.device)
            del batch["labels"]
            model(**batch, use_cache=False)
            scores += [skip.score.flatten() for skip in skips]
            kept += [skip.gate.flatten() for skip in skips]
        # A gate opens at score >= threshold, so the threshold is the lowest score that is let in.
        scores = torch.cat(scores).sort(descending=True).values
        count = round(capacity * len(scores))
        threshold = scores[count - 1].item() if count else 1.0
        for skip in skips:
            skip.config = replace(skip.config, threshold=threshold)
    return torch.cat(kept).mean().item()


# ---------------------------------------------------------------------------------------------
# The run


def default_layers(config) -> tuple[int, ...]:
    """The deepest half except the last layer, as the paper's 16 of 32."""
    count = config.get_text_config(decoder=True).num_hidden_layers
    return tuple(range(count - 1 - count // 2, count - 1))


def open_folder(folder: Path, overwrite: bool) -> None:
    """Make the output folder; refuse one that has been used or cannot be written."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--name {folder.name}: {folder} holds an earlier run; choose another name, or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writable").touch()
    (folder / ".writable").unlink()


def describe(model, seed: int) -> str:
    trained, total = (sum(p.numel() for p in some) for some in (router_parameters(model), model.parameters()))
    return (f"model {model.config.name_or_path} | {model.device} {str(model.dtype).removeprefix('torch.')}"
            f" | seed {seed} | trainable {trained:,} of {total:,} parameters")  # fmt: skip


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def quiet() -> None:
    """No progress bars for what takes no time; ours shows what does."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_arguments(argv)
    quiet()
    folder = Path("runs") / args.name
    with parser.refuse_bad_input():  # the cheap checks first, the weights last
        if args.steps < 1 or args.batch_size < 1 or not args.lr > 0:
            raise ValueError("--steps, --batch-size and --lr must be above 0")
        if not args.sparsity_weight >= 0 or not args.noise >= 0:
            raise ValueError("--sparsity-weight and --noise must be at least 0")
        if folder.parent != Path("runs") or not args.name.strip("."):
            raise ValueError(f"--name {args.name!r}: must be the name of a folder in runs/, not a path")
        base = AutoConfig.from_pretrained(check_model_name(args.model))
        config = MindSkipConfig(args.layers or default_layers(base), args.granularity, capacity=args.capacity)
        depth = base.get_text_config(decoder=True).num_hidden_layers
        if config.layers[-1] >= depth:
            raise ValueError(f"--layers {args.layers}: this model has layers 0 to {depth - 1}, and 0 is never routed")
        examples = load_examples(args.dataset, args.split, AutoTokenizer.from_pretrained(args.model))
        open_folder(folder, args.overwrite)
        model = add_mindskip(load_model(args.model, args.device, args.dtype), config)
    torch.manual_seed(args.seed)
    print(describe(model, args.seed))
    print(f"routed layers {config.layers} | capacity {config.capacity} | {len(examples):,} examples")
    (folder / "arguments.json").write_text(json.dumps({**vars(args), "versions": versions()}, indent=2) + "\n")

    started, tokens = time.perf_counter(), 0
    with open(folder / "log.jsonl", "w") as log:

        def report(record: dict) -> None:
            nonlocal tokens
            tokens += record["tokens"]
            seconds = time.perf_counter() - started
            log.write(json.dumps({**record, "seconds": round(seconds, 3)}) + "\n")
            is_last = record["step"] == args.steps
            if sys.stdout.isatty() or is_last or record["step"] % max(1, args.steps // 15) == 0:
                print(f"step {record['step']}/{args.steps} | loss {record['loss']:.3f}"
                      f" | keep {record['keep']:.2f} (target {args.capacity:.2f}) | {tokens / seconds:,.0f} tok/s"
                      f" | eta {seconds / record['step'] * (args.steps - record['step']) / 60:.1f} min",
                      end="\r" if sys.stdout.isatty() and not is_last else "\n", flush=True)  # fmt: skip

        tune(model, examples, capacity=args.capacity, sparsity_weight=args.sparsity_weight, noise=args.noise,
             steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=args.seed, report=report)  # fmt: skip
    measured = calibrate(model, subset(examples, CALIBRATION, args.seed), args.capacity)
    save_routers(model, folder / "routers.safetensors", base_model=args.model, keep_ratio=measured, versions=versions())
    print(f"threshold {routed(model)[0].config.threshold:.4f} opens {measured:.3f} of the gates"
          f" | {time.perf_counter() - started:.0f} s | {folder / 'routers.safetensors'}")  # fmt: skip


if __name__ == "__main__":
    main()
