"""Router-Tuning: train only the routers of a frozen model, on a small dataset, towards a budget of attention.

    python tune.py                                    # the demo: 2 CPU cores, a minute, under 1 GB
    python tune.py --capacity 0.25 --name quarter     # a tighter budget
    python tune.py --name quarter --resume            # go on after Ctrl-C or a kill: the same command, and --resume
    torchrun --nproc-per-node 2 tune.py --name two    # data-parallel; the same routers, up to rounding
    python evaluate.py --routers runs/demo/routers.safetensors

The loss is the paper's (arXiv 2410.13184v6, Eq. 9/10), on the answer's tokens:

    L = L_task + lambda * ReLU(mean gate - capacity)

Data. The first of these sets of columns that a dataset has decides how it is read; only what is marked * is scored,
and only what comes before the first * votes:

    messages                      the tokenizer's chat template; turns of the assistant *
    instruction, (input,) output  the Alpaca template; output *
    prompt, answer                as they are; answer *
    text                          the first half of the tokens votes, the second half *: no decision sees what it is
                                  scored on

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
                  fails for more seeds.
    lambda, lr    0.3 and 1e-2 for the demo, whose routers start at zero and see 600 steps; the paper's grid
                  for lambda ends at 0.1, the released script has 0 (no pressure at all), and lr 1e-5. Fewer, larger
                  steps commit too early, more often to the wrong layer: python tests/seeds.py.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from mindskip import (
    MindSkip,
    MindSkipConfig,
    add_mindskip,
    load_routers,
    read_routers,
    routed,
    router_parameters,
    save_routers,
)

DEMO = Path(__file__).resolve().parent / "tests" / "demo"
CALIBRATION = 2048  # training examples that set the threshold, and that choose static layers


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
        except KeyboardInterrupt:
            self.exit(130, f"\n{self.prog}: stopped; nothing has been written\n")

    @contextmanager
    def stop_cleanly(self, how_to_go_on: str):
        """Around the run itself: what can end it early ends it in one line."""
        try:
            yield
        except KeyboardInterrupt:
            self.exit(130, f"\n{self.prog}: stopped; {how_to_go_on}\n")
        except torch.OutOfMemoryError:
            self.error(f"out of memory; {how_to_go_on}, and take a smaller --micro-batch-size")
        except (OSError, FloatingPointError) as error:
            self.error(" ".join(str(error).split()))


@contextmanager
def naming(what: str):
    """Put the flag and its value before what a library says of them, so that the reader knows what to change."""
    try:
        yield
    except Exception as error:  # raised again: libraries raise of every kind over a file that they cannot read
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"{what}: {error}{cause}") from error


def add_input_arguments(parser: Parser, split: str) -> argparse._ArgumentGroup:
    """The model and the data, in the same words for both scripts."""
    what = parser.add_argument_group("model and data")
    what.add_argument("--model", default=str(DEMO), help="local folder or Hub id of a decoder")
    what.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    what.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    what.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    what.add_argument("--device-map", choices=["auto"], help="spread the model over GPUs; needs the extra `accelerate`")
    what.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                      help="of the backbone; auto: bfloat16 on cuda, else float32")  # fmt: skip
    what.add_argument("--attn-implementation", choices=["eager", "sdpa", "flash_attention_2", "flash_attention_3"],
                      help="None: what transformers chooses")  # fmt: skip
    what.add_argument("--dataset", default=str(DEMO / "data"),
                      help="Hub id, or local folder, JSON(L) or Parquet file; columns: see README")  # fmt: skip
    what.add_argument("--dataset-config", help="configuration (subset) of a dataset")
    what.add_argument("--split", default=split, help="split, or a part of one, as train[:1000]")
    what.add_argument("--max-samples", type=int, help="examples drawn at random; None: all")
    what.add_argument("--max-length", type=int, default=2048, help="tokens of an example; the rest is cut away")
    return what


def parse_arguments(argv: list[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("tune.py", "Tune the routers of a frozen model.")
    add_input_arguments(parser, "train")
    method = parser.add_argument_group("method")
    method.add_argument("--layers", type=layer_list, help="routed layers, as 3,4; None: the deepest half but the last")
    method.add_argument("--granularity", default=MindSkipConfig.granularity, choices=[MindSkipConfig.granularity])
    method.add_argument("--capacity", type=float, default=MindSkipConfig.capacity, help="target keep ratio, in [0, 1]")
    method.add_argument("--sparsity-weight", type=float, default=0.3, metavar="LAMBDA", help="lambda of the loss")
    method.add_argument("--noise", type=float, default=1.0, help="scale of the exploration; 0: the paper's hard step")
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=600, help="optimiser steps")
    run.add_argument("--batch-size", type=int, default=64, help="sequences in a step, of all processes together")
    run.add_argument("--micro-batch-size", type=int, help="sequences in a forward pass, of one process; None: all"
                     " (fewer cost a second pass, over prompts, to know the budget)")  # fmt: skip
    run.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, to store fewer")
    run.add_argument("--lr", type=float, default=1e-2, help="peak, after 10%% warm-up; then cosine to zero")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--name", default="demo", help="results go to runs/NAME")
    run.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run of that name")
    run.add_argument("--resume", action="store_true", help="go on with an unfinished run of that name")
    return parser, parser.parse_args(argv)


def layer_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# ---------------------------------------------------------------------------------------------
# Model


def check_model_name(name: str) -> str:
    """Refuse what is neither a folder nor like a Hub id, before anything asks the Hub."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name[0] in "./~"):
        raise ValueError(f"--model {name}: no such folder, and not a Hub id (owner/name)")
    return name


