"""Measure what skipping attention costs in accuracy, and what it saves in FLOPs, time and memory.

    python evaluate.py                    # the routers in runs/demo on the demo's test split; two minutes
    python evaluate.py --plot             # and a figure (pip install -e '.[plot]')
    python evaluate.py --capacity 0.25,0.5,0.75     # the same routers at other budgets; no tuning
    python evaluate.py --explain "max kqzme="       # each layer's score and gate for a prompt; -: from stdin
    python evaluate.py --what-if --model HuggingFaceTB/SmolLM2-135M    # what would be saved? No tuning
    python evaluate.py --tasks boolq,piqa --routers runs/llama --model meta-llama/Meta-Llama-3-8B \\
        --dataset tatsu-lab/alpaca        # standard benchmarks (pip install -e '.[tasks]')

A row is a way to set gates. Static and random rows ask whether it is worth anything to route *dynamically*:

    dense       every gate open; in the table of costs, the model without routers
    mindskip    the tuned routers decide
    static      as many layers closed as mindskip skips, for all prompts alike. similarity: those whose
                sublayer changes its input least (LLM-Drop, arXiv 2406.15786); router: those that this router
                closes most often on training data; best: the best subset, chosen on the test split, in its
                favour. In the table of costs: the first ones
    random      each gate (a sequence's, or a token's) open with the probability mindskip's keep ratio
    removed     the limit of a row's time: attention and its norm cut out, by the same decisions
    multiply    the control for time: attention computed, then multiplied by mindskip's gates (--what-if: by
                those of rows that agree)

A column is a heading and a format of a row's results. FLOPs are counted, milliseconds are measured:

    accuracy    every token of the answer right, by argmax given the answer so far, as in greedy decoding
    +-          standard error; of a difference to dense, that of the paired difference
    loss, keep  mean nats of an answer token; keep ratio: the fraction of routed gates that were open
    FLOP        by formula: one prompt's prefill, and the last decode step of one row
    ms          median, for all prompts: of prefill; of one decode step
    x           median over repeats of dense time / row time in the same repeat [least most]
    of limit    (dense time - row time) / (dense time - removed time), of medians; -: removed saves under 5%
    KV, peak    keys and values of all prompts after decoding; most memory that a prefill allocates beyond
                the weights
"""

import copy
import importlib
import itertools
import json
import math
import random
import re
import statistics
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache

import mindskip
import tune
from mindskip import attention_layers, decoder_of, fix_gates, load_routers, remove_mindskip, routers
from tune import Parser, command, naming, number

SUBSETS = 256  # more static subsets are not searched: each is scored on the whole test split
# Shots of the authors' benchmark script, github.com/CASE-Lab-UMD/LLM-Drop; 0 for tasks that are not named.
FEWSHOT = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5}
# fmt: off
QUALITY = {"average": "{average:.2f}", "+-": "{standard_error:.2f}",
           "to dense": "{to_dense:+.2f} +-{paired_standard_error:.2f}",
           "loss": "{loss:.4f}", "keep": "{keep:.3f}"}
COST = {"keep": "{keep:.2f}", "GFLOP prefill": "{prefill_gflop:.3f}", "MFLOP decode": "{decode_mflop:.3f}",
        "prefill ms": "{prefill[median]:.2f}",
        "x": "{prefill[speedup]:.2f} [{prefill[least]:.2f} {prefill[most]:.2f}]",
        "of limit": "{prefill[of_limit]:.2f}", "decode ms": "{decode[median]:.2f}",
        "x ": "{decode[speedup]:.2f} [{decode[least]:.2f} {decode[most]:.2f}]",
        "of limit ": "{decode[of_limit]:.2f}",
        "KV KiB": "{kv_kib:,.0f}", "peak MiB": "{peak_mib:.1f}"}
# fmt: on


# ---- Quality
@torch.no_grad()
def score_all(model, examples: list[dict], gates: dict, batch_size: int = 256) -> dict[str, torch.Tensor]:
    """{correct (N,), nats (N,), gates (N, layers)} under gates {layer: bool, or (N,) or (N, T) bool}."""
    parts, order = [], sorted(range(len(examples)), key=lambda i: -len(examples[i]["ids"]))  # less padding
    of_rows = {i: gate.view(len(order), -1) for i, gate in gates.items() if not isinstance(gate, bool)}
    for start in tqdm(range(0, len(order), batch_size), "scoring", leave=False, disable=None):
        index = order[start : start + batch_size]
        longest = len(examples[index[0]]["ids"]) - 1  # nothing is predicted from the last token
        with fix_gates(model, gates | {i: gate[index, :longest] for i, gate in of_rows.items()}):
            nats, correct = tune.score(model, [examples[i] for i in index])
        if not nats.isfinite().all():
            bad = [index[i] for i in (~nats.isfinite()).nonzero()[:, 0]]
            raise FloatingPointError(f"the loss of examples {bad[:5]} is not finite; try --dtype float32")
        gates_of = [router.gate.nanmean(1).cpu() for router in routers(model)]  # (B,), mean of a row
        parts.append((correct.cpu(), nats.cpu(), torch.stack(gates_of, 1)))
    back = torch.tensor(order).argsort()
    return dict(zip(("correct", "nats", "gates"), (torch.cat(column)[back] for column in zip(*parts))))


