"""Router-Tuning: train only the routers of a frozen model, on a small dataset, to a budget of open gates.

    python tune.py                                    # the demo: 2 CPU cores, 1 to 3 minutes, under 1 GB
    python tune.py --capacity 0.25 --name quarter     # a tighter budget
    python tune.py --granularity block-token --train all --name mod    # Mixture of Depths: the backbone, too
    python tune.py --resume runs/quarter              # go on after a kill, with the arguments of that run
    torchrun --nproc-per-node 2 tune.py --name two    # data-parallel; the same routers, up to rounding

The loss is the paper's (arXiv 2410.13184v6, Eq. 9/10), with the task loss on answers alone, and a third term:

    L = L_task + lambda * ReLU(mean gate - capacity) + mu * mean(logit^2)

Differs from the paper:
    estimator    Gates are drawn, and draws with a lower loss than the others become likelier: see `rloo`.
    third term   It keeps scores away from 0 and 1, where they don't learn. mu falls as (1 - step/steps)^2.
    one budget   The mean is over all routed layers and the batch (at micro-batch 1, a layer's is 0 or 1).
                 The hinge takes that of the step before, so that a step can be computed in parts.
                 With a gate for each token, the budget begins near 1 and falls (`tune`).
    calibration  At the end, the threshold becomes the quantile of scores that opens `capacity` of the gates.
    lambda, lr   0.3 (there up to 0.1), and 12.8 / D, which is 0.1 for the demo (there 1e-5). A logit is a sum
                 over D: with 0.1, scores of wide models are soon 0 or 1, where they don't learn.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mindskip
from mindskip import MindSkipConfig, add_mindskip, capacity_loss, last, router_parameters

DEMO = Path(__file__).resolve().parent / "tests" / "demo"
CALIBRATION = 4096  # training examples that set the threshold, and that choose static layers
LR = 12.8  # divided by the hidden size D: the default peak of the routers' learning rate
DRAWS = 4  # of the gates of each prompt, in a step of rloo; twice as many where each token has a gate
FIRST_BUDGET = 0.95  # where each token has a gate: the budget of the first step, which falls to the capacity
# What --resume can't change: the routers so far, their budget and the order of examples depend on it.
FIXED = (
    "layers granularity capacity estimator sparsity_weight logit_weight batch_size lr seed train lora_rank"
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each router: with the keep ratio, a run's progress


# ---- Tuning. An example is {task, ids, prompt}: the first `prompt` (a number) of its token ids vote, the
# others are the answer, which is scored.
def tune(model, examples: list[dict], args, done: int = 0, state=None, report=lambda *step: None) -> None:
    """Train the routers in place, from step `done` to `args.steps`. `report(step, loss, keep, lr, state)`.

    rloo: a prompt runs with several draws of its gates. Closed ones skip; no gradient runs through the
    backbone; the budget's term gets d(mean score). Where each token has a gate, an answer needs many of them
    at once: opening one while others are closed tells nothing. So draws are twice as many there, and the
    budget falls from FIRST_BUDGET to the capacity in three quarters of the steps; gates are drawn with s =
    sigmoid(r + offset), where r = 0 opens the budget's share.
    straight-through: the paper's step. Hard gates; dL/dscore := dL/dgate, through the frozen layers. At a
    closed gate this slope tells what opening it a little would do, which isn't what opening does.

    Other parameters that require a gradient (adapters, the backbone) get that of the same loss, through open
    gates and the routers' input. Micro-batches and processes change gates and gradients by rounding only.
    state: what `report` got after step `done`. FloatingPointError, before a step that is not finite.
    """
    routers, weights = mindskip.routers(model), router_parameters(model)
    others = [p for p in model.parameters() if p.requires_grad and not any(p is weight for weight in weights)]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": others}], weight_decay=0.0)
    last_keep = state["keep"].item() if done else 1.0  # of the step before; at first of the dense model
    for i, weight in enumerate(weights):
        weight.requires_grad_(True)
        if done:
            moments = {name: state[name][i].to(weight.device) for name in MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(done)), **moments}
    lr = LR / len(weights[0]) if args.lr is None else args.lr
    is_drawn, is_token, warmup = args.estimator == "rloo", routers[0].is_token, max(1, args.steps // 10)
    draws = DRAWS * (1 + is_token) if is_drawn else 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # The prompts of this process, one micro-batch after another.
    parts = torch.arange(rank, args.batch_size, world).split(args.micro_batch_size or args.batch_size)
    order, shuffle = [], random.Random(args.seed)  # every example once before any comes again
    while len(order) < args.steps * args.batch_size:
        order += shuffle.sample(range(len(examples)), len(examples))
    model.eval()  # no dropout, and closed gates skip
    # Straight-through computes closed gates, too. Set one by one: train() would set a module's children.
    for module in () if is_drawn else model.modules():
        is_checkpointed = getattr(module, "gradient_checkpointing", False)
        module.training = is_checkpointed or isinstance(module, mindskip.Router)
    for step in range(done + 1, args.steps + 1):
        torch.manual_seed(args.seed * 1_000_003 + step)  # each step, so that a resumed run draws the same
        batch = [examples[i] for i in order[(step - 1) * args.batch_size : step * args.batch_size]]
        answers = sum(len(one["ids"]) - one["prompt"] for one in batch)  # their tokens
        units = [len(one["ids"]) - 1 if is_token else 1 for one in batch]  # gates in a layer
        count = len(routers) * draws * sum(units)  # gates of this step
        # A gate opens where s >= its threshold: with probability s. (layers, draws, prompts, U)
        thresholds = torch.rand(len(routers), draws, len(batch), max(units))
        budget, offset = args.capacity, 0.0
        if is_drawn and is_token:
            budget += (max(FIRST_BUDGET, budget) - budget) * max(0.0, 1 - step / (0.75 * args.steps))
            offset = torch.tensor(budget).logit(eps=0.05).item()  # finite for a budget of 0 or 1, too
            thresholds = (thresholds.logit() - offset).sigmoid()
        mu = args.logit_weight * (1 - step / args.steps) ** 2
        task_loss, opened = torch.zeros(2, 1, device=model.device)
        # ----- one step: the answers' loss, the budget, and the gradient of what is trained -----------
        for part in parts:
            for router, drawn in zip(routers, thresholds[:, :, part].flatten(1, 2)):
                router.drawn = drawn.to(router.weight.device) if is_drawn else None
            # All prompts of this part under their first draw, then under the next. Divided by the step's
            # answer tokens, so that parts add up to its mean.
            nats = score(model, [batch[i] for i in part] * draws)[0] / answers  # (draws * prompts,)
            logits, gates = last(model, "logit"), last(model, "gate")  # (layers, draws * prompts[, T])
            share = gates.isfinite().sum().item() / count  # that this part has of the step's gates
            loss = share * args.sparsity_weight * capacity_loss(model, budget, last_keep)
            loss += share * mu * logits.square().nanmean()
            loss += rloo(nats.detach(), logits + offset, gates.detach(), draws) if is_drawn else nats.sum()
            loss += nats.sum() / draws if is_drawn and others else 0
            loss.backward()
            task_loss += nats.detach().sum() / draws
            opened += gates.detach().nansum()
        for parameter in others:  # an adapter gets none where every gate above was closed
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        total = [task_loss, opened, *(parameter.grad for parameter in weights + others)]
        if world > 1:  # one all-reduce
            dist.all_reduce(flat := torch.cat([tensor.flatten() for tensor in total]))
            for tensor, summed in zip(total, flat.split([tensor.numel() for tensor in total])):
                tensor.copy_(summed.view_as(tensor))
        if not all(tensor.isfinite().all() for tensor in total):
            raise FloatingPointError(f"step {step}: loss or gradient not finite; try another --lr or --dtype")
        last_keep, progress = opened.item() / count, (step - warmup) / (args.steps + 1 - warmup)
        factor = min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))  # warm-up, then cosine
        for group, peak in zip(optimizer.param_groups, (lr, args.backbone_lr)):
            group["lr"] = factor * peak
        optimizer.step()
        optimizer.zero_grad()
        # ---------------------------------------------------------------------------------------------
        state = {name: torch.stack([optimizer.state[w][name].cpu() for w in weights]) for name in MOMENTS}
        state["keep"] = torch.tensor([last_keep])
        report(step, task_loss.item(), last_keep, factor * lr, state)
    for router in routers:
        router.drawn = None
    model.eval()


def rloo(nats: Tensor, logits: Tensor, gates: Tensor, draws: int) -> Tensor:
    """A number whose gradient is, on average over draws, that of the expected loss E[L].

    Gates m are drawn, open with probability s = sigmoid(logit). Each prompt runs with K independent draws:

        dE[L]/dw := 1/K sum_k (L_k - mean of the other L) * d/dw log p(m_k),   log p: sum over a row's gates

    The mean of L_k * d log p(m_k) is d E[L] (REINFORCE). The other L don't depend on m_k, so they add
    L * E[d log p(m_k)] = 0, and only take variance away (RLOO, Kool et al. 2019).
    """
    log_p = -functional.binary_cross_entropy_with_logits(logits, gates, reduction="none")
    log_p = log_p.transpose(0, 1).flatten(1).nansum(1).view(draws, -1)  # (K, prompts)
    nats = nats.view(draws, -1)
    # (L_k - mean of the other L) / K = (L_k - mean of all L) / (K - 1)
    return ((nats - nats.mean(0)) / (draws - 1) * log_p).sum()


def score(model, examples: list[dict]) -> tuple[Tensor, Tensor]:
    """Answers given their prompts: (nats (B,) summed over an answer, correct (B,): every token by argmax)."""
    batch = collate(examples, model.device)
    targets = batch.pop("labels")[:, min(example["prompt"] for example in examples) :]  # (B, A)
    is_input = batch["attention_mask"][:, 1:]  # nothing is predicted from a row's last token
    batch = {name: value[:, :-1] for name, value in batch.items()} | {"attention_mask": is_input}  # (B, T)
    logits = model(**batch, use_cache=False, logits_to_keep=targets.shape[1]).logits.float()
    targets = targets.to(logits.device)  # logits (B, A, vocabulary) of the tokens before each target
    nats = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)  # 0 at -100
    return nats, ((logits.argmax(-1) == targets) | (targets == -100)).all(1)


@torch.no_grad()
def calibrate(model, examples: list[dict], capacity: float, batch_size: int = 256, passes: int = 4) -> float:
    """Set the threshold that opens `capacity` of the gates on these examples; returns the keep ratio.

    A gate changes what the layers above it see, and so their scores: a few passes find the fixed point.
    """
    prompts = [{"ids": one["ids"][: one["prompt"]], "prompt": one["prompt"]} for one in examples]
    prompts.sort(key=lambda example: example["prompt"])  # less padding
    routers = mindskip.routers(model)
    for done in tqdm(range(passes + 1), "calibration", leave=False, disable=None):
        scores, gates = [], []
        for i in range(0, len(prompts), batch_size):
            batch = collate(prompts[i : i + batch_size], model.device)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            mindskip.decoder_of(model)(ids, attention_mask=mask, use_cache=False)
            real = mask.bool() if routers[0].is_token else slice(None)  # not padding
            scores.append(last(model, "logit")[:, real].flatten().sigmoid())
            gates.append(last(model, "gate")[:, real].flatten())
        if done < passes:  # the last pass only measures
            edges = torch.cat([*scores, scores[0].new_tensor([0.0, 1.0])]).sort(descending=True).values
            count = round(capacity * (len(edges) - 2))
            threshold = edges[count : count + 2].mean().item()  # half-way: last let in, first kept out
            for router in routers:
                router.config = replace(router.config, threshold=threshold)
    return torch.cat(gates).mean().item()


# ---- Data
def collate(examples: list[dict], device: torch.device | str) -> dict[str, Tensor]:
    """One right-padded batch of the model's arguments, (B, T) each: prompts vote, answers carry the loss."""
    ids = [torch.tensor(example["ids"], device=device) for example in examples]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    ids, prompt = pad_sequence(ids, batch_first=True), [[example["prompt"]] for example in examples]
    is_prompt = mask.cumsum(1) <= torch.tensor(prompt, device=device)
    labels = ids.masked_fill(is_prompt | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "voters": is_prompt & (mask == 1)}