def source(args: argparse.Namespace) -> dict:
    """Which files of the Hub are meant, and whether code among them may run: for every from_pretrained."""
    return {"revision": args.revision, "trust_remote_code": args.trust_remote_code}


def commit_of(args: argparse.Namespace) -> str | None:
    """The commit of a model from the Hub, as the cache has it; None for a local folder."""
    if Path(args.model).is_dir():
        return None
    return Path(try_to_load_from_cache(args.model, "config.json", revision=args.revision)).parent.name


def load_skeleton(args: argparse.Namespace) -> torch.nn.Module:
    """The model without its weights: says within a second whether, and where, it can be routed."""
    check_model_name(args.model)
    with naming(f"--model {args.model}"):
        try:
            config = AutoConfig.from_pretrained(args.model, **source(args))
        except ValueError as error:
            hint = " On the command line: --trust-remote-code" if "trust_remote_code" in str(error) else ""
            raise ValueError(f"{error}{hint}") from None
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)


def load_tokenizer(args: argparse.Namespace):
    with naming(f"--model {args.model}"):
        tokenizer = AutoTokenizer.from_pretrained(check_model_name(args.model), **source(args))
    if not tokenizer.is_fast:
        raise ValueError(
            f"--model {args.model}: its tokenizer does not tell where a token begins (none of `tokenizers`)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {args.model}: its tokenizer has no EOS token, which ends every answer")
    return tokenizer


@contextmanager
def without_load_report():
    """What transformers would tell of missing weights in many lines, load_model tells in one, and stops."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def load_model(name: str, device: str = "auto", dtype: str = "auto", device_map=None, **options) -> torch.nn.Module:
    """A frozen decoder in eval mode, from safetensors only; `options` go to from_pretrained.

    Raises:
        ValueError or OSError: if the model or the device is not there, or a weight is not finite.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device != "cpu" and not getattr(torch, device).is_available():
        raise ValueError(f"--device {device}: not available here; use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ValueError("--device-map needs accelerate: pip install -e '.[accelerate]'")
    options |= {"dtype": getattr(torch, dtype), "device_map": device_map, "use_safetensors": True}
    with naming(f"--model {check_model_name(name)} (safetensors only)"), without_load_report():
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True,
                                                            ignore_mismatched_sizes=True, **options)  # fmt: skip
        for what in ("missing", "mismatched"):  # transformers would go on with random ones
            if keys := sorted(found[f"{what}_keys"]):
                raise ValueError(f"{len(keys)} weights are {what}, among them {keys[0]}")
    model.eval().requires_grad_(False)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"--device-map {device_map}: {name} does not fit on the devices; use more, or a smaller dtype")
    if device_map is None:
        model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    for weight, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"--model {name}: {weight} is not finite in {dtype}; use another --dtype or checkpoint")
    return model


