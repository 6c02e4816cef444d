"""Measure what skipping attention costs in accuracy, and what it saves in FLOPs, time and memory.

    python evaluate.py                    # the routers in runs/demo on the demo's test split; two minutes
    python evaluate.py --plot             # and a figure (pip install -e '.[plot]')
    python evaluate.py --capacity 0.25,0.5,0.75     # the same routers at other budgets; no tuning
    python evaluate.py --explain "max kqzme="       # each layer's score and gate for a prompt; -: from stdin
    python evaluate.py --what-if --model HuggingFaceTB/SmolLM2-135M    # what would be saved? No tuning
    python evaluate.py --tasks boolq,piqa --routers runs/llama --model meta-llama/Meta-Llama-3-8B \\
        --dataset tatsu-lab/alpaca        # standard benchmarks (pip install -e '.[tasks]')

A row is a way to set gates, a dictionary for `fix_gates`. Static and random rows ask whether it is worth
anything that routing is *dynamic*:

    dense               every gate open; in the table of costs, the model without routers
    mindskip            the tuned routers decide
    static, similarity  attention closed in as many layers as mindskip skips: the most redundant by the cosine
                        similarity of a sublayer's input and output (LLM-Drop, arXiv 2406.15786)
    static, router      the layers that this very router closes most often on training data
    static, best        the best of all subsets of that size, chosen on the test split, in its favour
    random              each gate (a sequence's, or a token's) open with the probability mindskip's keep ratio
    static              in the table of costs: the first layers closed, as many as mindskip skips
    removed             the limit of a row's time: attention and its norm cut out, by the same decisions
    multiply            attention computed, then multiplied by the second row's gates: the control for time

A column is a heading and a format of a row's results. Counted (FLOP) and measured (ms) differ:

    accuracy    every token of the answer right, by argmax given the answer so far, as in greedy decoding
    +-          standard error; of a difference to dense, that of the paired difference
    loss        mean nats of an answer token
    keep        keep ratio: the fraction of routed gates that were open
    FLOP        by formula: one prompt's prefill, and the last decode step of one row
    prefill     milliseconds for all prompts, median; decode: for one more token of each
    x           median over repeats of dense time / row time in the same repeat [quartiles]
    of limit    (dense time - row time) / (dense time - removed time), of medians
    KV          keys and values of all prompts after decoding
    peak        most memory that a prefill allocates beyond the weights
"""

import copy
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
from functools import partial
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mindskip
from mindskip import attention_layers, fix_gates, last, load_routers, remove_mindskip, take_rows
from tune import CALIBRATION, Parser, calibrate, collate, command, default_layers, describe, device_and_dtype
from tune import from_pretrained, load_examples, load_model, naming, number, score

SUBSETS = 256  # more static subsets are not searched: each is scored on the whole test split

# ---- Quality


@torch.no_grad()
def score_all(model, examples: list[dict], gates: dict, batch_size: int = 256) -> dict[str, torch.Tensor]:
    """{correct (N,), nats (N,), gates (N, layers)} under gates {layer: bool, or (N,) or (N, T) bool}."""
    parts, order = [], sorted(range(len(examples)), key=lambda i: -len(examples[i]["ids"]))  # less padding
    of_rows = {i: gate.view(len(order), -1) for i, gate in gates.items() if not isinstance(gate, bool)}
    for start in tqdm(range(0, len(order), batch_size), "scoring", leave=False, disable=None):
        index = order[start : start + batch_size]
        longest = len(examples[index[0]]["ids"]) - 1  # nothing is predicted from the last token
        some = gates | {i: gate[index, :longest] for i, gate in of_rows.items()}
        with fix_gates(model, some):
            nats, correct = score(model, [examples[i] for i in index])
        if not nats.isfinite().all():
            bad = [index[i] for i in (~nats.isfinite()).nonzero()[:, 0]]
            raise FloatingPointError(f"the loss of examples {bad[:5]} is not finite; try --dtype float32")
        share = last(model, "gate").detach()  # (layers, B)
        if share.ndim == 3:  # (layers, B, T): of a row's tokens
            share = share.nanmean(2)
        parts.append((correct.cpu(), nats.cpu(), share.T.cpu()))
    back = torch.tensor(order).argsort()
    return dict(zip(("correct", "nats", "gates"), (torch.cat(column)[back] for column in zip(*parts))))