def load_examples(args, flag: str, tokenizer) -> tuple[list[dict], str]:
    """Examples of the split that `flag` names, and a line that tells how many were cut, or dropped.

    ValueError if the data is not there, a row cannot be read, or no example has both a prompt and an answer.
    """
    split, path = getattr(args, flag[2:].replace("-", "_")), Path(args.dataset)
    examples, read, cut, longest = [], 0, 0, args.max_length
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {args.model}: its tokenizer has no EOS token, which ends every answer")
    with naming(f"--dataset {args.dataset}, {flag} {split}"):
        if path.is_file() or path.suffix in (".json", ".jsonl", ".parquet"):
            kind = "parquet" if path.suffix == ".parquet" else "json"
            rows = (
                datasets.load_dataset(kind, data_files=str(path), split=split) if path.stat().st_size else []
            )
        else:
            source = str(path.resolve()) if path.is_dir() else args.dataset
            rows = datasets.load_dataset(source, args.dataset_config, split=split)
        if not len(rows):
            raise ValueError("no examples")
        if (args.max_samples or len(rows)) < len(rows):
            rows = rows.shuffle(seed=0).select(range(args.max_samples))
        for i, row in enumerate(tqdm(rows, "reading", leave=False, disable=None)):
            with naming(f"row {i}: cannot read {', '.join(row)}"):
                found = tokenize(tokenizer, row, longest)
            for ids, prompt in found:
                read, cut, ids = read + 1, cut + (len(ids) > longest), ids[:longest]
                if 0 < prompt < len(ids):
                    examples.append({"task": str(row.get("task", "all")), "ids": ids, "prompt": prompt})
        told = f"{len(examples):,} examples ({read:,} read, {cut:,} cut at {longest:,} tokens, "
        told += f"{read - len(examples):,} dropped: no prompt or answer left, or refused by the template)"
        if not examples:
            raise ValueError(told + (f"; raise --max-length {longest}?" if cut else ""))
    return examples, told