def summarize(scores: dict, dense: dict, examples: list[dict], routed: int) -> dict:
    """Accuracies in percent by task and on average (tasks count the same), with standard errors."""
    accuracy, of_dense, variance, paired = {}, [], 0.0, 0.0
    for name in dict.fromkeys(one["task"] for one in examples):
        chosen = torch.tensor([one["task"] == name for one in examples])
        right, before = (100.0 * one["correct"][chosen].double() for one in (scores, dense))
        accuracy[name] = right.mean().item()
        of_dense.append(before.mean().item())
        error = 1 / len(right) if len(right) > 1 else math.nan  # one example tells no error
        variance += right.var(correction=0).item() * error
        paired += (right - before).var(correction=0).item() * error
    average = statistics.mean(accuracy.values())
    tokens = sum(len(one["ids"]) - one["prompt"] for one in examples)
    return {
        "accuracy": accuracy,
        "by_task": list(accuracy.values()),
        "average": average,
        "to_dense": average - statistics.mean(of_dense),
        "standard_error": math.sqrt(variance) / len(accuracy),
        "paired_standard_error": math.sqrt(paired) / len(accuracy),
        "loss": scores["nats"].sum().item() / tokens,
        "keep": 1 - (1 - scores["gates"]).sum(1).mean().item() / routed,
    }


def attach(model, path, capacity: float | None = None, examples=()) -> tuple[tuple, dict[int, bool]]:
    """Put routers on every layer but the first: those of `path`, and zeros, so that any layer can be closed.

    capacity: a budget for which the threshold is chosen again, on `examples`. Returns the layers of `path`,
    and mindskip's row for `fix_gates`: {every other layer: True}.
    """
    weights = {router.layer: router.weight for router in routers(load_routers(model, path))}
    if capacity is not None:
        tune.calibrate(model, examples, capacity)
    config = replace(routers(model)[0].config, layers=tuple(attention_layers(model)[1:]))
    for router in routers(mindskip.add_mindskip(remove_mindskip(model), config)):
        router.weight = weights.get(router.layer, router.weight.requires_grad_(False))
    return tuple(weights), dict.fromkeys(set(config.layers) - set(weights), True)