def summarize(scores: dict, dense: dict, examples: list[dict], routed: int) -> dict:
    """Accuracies in percent by task and on average (tasks count the same), with standard errors."""
    accuracy, variance, paired = {}, 0.0, 0.0
    for name in dict.fromkeys(one["task"] for one in examples):
        chosen = torch.tensor([one["task"] == name for one in examples])
        right, before = (100.0 * one["correct"][chosen].double() for one in (scores, dense))
        accuracy[name] = right.mean().item()
        error = 1 / len(right) if len(right) > 1 else math.nan  # one example tells no error
        variance += right.var(correction=0).item() * error
        paired += (right - before).var(correction=0).item() * error
    tokens = sum(len(one["ids"]) - one["prompt"] for one in examples)
    return {
        "accuracy": accuracy,
        "by_task": list(accuracy.values()),
        "average": statistics.mean(accuracy.values()),
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
    weights = {router.layer: router.weight for router in mindskip.routers(load_routers(model, path))}
    if capacity is not None:
        calibrate(model, examples, capacity)
    config = replace(mindskip.routers(model)[0].config, layers=tuple(attention_layers(model)[1:]))
    for router in mindskip.routers(mindskip.add_mindskip(remove_mindskip(model), config)):
        router.weight = weights.get(router.layer, router.weight.requires_grad_(False))
    return tuple(weights), dict.fromkeys(set(config.layers) - set(weights), True)


@torch.no_grad()
def most_redundant(model, examples: list, count: int, batch_size: int) -> tuple[int, ...]:
    """`count` layers, never the first, to skip in: lowest mean 1 - cos(before, after) over prompts.

    before, after: the residual stream, at what the model's gates skip. Source: arXiv 2406.15786, section 3.
    """
    found, totals = mindskip.routers(model), {}
    granularity = found[0].config.granularity if found else mindskip.GRANULARITIES[0]
    model = remove_mindskip(copied(model))  # gates may put results into new tensors, which can't be followed

    def watch(i: int, layer) -> None:
        skipped, added = mindskip.gated_module(layer, granularity), None

        def follow(child, args, output):  # what is skipped, then a norm or dropout on its way to the stream
            nonlocal added
            if child is skipped or (args and args[0] is added):
                added = output[0] if isinstance(output, tuple) else output

        def compare(_, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if granularity.startswith("attention"):  # it comes first in a layer
                after = before + added
            elif granularity.startswith("mlp"):  # it comes last
                before = after - added
            change = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)  # (B, T)
            totals[i] = totals.get(i, 0.0) + change[batch["voters"].to(change.device)].sum().item()

        for child in layer.children():
            child.register_forward_hook(follow)
        layer.register_forward_hook(compare, with_kwargs=True)

    for i in attention_layers(model)[1:]:
        watch(i, mindskip.decoder_of(model).layers[i])
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        mindskip.decoder_of(model)(ids, attention_mask=mask, use_cache=False)
    return tuple(sorted(sorted(totals, key=totals.get)[:count]))


def compare_quality(model, layers: tuple, others: dict, train: list[dict], test: list[dict], args):
    """Every row on `test`; `train` chooses static layers. Returns (rows, static layers, mindskip's gates)."""

    def row(gates: dict) -> dict:
        return score_all(model, test, gates, args.micro_batch_size)

    every = dict.fromkeys(sorted([*layers, *others]), True)
    dense, routed, columns = row(every), row(others), [list(every).index(i) for i in layers]
    keep = routed["gates"][:, columns].mean().item()
    skipped = round((1 - keep) * len(layers))
    often_open = score_all(model, train, others, args.micro_batch_size)["gates"][:, columns].mean(0)
    chosen = {"similarity": most_redundant(model, train, skipped, args.micro_batch_size)}
    chosen["router"] = tuple(sorted(layers[i] for i in often_open.argsort()[:skipped].tolist()))
    is_searched = math.comb(len(every), skipped) <= SUBSETS
    static = dict.fromkeys(itertools.combinations(every, skipped) if is_searched else chosen.values())
    for closed in tqdm(static, "static subsets", leave=False, disable=None):
        static[closed] = summarize(row(every | dict.fromkeys(closed, False)), dense, test, len(layers))
    if is_searched:
        chosen["best"] = max(static, key=lambda closed: static[closed]["average"])
    generator = torch.Generator().manual_seed(args.seed)
    units = max(len(one["ids"]) for one in test) if mindskip.routers(model)[0].is_token else 1
    drawn = {i: torch.rand(len(test), units, generator=generator) < keep for i in layers}
    rows = {"dense": summarize(dense, dense, test, len(layers))}
    rows["mindskip"] = summarize(routed, dense, test, len(layers))
    rows |= {f"static, {name}": static[closed] for name, closed in chosen.items()}
    rows["random"] = summarize(row(others | drawn), dense, test, len(layers))
    for one in rows.values():
        one["to_dense"] = one["average"] - rows["dense"]["average"]
    return rows, chosen, routed["gates"][:, columns]


@torch.no_grad()
def explain(model, tokenizer, text: str, new_tokens: int) -> None:
    """Print what each router decides for a prompt, and how the model goes on."""
    prompt = tokenizer(text, return_tensors="pt").to(model.device)
    if not text:
        raise ValueError("--explain: an empty prompt")
    model(**prompt, use_cache=False)
    rows, tokens = {}, prompt["input_ids"][0].tolist()
    for router in mindskip.routers(model):
        scores, gate = router.logit[0].sigmoid(), router.gate[0] > 0  # (U,)
        told = "open" if gate.all() else "closed"
        if router.is_token:  # its kept tokens; skipped ones are dots
            told = "".join(tokenizer.decode(token) if kept else "." for token, kept in zip(tokens, gate))
        row = {"score": scores.mean().item(), "threshold": router.config.threshold, "gate": told}
        rows[f"layer {router.layer}"] = row
    columns = {"score": "{score:.3f}", "threshold": "{threshold:.3f}", "gate": "{gate}"}
    answer = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)[0, len(tokens) :]
    print(f"\n{table(text, rows, columns)}\nanswer: {tokenizer.decode(answer, skip_special_tokens=True)}")