def model_of(args: argparse.Namespace) -> torch.nn.Module:
    return load_model(args.model, args.device, args.dtype, args.device_map,
                      attn_implementation=args.attn_implementation, **source(args))  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Data: an example is {task, ids, labels}, labels being -100 where nothing is scored


def chat_text(row: dict, tokenizer) -> tuple[str, list[tuple[int, int]]] | None:
    """A conversation as the tokenizer's chat template writes it, and where in it the assistant's turns are.

    The template writes the conversation twice, once with marks in place of the assistant's turns: between them stands
    what is the template's. None if it refuses the conversation, or changes what the assistant said.
    """
    messages, mark = row["messages"], "\ue000"  # a character for private use
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > first]
    said = [messages[i]["content"] for i in places]
    marked = [{**message, "content": mark} if i in places else message for i, message in enumerate(messages)]
    try:
        whole, around = (tokenizer.apply_chat_template(m, tokenize=False) for m in (messages, marked))
    except TemplateError:  # roles that do not alternate, and the like
        return None
    around = around.split(mark)
    for turns in (said, [turn.strip() for turn in said]):
        text, spans = around[0], []
        for turn, after in zip(turns, around[1:]):
            spans.append((len(text), len(text + turn)))
            text += turn + after
        if text == whole and len(spans) == len(said):
            return text, spans
    return None


def prompt_text(prompt: str, answer: str) -> tuple[str, list[tuple[int, int]]]:
    return prompt + answer, [(len(prompt), len(prompt + answer))]