@torch.no_grad()
def most_redundant(model, examples: list, count: int, batch_size: int) -> tuple[int, ...]:
    """`count` layers, never the first, to skip in: lowest mean 1 - cos(before, after) over prompts.

    before, after: the residual stream, at what the model's gates skip. Source: arXiv 2406.15786, section 3.
    """
    what = routers(model)[0].config.granularity if routers(model) else mindskip.GRANULARITIES[0]
    model = remove_mindskip(copied(model))  # gates may put results into new tensors, which can't be followed
    totals, added = dict.fromkeys(attention_layers(model)[1:], 0.0), {}

    def follow(i: int, layer, module, args, kwargs, output) -> None:
        before, after = [*args, *kwargs.values()][0], output[0] if isinstance(output, tuple) else output
        if module is mindskip.gated_module(layer, what) or before is added.get(i):
            added[i] = after  # by what is skipped; then a norm on the way to the residual stream changes it
        if module is layer:
            if what.startswith("attention"):  # it comes first in a layer
                after = before + added[i]
            elif what.startswith("mlp"):  # it comes last
                before = after - added[i]
            change = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T)
            totals[i] += change[batch["voters"].to(change.device)].sum().item()

    for i in totals:
        layer = decoder_of(model).layers[i]
        for module in (*layer.children(), layer):
            module.register_forward_hook(partial(follow, i, layer), with_kwargs=True)
    for start in range(0, len(examples), batch_size):
        batch = tune.collate(examples[start : start + batch_size], model.device)
        decoder_of(model)(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return tuple(sorted(sorted(totals, key=totals.get)[:count]))


def compare_quality(model, layers: tuple, others: dict, train: list[dict], test: list[dict], args) -> dict:
    """Print every row's quality on `test`, and keep ratios by task. `train` chooses static layers."""
    every = dict.fromkeys(sorted([*layers, *others]), True)
    scores_of = partial(score_all, model, batch_size=args.micro_batch_size)
    dense, routed = scores_of(test, every), scores_of(test, others)
    summary = partial(summarize, dense=dense, examples=test, routed=len(layers))

    @cache
    def static(closed: tuple) -> dict:
        return summary(scores_of(test, every | dict.fromkeys(closed, False)))

    columns = [list(every).index(i) for i in layers]
    gates, often_open = (one["gates"][:, columns] for one in (routed, scores_of(train, others)))
    keep = gates.mean().item()
    skipped = round((1 - keep) * len(layers))
    chosen = {"similarity": most_redundant(model, train, skipped, args.micro_batch_size)}
    chosen["router"] = tuple(sorted(layers[i] for i in often_open.mean(0).argsort()[:skipped].tolist()))
    if math.comb(len(every), skipped) <= SUBSETS:
        subsets = tqdm([*itertools.combinations(every, skipped)], "static subsets", leave=False, disable=None)
        chosen["best"] = max(subsets, key=lambda closed: static(closed)["average"])
    generator = torch.Generator().manual_seed(args.seed)
    units = max(len(one["ids"]) for one in test) if routers(model)[0].is_token else 1
    drawn = {i: torch.rand(len(test), units, generator=generator) < keep for i in layers}
    rows = {"dense": summary(dense), "mindskip": summary(routed)}
    rows |= {f"static, {name}": static(closed) for name, closed in chosen.items()}
    rows["random"] = summary(scores_of(test, others | drawn))
    by_task = {name: f"{{by_task[{k}]:.1f}}" for k, name in enumerate(rows["dense"]["accuracy"])}
    print("\n" + table("accuracy %", rows, by_task | QUALITY))
    print("static closes: " + ", ".join(f"{name} {list(closed)}" for name, closed in chosen.items()) + "\n")
    opens = {name: gates[[one["task"] == name for one in test]].mean(0).tolist() for name in by_task}
    by_layer = {f"layer {i}": f"{{layers[{k}]:.2f}}" for k, i in enumerate(layers)} | {"all": "{all:.2f}"}
    shares = {name: {"layers": row, "all": statistics.mean(row)} for name, row in opens.items()}
    print(table("keep ratio", shares, by_layer))
    return {"quality": rows, "static_layers": chosen, "keep_by_task": opens}


@torch.no_grad()
def explain(model, tokenizer, text: str, new_tokens: int) -> None:
    """Print what each router decides for a prompt, and how the model goes on."""
    if not text:
        raise ValueError("--explain: an empty prompt")
    prompt, rows = tokenizer(text, return_tensors="pt").to(model.device), {}
    ids = prompt["input_ids"][0].tolist()
    if tokenizer.unk_token_id in ids:
        print(f"WARNING: the tokenizer does not know all of {text!r}")
    model(**prompt, use_cache=False)
    for router in routers(model):
        gate = router.gate[0] > 0  # (U,)
        told = "open" if gate.all() else "closed"
        if router.is_token:  # its kept tokens; skipped ones are dots
            told = "".join(tokenizer.decode(i) if kept else "." for i, kept in zip(ids, gate))
        score = router.logit[0].sigmoid().mean()
        rows[f"layer {router.layer}"] = {"score": score, "threshold": router.config.threshold, "gate": told}
    columns = {"score": "{score:.3f}", "threshold": "{threshold:.3f}", "gate": "{gate}"}
    answer = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)[0, len(ids) :]
    print(f"\n{table(text, rows, columns)}\nanswer: {tokenizer.decode(answer, skip_special_tokens=True)}")


# ---- Cost
def forward_flops(model, tokens, visible, keep, logits=1, granularity="attention-sequence") -> float:
    """FLOPs of one row's forward pass; a multiply-add counts as 2.

    tokens: T, computed in this call. visible: S, keys that each may look at. keep: fraction of rows, or of
    tokens, that run what this granularity skips; 1 where none is given. logits: tokens that the head sees.
    Left out: norms, softmax, routers (D each), states of linear attention; nothing is taken off for causal
    masks and sliding windows. Multi-head latent attention (DeepSeek) comes out some 5% low.
    """
    text = model.config.get_text_config(decoder=True)
    visited = getattr(text, "num_experts_per_tok", None)  # of stacked experts, (experts, in, out)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    power = 0 if granularity.startswith("mlp") else 1 + granularity.endswith("token")  # of keep, in attention

    def size(module) -> float:
        matrices = [p for name, p in module.named_parameters() if p.ndim > 1 and not name.endswith("bias")]
        return sum(p[0].numel() * visited if p.ndim == 3 and visited else p.numel() for p in matrices)

    total = logits * model.get_output_embeddings().weight.numel()
    for i, layer in enumerate(decoder_of(model).layers):
        share, total = keep.get(i, 1.0), total + tokens * size(layer)
        if i in keep:
            total -= tokens * (1 - share) * size(mindskip.gated_module(layer, granularity))
        if getattr(layer, "self_attn", None) is not None:  # q . k, weights . v
            total += 2 * tokens * visible * share**power * text.num_attention_heads * head_dim
    return 2.0 * total