def show_quality(model, layers: tuple, others: dict, train: list[dict], test: list[dict], args) -> dict:
    """Compare quality, and print accuracy by row and keep ratio by task."""
    quality, chosen, gates = compare_quality(model, layers, others, train, test, args)
    tasks = {name: f"{{by_task[{k}]:.1f}}" for k, name in enumerate(quality["dense"]["accuracy"])}
    print("\n" + table("accuracy %", quality, tasks | QUALITY))
    print("static closes: " + ", ".join(f"{name} {list(closed)}" for name, closed in chosen.items()) + "\n")
    is_task = {name: torch.tensor([one["task"] == name for one in test]) for name in tasks}
    keep = {name: gates[chosen].mean(0).tolist() for name, chosen in is_task.items()}
    by_layer = {f"layer {i}": f"{{layers[{k}]:.2f}}" for k, i in enumerate(layers)} | {"all": "{all:.2f}"}
    rows = {name: {"layers": row, "all": statistics.mean(row)} for name, row in keep.items()}
    print(table("keep ratio", rows, by_layer))
    return {"quality": quality, "static_layers": chosen, "keep_by_task": keep}


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

    def size(module) -> float:
        matrices = [p for name, p in module.named_parameters() if p.ndim > 1 and not name.endswith("bias")]
        return sum(p[0].numel() * visited if p.ndim == 3 and visited else p.numel() for p in matrices)

    what, unit = granularity.split("-")
    total = 2.0 * logits * model.get_output_embeddings().weight.numel()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for i, layer in enumerate(mindskip.decoder_of(model).layers):
        share, total = keep.get(i, 1.0), total + 2.0 * tokens * size(layer)
        if i in keep:
            total -= 2.0 * tokens * (1 - share) * size(mindskip.gated_module(layer, granularity))
        if getattr(layer, "self_attn", None) is not None:
            attention = 4.0 * tokens * visible * text.num_attention_heads * head_dim  # q . k, weights . v
            total += attention * (1 if what == "mlp" else share**2 if unit == "token" else share)
    return total