def alpaca_text(row: dict, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The template of Alpaca, https://github.com/tatsu-lab/stanford_alpaca."""
    given = row.get("input") or ""
    paired = ", paired with an input that provides further context" if given else ""
    prompt = f"Below is an instruction that describes a task{paired}. "
    prompt += "Write a response that appropriately completes the request.\n\n"
    prompt += f"### Instruction:\n{row['instruction']}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    return prompt_text(prompt + "### Response:\n", row["output"])


FORMATS = {  # columns that decide: (text, scored spans) of a row. In this order: the Alpaca dataset has `text`, too
    ("messages",): chat_text,
    ("instruction", "output"): alpaca_text,
    ("prompt", "answer"): lambda row, tokenizer: prompt_text(row["prompt"], row["answer"]),
    ("text",): lambda row, tokenizer: (row["text"], []),
}


def check_row(row: dict, kind: tuple[str, ...]) -> None:
    """TypeError or KeyError where a row does not hold text."""
    if kind == ("messages",):
        texts = [message[key] for message in row["messages"] for key in ("role", "content")]
    else:
        texts = [row[column] for column in kind] + [row.get("input") or ""] * ("instruction" in kind)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("must be text")


def load_rows(name: str, split: str, config: str | None = None) -> datasets.Dataset:
    """Rows of a Hub dataset, a local folder or a local file. ValueError if they are not there, or empty."""
    kinds = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    with naming(f"--dataset {name}, --split {split}"):
        try:
            if not Path(name).is_file():
                name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
                rows = datasets.load_dataset(name_or_path, config, split=split)
            elif Path(name).suffix in kinds:
                rows = datasets.load_dataset(kinds[Path(name).suffix], data_files=name, split=split)
            else:
                raise ValueError(f"a file must end in {', '.join(kinds)}")
        except StopIteration:  # an empty file of JSON lines
            rows = []
    if not len(rows):
        raise ValueError(f"--dataset {name}, --split {split}: no examples")
    return rows


def tokenize(text: str, spans: list[tuple[int, int]], tokenizer, is_chat: bool) -> tuple[list[int], list[int]]:
    """(ids, labels) of a text whose `spans` are scored, each with the token that ends it: EOS, or the template's own.

    The text is tokenized as a whole, as the model will see it; a token that reaches into a span belongs to it.
    """
    encoding = tokenizer(text, add_special_tokens=not is_chat, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    labels, special = [-100] * len(ids), tokenizer.added_tokens_decoder if is_chat else ()
    for start, end in spans:
        for i, (left, right) in enumerate(offsets):
            if right > start and left < end and right > left:
                labels[i] = ids[i]
        end_of_turn = (i for i, (left, _) in enumerate(offsets) if left >= end and ids[i] in special)
        for i in islice(end_of_turn, 1):
            labels[i] = ids[i]
    if spans and not is_chat:
        ids, labels = ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]
    return ids, labels


def load_examples(name: str, split: str, tokenizer, *, config: str | None = None, max_samples: int | None = None,
                  max_length: int = 2048, seed: int = 0) -> tuple[list[dict], str]:  # fmt: skip
    """Tokenized examples {task, ids, labels}, and a line that tells how many were cut or dropped.

    What is beyond `max_length` tokens is cut away; an example that has no prompt or no answer left is dropped.

    Raises:
        ValueError: if the dataset or split is not there, has other columns than FORMATS, or no usable example.
    """
    rows = load_rows(name, split, config)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), max_samples)))
    kind = next((columns for columns in FORMATS if set(columns) <= set(rows.column_names)), None)
    if kind is None:
        accepted = "; ".join(", ".join(columns) for columns in FORMATS)
        raise ValueError(f"--dataset {name}: found columns {rows.column_names}; accepted are: {accepted}")
    if kind == ("messages",) and not tokenizer.chat_template:
        raise ValueError(f"--dataset {name}: `messages` need a chat template, which this tokenizer lacks")

    examples, cut, progress = [], 0, show_progress("reading")
    for i, row in enumerate(rows):
        progress(i + 1, len(rows))
        try:
            check_row(row, kind)
        except (TypeError, KeyError) as error:
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"--dataset {name}, row {i}: cannot read {', '.join(kind)} ({told})") from error
        if (found := FORMATS[kind](row, tokenizer)) is not None:
            ids, labels = tokenize(*found, tokenizer, is_chat=kind == ("messages",))
            cut += len(ids) > max_length
            ids, labels = ids[:max_length], labels[:max_length]
            if kind == ("text",):
                labels = [-100] * ((len(ids) + 1) // 2) + ids[(len(ids) + 1) // 2 :]
            if labels and labels[0] == -100 and labels.count(-100) < len(labels):
                examples.append({"task": str(row.get("task", "all")), "ids": ids, "labels": labels})
    dropped = len(rows) - len(examples)
    counts = f"{len(rows):,} read, {cut:,} cut at {max_length:,} tokens, {dropped:,} dropped: no prompt or answer left"
    counts += ", or refused by the chat template" if kind == ("messages",) else ""
    if not examples:
        raise ValueError(f"--dataset {name}: no example is left ({counts}); raise --max-length {max_length}?")
    return examples, f"{len(examples):,} examples ({counts})"


def examples_of(args: argparse.Namespace, split: str, tokenizer) -> tuple[list[dict], str]:
    return load_examples(args.dataset, split, tokenizer, config=args.dataset_config, max_samples=args.max_samples,
                         max_length=args.max_length)  # fmt: skip


def prompt_of(example: dict) -> list[int]:
    """The tokens before the first that is scored: those that vote."""
    return example["ids"][: next((i for i, label in enumerate(example["labels"]) if label != -100), None)]


def collate(examples: list[dict], device: torch.device | str) -> dict[str, torch.Tensor]:
    """One right-padded batch of the model's arguments; each is (B, T). Prompt tokens vote, answers carry the loss."""
    width = max(len(example["ids"]) for example in examples)

    def batch(rows: list[list], padding) -> torch.Tensor:
        return torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=device)

    return {
        "input_ids": batch([example["ids"] for example in examples], 0),
        "attention_mask": batch([[1] * len(example["ids"]) for example in examples], 0),
        "labels": batch([example["labels"] for example in examples], -100),
        "voters": batch([[True] * len(prompt_of(example)) for example in examples], False),
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
# Several processes (torchrun): each takes every n-th sequence of a step; without torchrun there is one


def process() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# ---------------------------------------------------------------------------------------------
# The training step


def route(model, examples: list[dict]) -> None:
    """Run the decoder, without its head, over prompts alone: all that routers look at."""
    prompts = [{"ids": prompt_of(example), "labels": [-100] * len(prompt_of(example))} for example in examples]
    batch = collate(prompts, model.device)
    model.get_decoder()(batch["input_ids"], attention_mask=batch["attention_mask"], voters=batch["voters"],
                        use_cache=False)  # fmt: skip


def open_gates(model) -> torch.Tensor:
    """How many gates were open in the last forward, with their gradient."""
    return torch.stack([skip.gate.sum().to(model.device) for skip in routed(model)]).sum()


def checkpoint_activations(model) -> None:
    """Store layers' inputs only, and compute the rest again in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # else embeddings ask for a gradient, and frozen lower layers run backward, too


def logistic_noise(layers: int, rows: int, scale: float) -> torch.Tensor:
    """(layers, rows): with it on the logit at scale 1, a gate opens with probability `score`."""
    return scale * torch.logit(torch.rand(layers, rows).clamp(1e-6, 1 - 1e-6))


@contextmanager
def exploration(model, noise: torch.Tensor):
    """Add noise (routed layers, B) to the routers' logits; the backward pass, which may recompute, needs it too."""

    def explore(row):  # (B,)
        # eps: where the score rounds to 1, the logit is infinite and its gradient not a number.
        return lambda router, args, score: torch.sigmoid(torch.logit(score, 1e-6) + row.to(score.device)[:, None, None])

    pairs = zip(routed(model), noise) if noise.any() else []
    handles = [skip.router.register_forward_hook(explore(row)) for skip, row in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def router_optimizer(model, lr: float, done: int = 0, state: dict | None = None) -> torch.optim.AdamW:
    """AdamW over the routers, as it was after `done` steps, of which optimizer_state has the `state`."""
    optimizer = torch.optim.AdamW([{"params": router_parameters(model), "initial_lr": lr}], lr=lr, weight_decay=0.0)
    for skip in routed(model) if done else []:
        weight = skip.router.weight
        moments = {name: state[f"layers.{skip.layer}.{name}"].to(weight.device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.tensor(float(done)), **moments}
    return optimizer


def optimizer_state(model, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    return {
        f"layers.{skip.layer}.{name}": value.cpu()
        for skip in routed(model)
        for name, value in optimizer.state[skip.router.weight].items()
        if name != "step"
    }


def training_mode(model) -> None:
    """Every gate computed, and activations stored as asked for; but no dropout: the backbone is not trained."""
    model.eval()
    for module in model.modules():
        if isinstance(module, MindSkip) or getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone: train() would reach those inside


def scored_tokens(examples: list[dict]) -> int:
    return sum(len(example["labels"]) - example["labels"].count(-100) for example in examples)


def tune(model, examples: list[dict], *, capacity: float, sparsity_weight: float, noise: float, steps: int,
         batch_size: int, lr: float, seed: int, micro_batch_size: int | None = None, optimizer=None, done: int = 0,
         report=lambda record: None) -> None:  # fmt: skip
    """Train the routers in place, after `done` steps up to `steps`; `report` gets one dict of numbers a step.

    Neither micro-batches nor processes change gates or gradients, but for rounding: loss and budget are means over
    the whole step, and noise is drawn for all of it.

    Logged: loss (task loss, nats a token), keep (keep ratio of the step), lr, tokens (in the step).

    Raises:
        FloatingPointError: if loss or gradient is not finite; the routers are then those of the step before.
    """
    optimizer = optimizer or router_optimizer(model, lr)
    # From 1 to `steps` of steps + 1: at either end the rate would be zero, and a step wasted.
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps + 1, last_epoch=done)
    weights, (rank, world) = router_parameters(model), process()
    gates = len(weights) * batch_size  # in a step
    places = range(rank, batch_size, world)  # of this process's sequences in a step
    micro = micro_batch_size or len(places)
    parts = [list(places[i : i + micro]) for i in range(0, len(places), micro)]
    for weight in weights:
        weight.requires_grad_(True)
    training_mode(model)
    for step, chosen in zip(range(done + 1, steps + 1), islice(batches(examples, batch_size, seed), done, None)):
        torch.manual_seed(seed * 1_000_003 + step)  # nothing that is drawn depends on earlier steps: --resume
        explored, task_loss, opened = logistic_noise(len(weights), batch_size, noise), 0.0, 0.0
        # ----- one step: the answers' loss, the budget, and a gradient that reaches routers only -----
        if len(parts) > 1:  # the budget is one for the whole step: know it before the first backward pass
            for part in parts:
                with torch.no_grad(), exploration(model, explored[:, part]):
                    route(model, [chosen[i] for i in part])
                opened += open_gates(model)
            keep = sum_over_processes(opened).item() / gates
        for part in parts:
            some = [chosen[i] for i in part]
            with exploration(model, explored[:, part]):
                share = scored_tokens(some) / scored_tokens(chosen)
                loss = model(**collate(some, model.device), use_cache=False).loss * share
                opened = open_gates(model)
                if len(parts) == 1:
                    keep = sum_over_processes(opened.detach().clone()).item() / gates
                # A part of mindskip.capacity_loss, the hinge over the whole step: its slope is that of the mean gate
                # while the step is over budget, else 0.
                budget = opened / gates if keep > capacity else 0.0
                (loss + sparsity_weight * budget).backward()
            task_loss += loss.detach()
        task_loss = sum_over_processes(task_loss.float()).item()
        for weight in weights:
            sum_over_processes(weight.grad)
        # -------------------------------------------------------------------------------------------
        if not all(torch.isfinite(value).all() for value in [torch.tensor(task_loss), *(w.grad for w in weights)]):
            raise FloatingPointError(f"step {step}: loss {task_loss} or its gradient is not finite; try a lower --lr,"
                                     " --dtype bfloat16 or float32, or look for broken examples")  # fmt: skip
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report({"step": step, "loss": task_loss, "keep": keep, "lr": rate,
                "tokens": sum(len(example["ids"]) for example in chosen)})  # fmt: skip
    model.eval()


@torch.no_grad()
def calibrate(model, examples: list[dict], capacity: float, batch_size: int = 256, passes: int = 4,
              progress=lambda done, total: None) -> float:  # fmt: skip
    """Set the threshold that opens `capacity` of the gates on these examples; returns the keep ratio that it gives.

    A gate changes what the layers above it see, and so their scores: a few passes find the fixed point.
    """
    skips, (rank, world) = routed(model), process()
    examples = sorted(examples, key=lambda example: len(prompt_of(example)))  # less padding
    for done in range(passes + 1):  # the last pass only measures
        scores, kept = torch.zeros(2, len(examples), len(skips), device=model.device)
        for i in range(rank * batch_size, len(examples), world * batch_size):
            route(model, examples[i : i + batch_size])
            for k, skip in enumerate(skips):
                scores[i : i + batch_size, k], kept[i : i + batch_size, k] = skip.score.flatten(), skip.gate.flatten()
            progress(done * len(examples) + min(i + world * batch_size, len(examples)), (passes + 1) * len(examples))
        if done < passes:
            # A gate opens at score >= threshold, so the threshold is the lowest score that is let in.
            ordered = sum_over_processes(scores).flatten().sort(descending=True).values
            count = round(capacity * len(ordered))
            for skip in skips:
                skip.config = replace(skip.config, threshold=ordered[count - 1].item() if count else 1.0)
    return sum_over_processes(kept).mean().item()


# ---------------------------------------------------------------------------------------------
# The run


def attention_layers(model) -> list[int]:
    """Layers that hold `self_attn`: all of most decoders, some of hybrids with convolution or linear attention."""
    layers = getattr(model.get_decoder(), "layers", ())
    return [i for i, layer in enumerate(layers) if getattr(layer, "self_attn", None) is not None]


def default_layers(model) -> tuple[int, ...]:
    """The deepest half of the attention layers except the last, as the paper's 16 of 32; never the first."""
    found = attention_layers(model)
    return tuple(found[max(1, len(found) - 1 - len(found) // 2) : -1]) or (1,)  # too few: add_mindskip says so


def check_bounds(args: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be between {low} and {high}")


def check_arguments(args: argparse.Namespace) -> None:
    """What can be wrong by itself, with no file opened."""
    count = (1, 10**9)
    check_bounds(args, steps=count, batch_size=(1, 10**6), micro_batch_size=count, max_samples=count,
                 max_length=(2, 10**9), lr=(0, 1e3), noise=(0, 1e3), sparsity_weight=(0, 1e6),
                 seed=(0, 2**31 - 1))  # fmt: skip
    if Path(args.name).name != args.name or args.name in ("", ".."):
        raise ValueError(f"--name {args.name!r}: must be the name of a folder in runs/, not a path")
    if args.resume and args.overwrite:
        raise ValueError("--resume, --overwrite: choose one; a run is gone on with, or replaced")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes")
    if args.device_map and world > 1:
        raise ValueError("--device-map is for one process: start it with python, not torchrun")


def check_vocabulary(model, examples: list[dict]) -> None:
    size = model.get_input_embeddings().num_embeddings
    if (highest := max(max(example["ids"]) for example in examples)) >= size:
        raise ValueError(f"the tokenizer gives token {highest}, but the model has {size}: they do not belong together")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that has been used or cannot be written; make nothing yet."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} holds an earlier run; choose another name, --overwrite it, or --resume it")
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to {folder}: {there} is {'not writable' if there.is_dir() else 'a file'}")


def begin(folder: Path, args: argparse.Namespace) -> None:
    """Make the output folder, note the arguments there, and leave no result of an earlier run beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("routers.safetensors", "results.json", "results.png", "tasks.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "arguments.json").write_text(json.dumps({**settings(args), "versions": versions()}, indent=2) + "\n")
    (folder / "log.jsonl").write_text("")


def settings(args: argparse.Namespace) -> dict:
    """The arguments that decide what comes out: a resumed run must share them. As JSON has them."""
    free = ("resume", "overwrite", "device", "device_map", "micro_batch_size", "gradient_checkpointing")
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name not in free}))


def read_progress(path: Path, args: argparse.Namespace) -> tuple[int, dict[str, torch.Tensor]]:
    """(steps done, optimiser state) of an unfinished run. ValueError if there is none, or it had other arguments."""
    if not path.is_file():
        raise ValueError(f"--resume: there is no {path}; to begin, leave --resume away (--overwrite what is there)")
    described, tensors = read_routers(path)
    if "step" not in described["about"]:
        raise ValueError(f"--resume: the run in {path.parent} is finished")
    before = described["about"]["arguments"]
    if changed := [name for name, value in settings(args).items() if before.get(name) != value]:
        told = ", ".join(f"--{name.replace('_', '-')} was {before.get(name)}" for name in changed)
        raise ValueError(f"--resume: the arguments must be the same; {told}")
    return described["about"]["step"], tensors


def describe(model, seed: int) -> str:
    trained, total = (sum(p.numel() for p in some) for some in (router_parameters(model), model.parameters()))
    return (f"model {model.config.name_or_path} | {model.device} {str(model.dtype).removeprefix('torch.')}"
            f" | seed {seed} | trainable {trained:,} of {total:,} parameters")  # fmt: skip


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def quiet(args: argparse.Namespace) -> None:
    """No bars of libraries where loading takes no time (the demo), or where nobody looks."""
    if args.model == str(DEMO) or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails there is raised, too, and told once


def show_progress(label: str):
    """A line on a terminal; elsewhere one line at the end, if it took more than a few seconds."""
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        seconds = time.perf_counter() - start
        if sys.stderr.isatty() or (done == total and seconds > 5):
            end = "\n" if done == total else ""
            print(f"\r{label} {done}/{total} | eta {seconds / done * (total - done):.0f} s ", end=end, file=sys.stderr)

    return progress


class RunLog:
    """A line of log.jsonl for each step; on the screen, one for each fifteenth of the run (on a terminal, for each)."""

    def __init__(self, path: Path, args: argparse.Namespace, done: int):
        lines = path.read_text().splitlines(keepends=True)[:done]  # a kill before the save leaves one more
        os.truncate(path, sum(map(len, lines)))
        self.file, self.args, self.begun = open(path, "a", buffering=1), args, done
        self.started, self.tokens = time.perf_counter(), 0

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def add(self, record: dict) -> None:
        step, steps, seconds = record["step"], self.args.steps, self.seconds()
        self.tokens += record["tokens"]
        self.file.write(json.dumps({**record, "seconds": round(seconds, 3)}) + "\n")
        is_last, is_terminal = step == steps, sys.stdout.isatty()
        if is_terminal or is_last or step % max(1, steps // 15) == 0:
            print(f"step {step}/{steps} | loss {record['loss']:.3f}"
                  f" | keep {record['keep']:.2f} (target {self.args.capacity:.2f}) | {self.tokens / seconds:,.0f} tok/s"
                  f" | eta {seconds / (step - self.begun) * (steps - step) / 60:.1f} min",
                  end="\r" if is_terminal and not is_last else "\n", flush=True)  # fmt: skip


def set_up(args: argparse.Namespace, folder: Path, is_writer: bool):
    """(model with routers, examples, what to tell of them, steps done, optimiser state); weights are loaded last."""
    check_arguments(args)
    path, done, state = folder / "routers.safetensors", 0, {}
    skeleton = load_skeleton(args)
    config = MindSkipConfig(args.layers or default_layers(skeleton), args.granularity, capacity=args.capacity)
    add_mindskip(skeleton, config)  # refuses layers that cannot be routed
    if args.resume:
        done, state = read_progress(path, args)
    elif is_writer:
        with naming(f"--name {args.name}"):
            check_folder(folder, args.overwrite)
    examples, told = examples_of(args, args.split, load_tokenizer(args))
    model = add_mindskip(model_of(args), config)
    check_vocabulary(model, examples)
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    if args.resume:
        load_routers(model, path)
    elif is_writer:
        begin(folder, args)
    return model, examples, told, done, state


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_arguments(argv)
    quiet(args)
    folder, is_writer = Path("runs") / args.name, int(os.environ.get("RANK", 0)) == 0
    with parser.refuse_bad_input():
        model, examples, told, done, state = set_up(args, folder, is_writer)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group()
    about = {"base_model": args.model, "revision": commit_of(args), "versions": versions()}
    optimizer, path = router_optimizer(model, args.lr, done, state), folder / "routers.safetensors"
    if is_writer:
        print(describe(model, args.seed))
        print(f"routed layers {routed(model)[0].config.layers} | capacity {args.capacity} | {told}")
        log = RunLog(folder / "log.jsonl", args, done)

    def save(step: int) -> None:
        save_routers(model, path, optimizer_state(model, optimizer), step=step, arguments=settings(args), **about)

    def report(record: dict) -> None:
        if is_writer:
            log.add(record)
            save(record["step"])

    with parser.stop_cleanly("go on with the same command and --resume"):
        if is_writer:
            save(done)
        tune(model, examples, capacity=args.capacity, sparsity_weight=args.sparsity_weight, noise=args.noise,
             steps=args.steps, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size, lr=args.lr,
             seed=args.seed, optimizer=optimizer, done=done, report=report)  # fmt: skip
        measured = calibrate(model, subset(examples, CALIBRATION, args.seed), args.capacity,
                             args.micro_batch_size or 256, progress=show_progress("calibration"))  # fmt: skip
        if is_writer:
            save_routers(model, path, keep_ratio=measured, **about)
            print(f"threshold {routed(model)[0].config.threshold:.4f} opens {measured:.3f} of the gates"
                  f" | {log.seconds():.0f} s | {path}")  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