def prefill(model, prompts: torch.Tensor) -> tuple[Cache, torch.Tensor]:
    """The prompt pass (B, T): the filled cache, and the first new token (B, 1)."""
    output = model(prompts, use_cache=True, logits_to_keep=1)
    return mindskip.kv_cache(output), output.logits[:, -1:].argmax(-1)


def decode(model, cache: Cache, token: torch.Tensor, steps: int) -> torch.Tensor:
    """The one-token passes: `steps` more tokens, greedily."""
    for _ in range(steps):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)  # (B, 1)
    return token


@torch.no_grad()
def measure(rows: dict, groups: list[torch.Tensor], new_tokens: int, repeats: int) -> dict[str, dict]:
    """Weigh and time rows, {name: [(model, gates) for each group]}, on groups of prompts, (b, T) each.

    Times are sums over groups. Rows take turns, in an order that rotates: each repeat gives a ratio to dense,
    the first row, on the same machine's state.
    """
    names, times = list(rows), {(name, phase): [] for name in rows for phase in ("prefill", "decode")}
    results = {name: {"kv_kib": 0.0, "peak_mib": 0.0} for name in rows}
    for name, row in rows.items():  # the warm-up, too
        for (model, gates), group in zip(row, groups):
            before = 0  # bytes
            if group.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            with fix_gates(model, gates):
                with nullcontext() if group.is_cuda else Watch() as watch:
                    cache, token = prefill(model, group)
                peak = torch.cuda.max_memory_allocated() - before if group.is_cuda else watch.peak_bytes
                decode(model, cache, token, new_tokens)
            results[name]["peak_mib"] = max(results[name]["peak_mib"], peak / 2**20)
            held = [one for one in cache.layers if getattr(one, "is_initialized", False)]
            results[name]["kv_kib"] += sum(one.keys.nbytes + one.values.nbytes for one in held) / 2**10
    for repeat in tqdm(range(repeats), "timing", leave=False, disable=None):
        for name in names[repeat % len(rows) :] + names[: repeat % len(rows)]:
            clocks = []
            for (model, gates), group in zip(rows[name], groups):
                with fix_gates(model, gates):
                    start = time.perf_counter()
                    cache, token = prefill(model, group)
                    token.tolist()  # waits until the device has done all that it was given
                    between = time.perf_counter()
                    decode(model, cache, token, new_tokens).tolist()
                    clocks.append((between - start, (time.perf_counter() - between) / new_tokens))
            for phase, seconds in zip(("prefill", "decode"), zip(*clocks)):
                times[name, phase].append(1e3 * sum(seconds))
    for (name, phase), mine in times.items():
        dense, limit = times[names[0], phase], times.get((f"{name}, removed", phase), mine)
        base, median, cut = map(statistics.median, (dense, mine, limit))
        is_told = limit is not mine and base - cut > 0.05 * base  # of less, no share can be told
        ratios = [one / other for one, other in zip(dense, mine)]
        found = {"median": median, "of_limit": (base - median) / (base - cut) if is_told else math.nan}
        found |= {"speedup": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        results[name][phase] = found | {"all": mine}
    return results


class Watch(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, and the bytes alive in tensors that they made."""

    def __init__(self):
        super().__init__()
        self.operations, self.peak_bytes, self.made = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given, made = (  # storages by their addresses; some outputs are views of inputs
            {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t)}
            for tree in ((args, kwargs), output)
        )
        self.made = {at: one for at, one in self.made.items() if not one[0].expired()}
        for at in made.keys() - given.keys() - self.made.keys():
            self.made[at] = StorageWeakRef(made[at]), made[at].nbytes()
        self.operations += 1
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.made.values()))
        return output


def long_prompts(examples: list[dict], count: int, length: int) -> torch.Tensor:
    """(count, length) token ids: each row repeats examples of one task, one task after another."""
    rows, tasks = [], itertools.cycle(dict.fromkeys(one["task"] for one in examples))
    for i, task in zip(range(count), tasks):
        texts = [one["ids"] for one in examples if one["task"] == task]
        tokens = itertools.chain.from_iterable(itertools.cycle(texts[i:] + texts[:i]))
        rows.append(list(itertools.islice(tokens, length)))
    return torch.tensor(rows)


def copied(model) -> torch.nn.Module:
    """Other modules, of the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def multiplied(model, gates: dict[int, torch.Tensor]) -> torch.nn.Module:
    """A copy whose attention is computed and then multiplied by the gates (B,)."""

    def multiply(module, args, output, gate):
        return output[0] * gate.view(-1, 1, 1).to(output[0].dtype), *output[1:]

    model = copied(model)
    for i, gate in gates.items():
        decoder_of(model).layers[i].self_attn.register_forward_hook(partial(multiply, gate=gate))
    return model


def removed(model, gates: dict[int, torch.Tensor]) -> torch.nn.Module:
    """A copy of a model of Llama's kind: attention and its norm see only as many rows as `gates` (B,) keep.

    The limit: no gate, no index, no zeros. Weights are read, and keys kept, for those rows.
    """

    def forward(layer, kept: int, x, **kwargs):
        if kept:
            some = {name: mindskip.take_rows(value, slice(kept), len(x)) for name, value in kwargs.items()}
            x[:kept] += layer.self_attn(hidden_states=layer.input_layernorm(x[:kept]), **some)[0]
        return x + layer.mlp(layer.post_attention_layernorm(x))

    model = copied(model)
    for i, gate in gates.items():
        if not gate.all():
            layer = decoder_of(model).layers[i]
            layer.forward = partial(forward, layer, int(gate.sum()))
    return model


@torch.no_grad()
def compare_cost(dense, routed, ways: dict, prompts: torch.Tensor, size: int, args) -> dict[str, dict]:
    """Time and count ways to route prompts (B, T), {name: gates {layer: (B,) bool}, or {}: routers decide}.

    A row "NAME, removed" is the limit of NAME, left out where layers are not of Llama's kind.
    """
    found, groups, length = routers(routed), prompts.split(size), prompts.shape[1]
    granularity, decided, has_limit = found[0].config.granularity, {}, False

    def in_groups(gates: dict) -> list[dict]:
        return [{i: gate[k : k + size] for i, gate in gates.items()} for k in range(0, len(prompts), size)]

    if granularity == "attention-sequence":
        closed = {router.layer: torch.zeros(len(groups[0]), dtype=torch.bool) for router in found}
        with suppress(AttributeError, TypeError, RuntimeError), fix_gates(routed, closed):
            both = routed, removed(dense, closed)
            ours, cut = (model(groups[0], logits_to_keep=1).logits for model in both)
            has_limit = torch.allclose(ours, cut, rtol=0.01, atol=0.01 * ours.abs().max())
    rows = {"dense": [(dense, {})] * len(groups)}
    for name, gates in ways.items():
        with fix_gates(routed, gates):
            prefill(routed, prompts)
        decided[name] = {router.layer: router.gate > 0 for router in found}  # (B, U)
        rows[name] = [(routed, some) for some in in_groups(gates)]
        if has_limit and name != "static":
            rows[f"{name}, removed"] = [(removed(dense, some), {}) for some in in_groups(decided[name])]
    if granularity == "attention-sequence":
        rows["multiply"] = [(multiplied(dense, some), {}) for some in in_groups(decided[next(iter(ways))])]
    cost = measure(rows, groups, args.new_tokens, args.repeats)
    for name, row in cost.items():
        gates = decided.get(name.removesuffix(", removed"), {})  # dense and multiply: none
        row["kept"] = {i: gate.float().mean().item() for i, gate in gates.items()}
        row["keep"] = statistics.mean(row["kept"].values()) if row["kept"] else 1.0
        flops = partial(forward_flops, dense, keep=row["kept"], granularity=granularity)
        row["prefill_gflop"] = flops(length, length) / 1e9
        row["decode_mflop"] = flops(1, length + args.new_tokens) / 1e6
    return cost


def show_costs(dense, routed, ways: dict, prompts: torch.Tensor, args) -> dict[str, dict]:
    """Compare cost for the first tokens of prompts (B, T), for every length and number of rows at a time."""
    cost, prompts = {}, prompts.to(dense.device)
    for length, size in itertools.product(args.prompt_length, args.batch_size):
        name = f"{length} tokens, {size} at a time"
        cost[name] = compare_cost(dense, routed, ways, prompts[:, :length], size, args)
        print("\n" + table(name, cost[name], COST))
    told = f"in all for {len(prompts)} prompts, {args.new_tokens} new tokens each; median of"
    print(f"{told} {args.repeats} repeats [least most]; {torch.get_num_threads()} threads")
    return cost


def what_if(args) -> dict[str, dict]:
    """Cost of a model of random weights, made on its device: rows that agree, or don't, at --keep."""
    plan, (device, dtype) = tune.from_pretrained(AutoConfig, args), tune.device_and_dtype(args)
    torch.manual_seed(args.seed)
    options = {"attn_implementation": args.attn_implementation, "trust_remote_code": args.trust_remote_code}
    with torch.device(device):
        dense = AutoModelForCausalLM.from_config(plan, dtype=dtype, **options).eval().requires_grad_(False)
    layers, count = args.layers or tune.default_layers(dense), max(args.batch_size)
    routed = mindskip.add_mindskip(copied(dense), mindskip.MindSkipConfig(layers, args.granularity))
    closed, is_kept = round((1 - args.keep) * len(layers)), torch.arange(count) < round(args.keep * count)
    ways = {"rows agree": {i: torch.full((count,), k >= closed) for k, i in enumerate(layers)}}
    if count > 1:
        ways["rows differ"] = {i: is_kept[torch.randperm(count)] for i in layers}
    print(f"{tune.describe(dense, args)} | random weights\nlayers {layers} | keep ratio {args.keep}")
    known = dense.get_input_embeddings().num_embeddings
    return show_costs(dense, routed, ways, torch.randint(known, (count, max(args.prompt_length))), args)


# ---- Standard benchmarks, through lm-evaluation-harness (extra `tasks`)
def load_tasks(names: list[str], include_path: str | None):
    """The harness's task manager. ValueError if a task is unknown, or asks for more than to score answers."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    for name in names:  # their data, too, before the model's weights
        with naming(f"--tasks {name}"):
            found = manager.load([name])
            kinds = {task.OUTPUT_TYPE for task in found["tasks"].values()}
            if not kinds <= {"loglikelihood", "multiple_choice"}:
                raise ValueError(f"{kinds} is not supported, only choices and likelihoods")
            if name in found["groups"] and not found["groups"][name].aggregate_metric_list:
                raise ValueError("a group without a metric of its own; name its tasks")
    return manager


def harness_adapter(model, tokenizer, gates: dict, batch_size: int):
    """The harness's Hugging Face class, but scoring by `score_all`: padding and answers don't vote."""
    from lm_eval.models.huggingface import HFLM

    def score_requests(requests, **_) -> list[tuple[float, bool]]:
        examples = []
        for _, context, answer in requests:
            ids = (context + answer)[-(adapter.max_length + 1) :]  # the last token is never fed, only scored
            if len(ids) <= len(answer):
                raise ValueError(f"an answer of {len(answer)} tokens, in a model of {adapter.max_length}")
            examples.append({"ids": ids, "prompt": len(ids) - len(answer)})
        scores = score_all(model, examples, gates, batch_size)
        adapter.kept.append(scores["gates"])
        return list(zip((-scores["nats"]).tolist(), scores["correct"].tolist()))

    adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    adapter.kept, adapter._loglikelihood_tokens = [], score_requests
    return adapter


def compare_tasks(model, tokenizer, layers, others: dict, train: list[dict], manager, args) -> dict:
    """{row: {tasks: {name: {metric, shots, value, error}}, average, keep}}; percent, normalised if it can be.

    static: attention closed in as many layers as mindskip skips, chosen by similarity on training data.
    """
    from lm_eval import simple_evaluate

    options = {"limit": args.task_limit, "task_manager": manager, "log_samples": False}
    every = dict.fromkeys([*layers, *others], True)

    def run(gates: dict) -> dict:
        adapter, tasks = harness_adapter(model, tokenizer, gates, args.micro_batch_size), {}
        for name in args.tasks.split(","):
            shots = FEWSHOT.get(name, 0) if args.num_fewshot is None else args.num_fewshot
            found = simple_evaluate(adapter, tasks=[name], num_fewshot=shots, **options)["results"][name]
            choice = ("acc_norm,none", "acc,none", *found)
            metric = next(key for key in choice if isinstance(found.get(key), float))
            error = found.get(metric.replace(",", "_stderr,"))  # "N/A" where there is none
            tasks[name] = {"metric": metric.split(",")[0], "shots": shots, "value": 100 * found[metric]}
            tasks[name]["error"] = 100 * error if isinstance(error, float) else math.nan
        average = statistics.mean(one["value"] for one in tasks.values())
        keep = 1 - (1 - torch.cat(adapter.kept)).sum(1).mean().item() / len(layers)
        return {"tasks": tasks, "average": average, "keep": keep}

    rows = {"dense": run(every), "mindskip": run(others)}
    count = round((1 - rows["mindskip"]["keep"]) * len(layers))
    closed = most_redundant(model, train, count, args.micro_batch_size)
    rows["static"] = run(every | dict.fromkeys(closed, False)) | {"closed": closed}
    return rows


def show_tasks(rows: dict) -> None:
    columns = {}
    for name, at in rows["dense"]["tasks"].items():
        cell = f"{{tasks[{name}][value]:.1f}} +-{{tasks[{name}][error]:.1f}}"
        columns[f"{name} {at['metric']}, {at['shots']}-shot"] = cell
    print(table("%", rows, columns | {"average": "{average:.2f}", "keep": "{keep:.3f}"}))
    print(f"static closes {rows['static']['closed']}")


# ---- Showing
def table(title: str, rows: dict[str, dict], columns: dict[str, str]) -> str:
    """Aligned text. A column is a heading, and a format of a row's results that gives the cell."""
    lines = [[title, *columns]]
    for name, row in rows.items():
        lines.append([name, *(re.sub(r"\bnan\b", "-", cell.format(**row)) for cell in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in aligned)


def write_json(results: dict, path: Path) -> None:
    """With null where there is no number: JSON has no NaN."""
    valid = json.loads(json.dumps(results), parse_constant=lambda name: None)
    mindskip.write(json.dumps(valid, indent=2).encode(), path)


def plot(results: dict, path: Path) -> None:
    """What a gate does, which task opens which layer, and how tuning went; PNG and SVG."""
    from matplotlib.figure import Figure

    keep, layers, log = results["keep_by_task"], results["config"]["layers"], path.with_name("log.jsonl")
    figure = Figure(figsize=(15, 4), layout="constrained")
    left, right, run = figure.subplots(1, 3, width_ratios=[3, 2, 2])
    boxes = {  # text: its place, and those that arrows lead to
        "prompt, after layer norm:  $x_1 \\ldots x_T$": [(0.5, 1.0), (0.5, 0.77)],
        "router:  $r = \\overline{x} \\cdot w$,   score  $s = \\sigma(r)$": [(0.5, 0.77), (0.5, 0.53)],
        "gate, once for each prompt and layer:  $s \\geq \\tau$ ?": [(0.5, 0.53), (0.22, 0.25), (0.78, 0.25)],
        "open:  attention runs,\nits keys and values are cached": [(0.22, 0.25), (0.5, -0.04)],
        "closed:  attention is not called,\nnothing is cached": [(0.78, 0.25), (0.5, -0.04)],
        "residual stream, then the MLP": [(0.5, -0.04)],
    }
    look = {"boxstyle": "round,pad=0.5", "facecolor": "#dbe9f6", "edgecolor": "#2171b5"}
    arrow = {"arrowstyle": "->", "color": "#2171b5"}
    for text, ((x, y), *ends) in boxes.items():
        left.text(x, y, text, ha="center", va="center", bbox=look)
        for to_x, to_y in ends:
            left.annotate("", (to_x, to_y + 0.095), (x, y - 0.075), arrowprops=arrow)
    left.set(title="What a gate does", xlim=(-0.1, 1.1), ylim=(-0.12, 1.12))
    left.axis("off")
    right.imshow(list(keep.values()), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    right.set_title("How often each task opens each gate")
    right.set_xticks(range(len(layers)), [f"layer {i}" for i in layers])
    right.set_yticks(range(len(keep)), keep)
    for y, row in enumerate(keep.values()):
        for x, value in enumerate(row):
            color = "white" if value > 0.6 else "black"
            right.text(x, y, f"{value:.2f}", ha="center", va="center", color=color)
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for key, label in {"keep": "keep ratio, drawn", "loss": "loss, nats a token"}.items():
        values = [record[key] for record in records]
        means = [statistics.mean(values[max(0, k - 25) : k + 25]) for k in range(len(values))]
        run.plot([record["step"] for record in records], means, label=label)
    run.set(title="Tuning (means of 50 steps)", xlabel="step", ylim=0)
    run.legend()
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150)


# ---- The command
def parse_arguments(argv: list[str] | None = None):
    parser = Parser("Measure a tuned model against the dense one.", split="test")
    add = parser.add_argument_group("what is measured").add_argument
    add("--routers", default="runs/demo/routers.safetensors", help="folder or file of tune.py, or Hub id")
    add("--output", help="folder for results; None: beside the routers, or runs/NAME for a Hub id")
    add("--calibration-split", default="train", help="split that chooses static layers")
    add("--micro-batch-size", type=number(int, 1), default=256, help="examples scored at a time")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of the random gates")
    add("--plot", action="store_true", help="a figure, too; needs the extra `plot`")
    add = parser.add_argument_group("another run instead").add_mutually_exclusive_group().add_argument
    add("--capacity", type=number(float, 0, 1, many=True), help="only quality, at budgets as 0.25,0.5")
    add("--explain", metavar="TEXT", help="what routers decide for a prompt; -: one a line, from stdin")
    add("--what-if", action="store_true", help="only time --model, with random weights and gates")
    add("--tasks", help="tasks of lm-evaluation-harness, as arc_challenge,boolq; needs the extra `tasks`")
    add = parser.add_argument_group("cost").add_argument
    add("--prompt-length", type=number(int, 1, many=True), default=(128, 512, 2048), help="of timed prompts")
    add("--new-tokens", type=number(int, 1), default=8, help="decode passes after each prompt")
    add("--batch-size", type=number(int, 1, many=True), default=(1, 8), help="timed prompts at a time")
    add("--repeats", type=number(int, 2), default=3, help="timed repeats of every row")
    add("--keep", type=number(float, 0, 1), default=0.5, help="what-if: keep ratio")
    add("--granularity", choices=mindskip.GRANULARITIES, default=mindskip.GRANULARITIES[0], help="what-if")
    add("--layers", type=number(int, 1, many=True), help="what-if: routed layers, as 3,4; None: as tune.py")
    add = parser.add_argument_group("tasks").add_argument
    add("--num-fewshot", type=number(int, 0, 1000), help=f"shots; None: {FEWSHOT}, else 0")
    add("--task-limit", type=number(int, 1), help="questions of each task; None: all")
    add("--include-path", help="folder with task definitions of your own")
    args = parser.parse_args(argv)
    if not args.tasks and (args.tasks == "" or args.num_fewshot or args.task_limit or args.include_path):
        raise ValueError(f"--tasks {args.tasks}: name tasks, or leave out the flags that are for them")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)  # what is cheap to check comes first, the weights last
    for flag, package in (("plot", "matplotlib"), ("tasks", "lm_eval.models.huggingface")):
        if getattr(args, flag):
            with naming(f"--{flag} needs the extra `{flag}`: pip install -e '.[{flag}]'"):
                importlib.import_module(package)
    if args.what_if:
        cost, folder = what_if(args), Path(args.output or "runs/what-if")
        folder.mkdir(parents=True, exist_ok=True)
        return write_json({"arguments": vars(args), "cost": cost}, folder / "what-if.json")
    path = Path(args.routers)
    is_hub_id = args.routers.count("/") == 1 and path.suffix != ".safetensors" and not path.parent.is_dir()
    if not path.exists() and not is_hub_id:
        raise ValueError(f"--routers {path}: no such file, and not a Hub id (owner/name); run tune.py first")
    with naming(f"--routers {path}"):
        described, _ = mindskip.read_routers(path)
    config, about = described["config"], described["about"]
    manager = load_tasks(args.tasks.split(","), args.include_path) if args.tasks else None
    tokenizer = tune.from_pretrained(AutoTokenizer, args)
    base, adapter = about.get("base_model", args.model), about.get("adapter", args.adapter)
    if (base, adapter) != (args.model, args.adapter):
        beside = f"with --adapter {adapter}" if adapter else "without an adapter"
        print(f"WARNING: these routers were tuned on {base} {beside}")
    if "step" in about:
        print(f"UNFINISHED: routers of step {about['step']}, not calibrated; run tune.py --resume")
    if args.explain is not None:
        model = load_routers(tune.load_model(args, [{"ids": [0]}]), path)
        lines = (line.rstrip("\n") for line in sys.stdin if line.strip())
        for text in lines if args.explain == "-" else [args.explain]:
            explain(model, tokenizer, text, args.new_tokens)
        return
    train, _ = tune.load_examples(args, "--calibration-split", tokenizer)
    train = random.Random(args.seed).sample(train, min(tune.CALIBRATION, len(train)))
    test, told = ([], args.tasks) if args.tasks else tune.load_examples(args, "--split", tokenizer)
    is_timed = not (args.tasks or args.capacity)
    tokens = max(args.prompt_length) + args.new_tokens if is_timed else 0  # of timed prompts
    model = tune.load_model(args, train + test, tokens)
    layers, others = attach(model, path)
    beside = path if path.is_dir() else path.parent if path.exists() else f"runs/{path.name}"
    folder = Path(args.output or beside)
    folder.mkdir(parents=True, exist_ok=True)
    print(tune.describe(model, args))
    print(f"layers {layers} | capacity {config.capacity} | threshold {config.threshold:.4f} | {told}")
    results = {"config": vars(config), "arguments": vars(args)}
    if args.tasks:
        results["tasks"] = compare_tasks(model, tokenizer, layers, others, train, manager, args)
        write_json(results, folder / "tasks.json")  # first: a closed pipe ends the command at a print
        return show_tasks(results["tasks"])
    for capacity in args.capacity or ():
        layers, others = attach(model, path, capacity, train)
        print(f"\ncapacity {capacity} | threshold {routers(model)[0].config.threshold:.4f}")
        results[f"capacity {capacity}"] = compare_quality(model, layers, others, train, test, args)
    if args.capacity:
        return write_json(results, folder / "capacities.json")
    results |= compare_quality(model, layers, others, train, test, args)
    dense, routed = copied(remove_mindskip(model)), load_routers(model, path)
    count, closed = max(args.batch_size), len(results["static_layers"]["similarity"])
    ways = {"mindskip": {}, "static": {i: torch.full((count,), k >= closed) for k, i in enumerate(layers)}}
    prompts = long_prompts(test, count, max(args.prompt_length))
    results["cost"] = show_costs(dense, routed, ways, prompts, args)
    write_json(results, folder / "results.json")
    if args.plot:
        plot(results, folder / "results.png")


if __name__ == "__main__":
    main()