def prefill(model, prompts: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
    """The prompt pass (B, T): the filled cache, and the first new token (B, 1)."""
    output = model(prompts, cache=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    return output.cache, output.logits[:, -1:].argmax(-1)


def decode(model, cache: DynamicCache, token: torch.Tensor, steps: int) -> torch.Tensor:
    """The one-token passes: `steps` more tokens, greedily."""
    for _ in range(steps):
        token = model(token, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)  # (B, 1)
    return token


def clock(device: torch.device) -> float:
    """Milliseconds, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return 1e3 * time.perf_counter()


@torch.no_grad()
def measure(rows: dict, prompts: list[torch.Tensor], new_tokens: int, repeats: int) -> dict[str, dict]:
    """Time rows, {name: for each group of prompts (b, T), a function that gives a context with the model}.

    Times are sums over groups. Rows take turns, in an order that rotates, so that each repeat gives a ratio
    to dense, the first row, on the same machine's state.
    """
    names, times = list(rows), {(name, phase): [] for name in rows for phase in ("prefill", "decode")}
    results = {name: weigh(rows[name], prompts, new_tokens) for name in names}  # the warm-up, too
    for repeat in tqdm(range(repeats), "timing", leave=False, disable=None):
        for name in names[repeat % len(rows) :] + names[: repeat % len(rows)]:
            clocks = []
            for context, group in zip(rows[name], prompts):
                with context() as model:
                    clocks.append([clock(group.device)])
                    cache, token = prefill(model, group)
                    clocks[-1].append(clock(group.device))
                    decode(model, cache, token, new_tokens)
                    clocks[-1].append(clock(group.device))
            times[name, "prefill"].append(sum(between - start for start, between, _ in clocks))
            times[name, "decode"].append(sum(end - between for _, between, end in clocks) / new_tokens)
    for (name, phase), mine in times.items():
        dense, median = times[names[0], phase], statistics.median(mine)
        ratios, base = [one / other for one, other in zip(dense, mine)], statistics.median(dense)
        q1, speedup, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        saved = base - statistics.median(times.get((f"{name}, removed", phase), dense))
        share = (base - median) / saved if saved > 0.05 * base else math.nan  # of less, no share can be told
        found = {"median": median, "speedup": speedup, "q1": q1, "q3": q3, "all": mine, "of_limit": share}
        results[name][phase] = found
    return results


def weigh(contexts: list, prompts: list[torch.Tensor], new_tokens: int) -> dict:
    """Of prefill the most MiB beyond the weights, and open gates by layer; KiB of KV after decoding."""
    found, on_gpu = {"kv_kib": 0.0, "peak_mib": 0.0, "kept": {}}, prompts[0].is_cuda
    for context, group in zip(contexts, prompts):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        with context() as model:
            with nullcontext() if on_gpu else Watch() as watch:
                cache, token = prefill(model, group)
            peak = torch.cuda.max_memory_allocated() - before if on_gpu else watch.peak_bytes
            found["peak_mib"] = max(found["peak_mib"], peak / 2**20)
            for router in mindskip.routers(model):  # now: where tokens have gates, decoding makes others
                share = router.gate.nanmean().item() * len(group) / sum(map(len, prompts))
                found["kept"][router.layer] = found["kept"].get(router.layer, 0.0) + share
            decode(model, cache, token, new_tokens)
        held = [one for one in cache.layers if getattr(one, "is_initialized", False)]
        found["kv_kib"] += sum(one.keys.nbytes + one.values.nbytes for one in held) / 2**10
    return found


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
    by_task, rows = {}, []
    for one in examples:
        by_task.setdefault(one["task"], []).append(one["ids"])
    for i, texts in zip(range(count), itertools.cycle(by_task.values())):
        tokens = itertools.chain.from_iterable(itertools.cycle(texts[i:] + texts[:i]))
        rows.append(list(itertools.islice(tokens, length)))
    return torch.tensor(rows)


def multiplied(model, gates: dict[int, torch.Tensor]) -> torch.nn.Module:
    """A copy, of the same weights, whose attention is computed and then multiplied by the gates (B,)."""
    model = copied(model)
    for i, gate in gates.items():

        def multiply(module, args, output, gate=gate):
            return output[0] * gate.view(-1, 1, 1).to(output[0].dtype), *output[1:]

        mindskip.decoder_of(model).layers[i].self_attn.register_forward_hook(multiply)
    return model


def copied(model) -> torch.nn.Module:
    """Other modules, of the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


class Removed:
    """Mixed into decoder layers of Llama's kind: attention and its norm see the first `kept` rows alone.

    The limit: no gate, no index, no zeros. Weights are read, and keys kept, for those rows.
    """

    def forward(self, x, **kwargs):
        if self.kept == len(x):
            return super().forward(x, **kwargs)
        if self.kept:
            some = {name: take_rows(value, slice(self.kept), len(x)) for name, value in kwargs.items()}
            x[: self.kept] += self.self_attn(hidden_states=self.input_layernorm(x[: self.kept]), **some)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


def removed(model, gates: dict[int, torch.Tensor]) -> torch.nn.Module:
    """A copy, of the same weights: each layer of `gates` has attention on as many rows as are open."""
    model = copied(model)
    for i, gate in gates.items():
        layer = mindskip.decoder_of(model).layers[i]
        layer.kept = int(gate.sum())
        mindskip._mix_in({layer: Removed})
    return model


@torch.no_grad()
def compare_cost(dense, routed, ways: dict, prompts: torch.Tensor, size: int, args) -> dict[str, dict]:
    """Time and count ways to route, {name: gates {layer: (B,) bool}, or None: routers decide}.

    prompts: (B, T), run `size` rows at a time. A row "NAME, removed" is the limit of NAME, left out where
    layers are not of Llama's kind.
    """
    groups, layers = prompts.split(size), [router.layer for router in mindskip.routers(routed)]
    closed, has_limit = dict.fromkeys(layers, torch.zeros(size, dtype=torch.bool)), False
    granularity = mindskip.routers(routed)[0].config.granularity
    with fix_gates(routed, closed):
        expected = routed(groups[0], logits_to_keep=1).logits
    with suppress(AttributeError, TypeError):  # of layers of another kind
        found = removed(dense, closed)(groups[0], logits_to_keep=1).logits
        has_limit = torch.allclose(expected, found, rtol=0.01, atol=0.01 * expected.abs().max())
    rows, multiply = {"dense": [partial(nullcontext, dense)] * len(groups)}, []
    for (name, gates), (k, group) in itertools.product(ways.items(), enumerate(groups)):
        some = {i: gate[k * size :][:size] for i, gate in (gates or {}).items()}
        rows.setdefault(name, []).append(partial(fix_gates, routed, some))
        if granularity == "attention-sequence":
            with fix_gates(routed, some):
                prefill(routed, group)
            found = {router.layer: router.gate.flatten() > 0 for router in mindskip.routers(routed)}
            if has_limit and name != "static":
                rows.setdefault(f"{name}, removed", []).append(partial(nullcontext, removed(dense, found)))
            if len(multiply) < len(groups):  # by the gates of the first way
                multiply.append(partial(nullcontext, multiplied(dense, found)))
    if multiply:
        rows["multiply"] = multiply
    cost, length = measure(rows, groups, args.new_tokens, args.repeats), prompts.shape[1]
    for name in ways:
        cost.get(f"{name}, removed", {})["kept"] = cost[name]["kept"]
    for row in cost.values():
        row["keep"] = statistics.mean(row["kept"].values()) if row["kept"] else 1.0
        flops = partial(forward_flops, dense, keep=row["kept"], granularity=granularity)
        row["prefill_gflop"] = flops(length, length) / 1e9
        row["decode_mflop"] = flops(1, length + args.new_tokens) / 1e6
    return cost


def what_if(args) -> dict[str, dict]:
    """Cost of a model of random weights, made on its device: rows that agree, or don't, at --keep."""
    device, dtype = device_and_dtype(args)
    torch.manual_seed(args.seed)
    options = {"dtype": dtype, "attn_implementation": args.attn_implementation}
    options |= {"trust_remote_code": args.trust_remote_code}
    with torch.device(device):
        dense = AutoModelForCausalLM.from_config(from_pretrained(AutoConfig, args), **options)
    dense.eval().requires_grad_(False)
    layers = args.layers or default_layers(dense)
    routed = mindskip.add_mindskip(copied(dense), mindskip.MindSkipConfig(layers, args.granularity))
    count, generator = max(args.batch_size), torch.Generator().manual_seed(args.seed)
    is_open = [k >= round((1 - args.keep) * len(layers)) for k in range(len(layers))]
    ways = {"rows agree": {i: torch.full((count,), o) for i, o in zip(layers, is_open)}}
    if count > 1:
        is_kept = torch.arange(count) < round(args.keep * count)
        ways["rows differ"] = {i: is_kept[torch.randperm(count, generator=generator)] for i in layers}
    prompts = partial(torch.randint, dense.get_input_embeddings().num_embeddings, device=device)
    print(f"{describe(dense, args)} | random weights\nlayers {layers} | keep ratio {args.keep}")
    return show_costs(dense, routed, ways, lambda length: prompts((count, length)), args)


def show_costs(dense, routed, ways: dict, prompts, args) -> dict[str, dict]:
    """Compare cost for every length T and number of rows at a time. prompts: a function of T, to (B, T)."""
    cost = {}
    for length, size in itertools.product(args.prompt_length, args.batch_size):
        name = f"{length} tokens, {size} at a time"
        cost[name] = compare_cost(dense, routed, ways, prompts(length), size, args)
        print("\n" + table(name, cost[name], COST))
    told = f"in all for {max(args.batch_size)} prompts, {args.new_tokens} new tokens each; median of"
    print(f"{told} {args.repeats} repeats [quartiles]; {torch.get_num_threads()} threads")
    return cost


# ---- Standard benchmarks, through lm-evaluation-harness (extra `tasks`)

# Shots of the authors' benchmark script, github.com/CASE-Lab-UMD/LLM-Drop; 0 for tasks that are not named.
FEWSHOT = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5}


def load_tasks(names: list[str], include_path: str | None):
    """The harness's task manager. ValueError if a task is unknown, or asks for more than to score answers."""
    with naming("--tasks needs the extra `tasks`: pip install -e '.[tasks]'"):
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

    class Adapter(HFLM):
        def _loglikelihood_tokens(self, requests, **kwargs):
            examples = []
            for _, context, answer in requests:
                ids = (context + answer)[-(self.max_length + 1) :]  # the last token is never fed, only scored
                if len(ids) <= len(answer):
                    raise ValueError(f"an answer of {len(answer)} tokens, in a model of {self.max_length}")
                examples.append({"ids": ids, "prompt": len(ids) - len(answer)})
            scores = score_all(model, examples, gates, batch_size)
            self.kept.append(scores["gates"])
            return list(zip((-scores["nats"]).tolist(), scores["correct"].tolist()))

    adapter = Adapter(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    adapter.kept = []
    return adapter


def run_tasks(model, tokenizer, gates: dict, routed: int, names: list[str], manager, args) -> dict:
    """{tasks: {name: {metric, shots, value, error}}, average, keep}; percent, normalised if it can be."""
    from lm_eval import simple_evaluate

    results, adapter = {}, harness_adapter(model, tokenizer, gates, args.micro_batch_size)
    options = {"limit": args.task_limit, "task_manager": manager, "log_samples": False}
    for name in names:
        shots = FEWSHOT.get(name, 0) if args.num_fewshot is None else args.num_fewshot
        found = simple_evaluate(adapter, tasks=[name], num_fewshot=shots, **options)["results"][name]
        choice = ("acc_norm,none", "acc,none", *found)
        metric = next(key for key in choice if isinstance(found.get(key), float))
        error = found.get(metric.replace(",", "_stderr,"))
        results[name] = {"metric": metric.split(",")[0], "shots": shots, "value": 100 * found[metric]}
        results[name]["error"] = 100 * error if isinstance(error, float) else math.nan
    average = statistics.mean(one["value"] for one in results.values())
    keep = 1 - (1 - torch.cat(adapter.kept)).sum(1).mean().item() / routed
    return {"tasks": results, "by_task": list(results.values()), "average": average, "keep": keep}


def compare_tasks(model, tokenizer, layers, others: dict, train: list[dict], names, manager, args) -> dict:
    """Dense, MindSkip, and attention closed in as many layers, chosen by similarity on training data."""
    every, rows = dict.fromkeys([*layers, *others], True), {}
    for name, gates in (("dense", every), ("mindskip", others)):
        rows[name] = run_tasks(model, tokenizer, gates, len(layers), names, manager, args)
    count = round((1 - rows["mindskip"]["keep"]) * len(layers))
    closed = most_redundant(model, train, count, args.micro_batch_size)
    gates = every | dict.fromkeys(closed, False)
    rows["static"] = run_tasks(model, tokenizer, gates, len(layers), names, manager, args)
    return rows | {"static": rows["static"] | {"closed": closed}}


# ---- Showing

# fmt: off
QUALITY = {"average": "{average:.2f}", "+-": "{standard_error:.2f}",
           "to dense": "{to_dense:+.2f} +-{paired_standard_error:.2f}",
           "loss": "{loss:.4f}", "keep": "{keep:.3f}"}
COST = {"keep": "{keep:.2f}", "GFLOP prefill": "{prefill_gflop:.3f}", "MFLOP decode": "{decode_mflop:.3f}",
        "prefill ms": "{prefill[median]:.2f}",
        "x": "{prefill[speedup]:.2f} [{prefill[q1]:.2f} {prefill[q3]:.2f}]",
        "of limit": "{prefill[of_limit]:.2f}", "decode ms": "{decode[median]:.2f}",
        "x ": "{decode[speedup]:.2f} [{decode[q1]:.2f} {decode[q3]:.2f}]",
        "of limit ": "{decode[of_limit]:.2f}",
        "KV KiB": "{kv_kib:,.0f}", "peak MiB": "{peak_mib:.1f}"}
# fmt: on


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
    from matplotlib import pyplot

    keep, layers, log = results["keep_by_task"], results["config"]["layers"], path.with_name("log.jsonl")
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained", width_ratios=[3, 2, 2])
    left, right, run = axes
    boxes = {  # place: text
        (0.5, 1.0): "prompt, after layer norm:  $x_1 \\ldots x_T$",
        (0.5, 0.77): "router:  $r = \\overline{x} \\cdot w$,   score  $s = \\sigma(r)$",
        (0.5, 0.53): "gate, once for each prompt and layer:  $s \\geq \\tau$ ?",
        (0.22, 0.25): "open:  attention runs,\nits keys and values are cached",
        (0.78, 0.25): "closed:  attention is not called,\nnothing is cached",
        (0.5, -0.04): "residual stream, then the MLP",
    }
    for at, text in boxes.items():
        look = {"boxstyle": "round,pad=0.5", "facecolor": "#dbe9f6", "edgecolor": "#2171b5"}
        left.text(*at, text, ha="center", va="center", bbox=look, fontsize=10)
    for start, end in ((0, 1), (1, 2), (2, 3), (2, 4), (3, 5), (4, 5)):
        (x, y), (to_x, to_y) = [*boxes][start], [*boxes][end]
        arrow = {"arrowstyle": "->", "color": "#2171b5"}
        left.annotate("", (to_x, to_y + 0.075), (x, y - 0.075), arrowprops=arrow)
    left.set(title="What a gate does", xlim=(-0.1, 1.1), ylim=(-0.12, 1.12))
    left.axis("off")
    right.imshow(list(keep.values()), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    right.set(title="How often each task opens each gate", xticks=range(len(layers)), yticks=range(len(keep)))
    right.set(xticklabels=[f"layer {i}" for i in layers], yticklabels=list(keep))
    for y, row in enumerate(keep.values()):
        for x, value in enumerate(row):
            color = "white" if value > 0.6 else "black"
            right.text(x, y, f"{value:.2f}", ha="center", va="center", color=color)
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for key, color, label in (
        ("loss", "#d94801", "loss, nats a token"),
        ("keep", "#2171b5", "keep ratio, drawn"),
    ):
        values = [record[key] for record in records]
        means = [statistics.mean(values[max(0, k - 25) : k + 25]) for k in range(len(values))]
        run.plot([record["step"] for record in records], means, color=color, label=label)
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
    add("--repeats", type=number(int, 2), default=5, help="timed repeats of every row")
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
    if args.plot:
        with naming("--plot needs the extra `plot`: pip install -e '.[plot]'"):
            import matplotlib

            matplotlib.use("Agg")
    if args.what_if:
        cost, folder = what_if(args), Path(args.output or "runs/what-if")
        folder.mkdir(parents=True, exist_ok=True)
        return write_json({"arguments": vars(args), "cost": cost}, folder / "what-if.json")
    path, names = Path(args.routers), args.tasks.split(",") if args.tasks else []
    if not path.exists() and (args.routers.count("/") != 1 or path.suffix == ".safetensors"):
        raise ValueError(f"--routers {path}: no such file, and not a Hub id (owner/name); run tune.py first")
    with naming(f"--routers {path}"):
        described, _ = mindskip.read_routers(path)
    config, step = described["config"], described["about"].get("step")
    manager = load_tasks(names, args.include_path) if names else None
    tokenizer = from_pretrained(AutoTokenizer, args)
    expected = {"base_model": args.model, "adapter": args.adapter} | described["about"]
    if (expected["base_model"], expected["adapter"]) != (args.model, args.adapter):
        adapter = f" with --adapter {expected['adapter']}" if expected["adapter"] else ""
        print(f"WARNING: these routers were tuned on {expected['base_model']}{adapter}")
    if args.explain is not None:
        model = load_routers(load_model(args, [{"ids": [0]}]), path)
        for text in sys.stdin if args.explain == "-" else [args.explain]:
            explain(model, tokenizer, text.rstrip("\n"), args.new_tokens)
        return
    train, _ = load_examples(args, "--calibration-split", tokenizer)
    train = random.Random(args.seed).sample(train, min(CALIBRATION, len(train)))
    test, told = ([], f"{len(names)} tasks") if names else load_examples(args, "--split", tokenizer)
    model = load_model(args, train + test, 0 if names else max(args.prompt_length) + args.new_tokens)
    layers, others = attach(model, path)
    beside = path if path.is_dir() else path.parent if path.exists() else Path("runs", path.name)
    folder = Path(args.output or beside)
    folder.mkdir(parents=True, exist_ok=True)
    print(describe(model, args))
    print(f"layers {layers} | capacity {config.capacity} | threshold {config.threshold:.4f} | {told}")
    if step is not None:
        print(f"UNFINISHED: these are the routers of step {step}, not calibrated; run tune.py --resume")
    results = {"config": vars(config), "arguments": vars(args)}
    if names:
        rows = compare_tasks(model, tokenizer, layers, others, train, names, manager, args)
        write_json(results | {"tasks": rows}, folder / "tasks.json")
        columns = {}
        for k, (name, at) in enumerate(rows["dense"]["tasks"].items()):
            cell = f"{{by_task[{k}][value]:.1f}} +-{{by_task[{k}][error]:.1f}}"
            columns[f"{name} {at['metric']}, {at['shots']}-shot"] = cell
        print(table("%", rows, columns | {"average": "{average:.2f}", "keep": "{keep:.3f}"}))
        return print(f"static closes {rows['static']['closed']}")
    if args.capacity:
        for capacity in args.capacity:
            layers, others = attach(model, path, capacity, train)
            print(f"\ncapacity {capacity} | threshold {mindskip.routers(model)[0].config.threshold:.4f}")
            results[f"capacity {capacity}"] = show_quality(model, layers, others, train, test, args)
        return write_json(results, folder / "capacities.json")
    results |= show_quality(model, layers, others, train, test, args)
    dense, routed = copied(remove_mindskip(model)), load_routers(model, path)
    count, closed = max(args.batch_size), len(results["static_layers"]["similarity"])
    ways = {"mindskip": None, "static": {i: torch.full((count,), k >= closed) for k, i in enumerate(layers)}}
    prompts = partial(long_prompts, test, count)
    results["cost"] = show_costs(dense, routed, ways, lambda length: prompts(length).to(model.device), args)
    write_json(results, folder / "results.json")
    if args.plot:
        plot(results, folder / "results.png")


if __name__ == "__main__":
    main()