def tokenize(tokenizer, row: dict, max_length: int) -> list[tuple[list[int], int]]:
    """[(ids, how many of them are prompt)] of a row. The first case whose columns are there reads it."""
    match row:
        case {"messages": messages}:
            return tokenize_turns(tokenizer, messages, first=1)
        case {"instruction": instruction, "output": answer}:  # https://github.com/tatsu-lab/stanford_alpaca
            given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
            more = ", paired with an input that provides further context" if given else ""
            prompt = f"Below is an instruction that describes a task{more}. Write a response that "
            prompt += "appropriately completes the request.\n\n### Instruction:\n" + instruction + given
            prompt += "\n\n### Response:\n"
        case {"prompt": [*asked], "answer": [*said]} | {"prompt": [*asked], "completion": [*said]}:
            return tokenize_turns(tokenizer, asked + said, first=len(asked))
        case {"prompt": prompt, "answer": answer} | {"prompt": prompt, "completion": answer}:
            pass
        case {"text": text}:  # half of what is left of it
            ids = tokenizer(text)["input_ids"]
            return [(ids, (min(len(ids), max_length) + 1) // 2)]
        case _:
            formats = ["messages", "instruction, output", "prompt, answer", "prompt, completion", "text"]
            raise ValueError(f"found columns {list(row)}; accepted are {formats}")
    # As a whole, as the model will see it; a token that reaches into the answer belongs to it.
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    is_shared = [one == other for one, other in zip(tokenizer(prompt)["input_ids"], ids)]
    return [(ids, [*is_shared, False].index(False))]


def tokenize_turns(tokenizer, messages: list[dict], first: int) -> list[tuple[list[int], int]]:
    """By the chat template: an example for each turn of the assistant, from message `first` on."""
    found, template = [], tokenizer.apply_chat_template
    with suppress(TemplateError):  # it refuses roles that don't alternate, and the like
        for i in range(first, len(messages)):
            if messages[i]["role"] == "assistant":
                prompt = template(messages[:i], add_generation_prompt=True, return_dict=False)
                ids = template(messages[: i + 1], return_dict=False)
                found.append((ids, len(prompt) if ids[: len(prompt)] == prompt else 0))
    return found or [([], 0)]  # which is counted as dropped


# ---- Model
def from_pretrained(auto: type, args, **options):
    """What `auto`, a class of transformers, loads for --model."""
    is_folder = Path(args.model).is_dir()
    with naming(f"--model {args.model}"):
        if not is_folder and (args.model.count("/") != 1 or args.model[0] in "./~"):
            raise ValueError("no such folder, and not a Hub id (owner/name)")
        if is_folder and args.revision:
            raise ValueError(f"--revision {args.revision} is for a Hub id, and this is a folder")
        options |= {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
        return auto.from_pretrained(args.model, **options)


def device_and_dtype(args) -> tuple[str, torch.dtype]:
    """What the flags ask for. ValueError if there is no such device."""
    here = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = here if args.device == "auto" else args.device
    if device not in ("cpu", here):
        raise ValueError(f"--device {device}: not available here; use --device {here}")
    dtype = ("bfloat16" if device == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    return device, getattr(torch, dtype)


def load_model(args, examples: list[dict], tokens: int = 0) -> torch.nn.Module:
    """A frozen decoder for these examples, or `tokens`, from safetensors only. ValueError if it is broken."""
    (device, dtype), name = device_and_dtype(args), f"--model {args.model}"
    options = {"dtype": dtype, "attn_implementation": args.attn_implementation, "device_map": args.device_map}
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = from_pretrained(AutoModelForCausalLM, args, **options)
    if args.adapter:
        with naming(f"--adapter {args.adapter}"):
            model.load_adapter(args.adapter)
    for what in ("missing", "mismatched", "unexpected"):  # transformers would go on without
        if keys := sorted(found[f"{what}_keys"]):
            raise ValueError(f"{name}: {len(keys)} weights are {what}, among them {keys[0]}")
    if broken := [weight for weight, p in model.named_parameters() if p.is_meta or not p.isfinite().all()]:
        raise ValueError(f"{name}: {broken[0]} is not finite in {dtype}, or on no device")
    longest = max(tokens, *(len(one["ids"]) for one in examples))
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or longest
    if longest > most:
        raise ValueError(f"{name} has {most} positions, not {longest}; lower --max-length or --prompt-length")
    known, highest = model.get_input_embeddings().num_embeddings, max(max(one["ids"]) for one in examples)
    if highest >= known:
        raise ValueError(f"{name}: the tokenizer gives token {highest}, but the model has {known}")
    if not args.device_map:
        model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
    return model.eval().requires_grad_(False)


def default_layers(model) -> tuple[int, ...]:
    """The deepest half of the attention layers except the last, as the paper's 16 of 32; never the first."""
    found = mindskip.attention_layers(model)
    return tuple(found[max(1, len(found) - 1 - len(found) // 2) : -1]) or (1,)  # add_mindskip refuses (1,)


def add_trained(model, args) -> MindSkipConfig:
    """Add, in place, all that `args` asks to train: routers, beside them adapters, or the backbone."""
    model.requires_grad_(args.train == "all")
    if args.lora_rank:
        with naming("--lora-rank needs the extra `lora`: pip install -e '.[lora]'"):
            from peft import LoraConfig
        scale = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank}
        model.add_adapter(LoraConfig(target_modules="all-linear", **scale))
    config = MindSkipConfig(args.layers or default_layers(model), args.granularity, capacity=args.capacity)
    add_mindskip(model, config)
    return config


def describe(model, args) -> str:
    """The line that a run opens with."""
    place = f"{model.device} {str(model.dtype).removeprefix('torch.')}"
    trained = model.num_parameters(only_trainable=True)
    numbers = f"trainable {trained:,} of {model.num_parameters():,} parameters"
    return f"model {args.model} | {place} | seed {args.seed} | {numbers}"


# ---- The command
class Parser(argparse.ArgumentParser):
    """For both scripts: the same words for model and data, and errors that `command` shows."""

    def __init__(self, description: str, split: str):
        super().__init__(description=description, allow_abbrev=False)
        self.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        add = self.add_argument_group("model and data").add_argument
        add("--model", default=str(DEMO), help="local folder or Hub id of a decoder")
        add("--revision", help="branch, tag or commit of a model on the Hub")
        add("--adapter", help="folder or Hub id of a PEFT adapter for it; needs the extra `lora`")
        add("--trust-remote-code", action="store_true", help="run code that comes with the model")
        add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
        add("--device-map", choices=["auto"], help="spread the model over GPUs; needs the extra `accelerate`")
        add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
        add("--attn-implementation", help="eager, sdpa, flash_attention_2; None: what transformers chooses")
        add("--dataset", default=str(DEMO / "data"), help="Hub id, or local folder or file; formats: README")
        add("--dataset-config", help="configuration (subset) of a dataset")
        add("--split", default=split, help="split, or a part of one, as train[:1000]")
        add("--max-samples", type=number(int, 1), help="examples drawn at random; None: all")
        add("--max-length", type=number(int, 2), default=2048, help="tokens of an example; the rest is cut")

    def error(self, message: str):
        raise ValueError(message)


def number(kind: type, low: float, high: float = 1e9, many: bool = False):
    """An argparse type: a number from low to high, or a list of them, as 1,2,3."""

    def convert(text: str):
        values = [kind(part) for part in (text.split(",") if many else [text])]
        if not all(low <= value <= high for value in values):
            raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high:g}")
        return values if many else values[0]

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def command(main):
    """Around main: what ends it early becomes one line, wherever it is raised; status 2 (Ctrl-C: 130)."""

    def run(argv: list[str] | None = None):
        for library in (datasets.logging, transformers.utils.logging):  # what fails there is raised, too
            library.set_verbosity(library.CRITICAL)
            library.disable_progress_bar()
        warnings.filterwarnings("ignore", "`past_key_values`", FutureWarning)  # `cache` from 5.24 on
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know all letters of a task's name
        try:
            return main(argv)
        except BrokenPipeError:  # of `| head`: nobody reads on
            os._exit(0)
        except KeyboardInterrupt:
            status, message = 130, "stopped"
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            status, message = 2, f"error: {error}"
        except (RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
            if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            status, message = 2, "error: out of memory; take a smaller --micro-batch-size"
        print(f"{Path(main.__code__.co_filename).name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(status)

    return run


@contextmanager
def naming(what: str):
    """Put the flag and its value before what a library says of them: the name tells what to change."""
    try:
        yield
    except Exception as error:  # raised again: libraries raise of every kind over a file they cannot read
        is_told = str(error.__cause__ or "") in str(error)
        cause = "" if is_told else f" ({error.__cause__})"
        raise ValueError(f"{what}: {str(error) or repr(error)}{cause}") from error


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("Tune the routers of a frozen model.", split="train")
    add = parser.add_argument_group("method").add_argument
    add("--layers", type=number(int, 0, many=True), help="as 3,4; None: the deepest half but the last")
    add("--granularity", default=MindSkipConfig.granularity, choices=mindskip.GRANULARITIES)
    add("--capacity", type=number(float, 0, 1), default=MindSkipConfig.capacity, help="target keep ratio")
    add("--estimator", default="rloo", choices=["rloo", "straight-through"], help="rloo draws gates")
    add("--sparsity-weight", type=number(float, 0), default=0.3, metavar="LAMBDA", help="of the budget")
    add("--logit-weight", type=number(float, 0), default=0.03, metavar="MU", help="of mean(r^2); falls to 0")
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=number(int, 1), default=1500, help="lr: 10%% warm-up, then cosine to zero")
    add("--batch-size", type=number(int, 1), default=16, help="prompts in a step, of all processes")
    add("--micro-batch-size", type=number(int, 1), help="prompts at a time in a process; None: all")
    add("--train", default="routers", choices=["routers", "all"], help="all: the backbone, too")
    add("--lora-rank", type=number(int, 1), help="train adapters, too; needs the extra `lora`")
    add("--backbone-lr", type=number(float, 0, 1), default=1e-4, help="peak, of the backbone or adapters")
    add("--gradient-checkpointing", action="store_true", help="straight-through: store fewer activations")
    add("--lr", type=number(float, 0, 1e3), help=f"peak of the routers'; None: {LR} / hidden size")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0)
    add("--name", default="demo", help="results go to runs/NAME")
    add("--overwrite", action="store_true", help="replace the results of an earlier run of that name")
    add("--resume", metavar="FOLDER", help="go on with the unfinished run in runs/NAME, and its arguments")
    args = parser.parse_args(argv)
    if args.resume:
        with naming(f"--resume {args.resume}"):
            described, state = mindskip.read_routers(Path(args.resume, "routers.safetensors"))
            if "step" not in described["about"]:
                raise ValueError("this run is finished")
            if missing := {*MOMENTS, "keep"} - set(state):
                raise ValueError(f"its progress lacks {missing}")
            then = described["about"]["arguments"]
            parser.set_defaults(**then)
            args = parser.parse_args(argv)
            if then["train"] == "all" or then["lora_rank"]:
                raise ValueError("only routers have progress to go on with; start again with --overwrite")
            if changed := {name: then[name] for name in FIXED.split() if then[name] != getattr(args, name)}:
                raise ValueError(f"that run has {changed}; start another to change this")
    if args.batch_size % (world := int(os.environ.get("WORLD_SIZE", "1"))):
        raise ValueError(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes")
    if args.lora_rank and args.train == "all":
        raise ValueError(f"--lora-rank {args.lora_rank}: adapters need a frozen backbone, not --train all")
    if Path(args.name).name != args.name or args.name in ("", ".."):
        raise ValueError(f"--name {args.name!r}: must be the name of a folder in runs/, not a path")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)  # what is cheap to check comes first, the weights last
    folder, is_writer = Path(args.resume or f"runs/{args.name}"), os.environ.get("RANK", "0") == "0"
    is_used = any(one.stat().st_size for one in folder.glob("*"))
    if is_used and is_writer and not (args.resume or args.overwrite):
        raise ValueError(f"{folder} holds an earlier run; choose another --name, --overwrite or --resume it")
    with torch.device("meta"):  # a model without weights tells whether, and where, it can be routed
        plan = from_pretrained(AutoConfig, args)
        add_trained(AutoModelForCausalLM.from_config(plan, trust_remote_code=args.trust_remote_code), args)
    tokenizer, path = from_pretrained(AutoTokenizer, args), folder / "routers.safetensors"
    examples, told = load_examples(args, "--split", tokenizer)
    model, done, state = load_model(args, examples), 0, None
    hashes = [torch.hash_tensor(weight).item() for weight in model.parameters()]
    prints = {"data": zlib.crc32(json.dumps(examples).encode()), "weights": zlib.crc32(repr(hashes).encode())}
    config = add_trained(model, args)
    if args.resume:
        described, state = mindskip.read_routers(path)
        done, before = described["about"]["step"], described["about"].get("fingerprints")
        if before != prints:
            raise ValueError(f"--resume {folder}: data or weights changed, from {before} to {prints}")
        mindskip.load_routers(model, path)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # else frozen lower layers run backward, for the embeddings
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group()
    cached = None  # the configuration of a model from the Hub, in the folder of its commit
    if not Path(args.model).is_dir():
        cached = try_to_load_from_cache(args.model, "config.json", revision=args.revision)
    arguments = {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}
    about = {"revision": cached and Path(cached).parent.name, "fingerprints": prints, "arguments": arguments}
    beside = str(folder / ("adapter" if args.lora_rank else "model"))  # for what is trained, too
    is_beside = args.train == "all" or args.lora_rank is not None
    about["base_model"] = beside if args.train == "all" else args.model
    about["adapter"] = beside if args.lora_rank else args.adapter
    about["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    started = time.perf_counter()
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=0)
        with naming(f"{folder}: another run writes there"):
            lock.acquire()
        for name in ("results.json", "results.png", "tasks.json"):  # of an earlier run
            (folder / name).unlink(missing_ok=True)
        log = open(folder / "log.jsonl", "a" if done else "w", buffering=1)  # noqa: SIM115
        print(f"{describe(model, args)}\nrouted layers {config.layers} | capacity {args.capacity} | {told}")

    def report(step: int, loss: float, keep: float, lr: float, state: dict) -> None:
        """A line of log.jsonl, progress for --resume, and now and then a line on the screen."""
        if not is_writer:
            return
        seconds = time.perf_counter() - started
        mindskip.save_routers(model, path, state, step=step, **about)
        record = {"step": step, "loss": loss, "keep": keep, "lr": lr, "seconds": seconds}
        print(json.dumps(record), file=log)
        if step % max(1, args.steps // 15) == 0 or step == args.steps:
            pace = seconds / (step - done)
            rest = f"{args.batch_size / pace:,.0f} seq/s | eta {pace * (args.steps - step) / 60:.1f} min"
            told = f"loss {loss:.3f} | keep {keep:.2f} (target {args.capacity:.2f}) | {rest}"
            print(f"step {step}/{args.steps} | {told}", flush=True)

    tune(model, examples, args, done, state, report)
    chosen = random.Random(args.seed).sample(examples, min(CALIBRATION, len(examples)))
    measured = calibrate(model, chosen, args.capacity, args.micro_batch_size or 256)
    if is_writer:
        mindskip.save_routers(model, path, keep_ratio=measured, **about)
        threshold, seconds = mindskip.routers(model)[0].config.threshold, time.perf_counter() - started
        print(f"threshold {threshold:.4f} opens {measured:.3f} of the gates | {seconds:.0f} s | {path}")
        if abs(measured - args.capacity) > 0.05:
            print(f"WARNING: {measured:.2f} of the gates are open, not {args.capacity}; try more --steps")
        if is_beside:  # for --adapter, or --model
            mindskip.remove_mindskip(model).save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        lock.release()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
