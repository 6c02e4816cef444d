"""Measure what skipping attention costs in accuracy, and what it saves in FLOPs, time and memory.

    python evaluate.py                    # the routers in runs/demo on the demo's test split; about a minute
    python evaluate.py --plot             # and figures (pip install -e '.[plot]')
    python evaluate.py --tasks arc_challenge,boolq,hellaswag,mmlu,openbookqa,piqa,rte,winogrande \\
        --model meta-llama/Meta-Llama-3-8B --dataset tatsu-lab/alpaca --max-samples 500 --routers runs/llama
                                          # the paper's table (pip install -e '.[tasks]')

Rows. The static ones and random ask whether it is worth anything that routing is *dynamic*:

    dense               the model as it was
    mindskip            the tuned routers
    static, similarity  attention removed from as many layers as mindskip skips, those of the lowest
                        1 - cosine similarity between a sublayer's input and output on training data
                        (the criterion of LLM-Drop, arXiv 2406.15786)
    static, best        the best of all subsets of that size, chosen on the test split itself, in its favour; not
                        searched where there are more than SUBSETS
    static, router      the layers that this very router closes most often on training data
    random              gates drawn at random, each open with mindskip's keep ratio; the mean of several draws, in
                        the table of costs one draw
    multiply            attention computed, then multiplied by mindskip's gates: the control for time

Columns. Counted (FLOPs) and measured (time) are different things and different columns:

    accuracy    every token of the answer right, by argmax given the answer so far: greedy decoding's exact match
    +-          standard error; of a difference to dense, that of the paired difference
    loss        mean nats for each answer token
    keep        keep ratio: the fraction of routed gates that were open
    FLOP        by formula, of one prompt's prefill, and of the last decode step of one row
    prefill     milliseconds for the prompt pass of a batch;   decode  milliseconds for each one-token pass of it
    x           median over repeats of dense time / row time in the same repeat;   [q1 q3] quartiles
    KV          bytes of keys and values of a batch after decoding;   peak  most memory allocated beyond the weights
"""

import argparse
import difflib
import itertools
import json
import logging
import math
import statistics
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from huggingface_hub import hf_hub_download
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from mindskip import (
    MindSkip,
    MindSkipConfig,
    add_mindskip,
    fix_gates,
    load_routers,
    read_routers,
    remove_mindskip,
    routed,
)
from tune import (
    CALIBRATION,
    Parser,
    add_input_arguments,
    attention_layers,
    check_bounds,
    check_folder,
    check_vocabulary,
    collate,
    describe,
    examples_of,
    load_tokenizer,
    model_of,
    naming,
    prompt_of,
    quiet,
    show_progress,
    subset,
    versions,
)

# ---------------------------------------------------------------------------------------------
# Rows: each is a way to set the model up for a batch, and to put it back


@dataclass
class Row:
    name: str
    using: Callable  # using(model, batch size) -> context manager


@contextmanager
def _attached(model, attach, gates=None):
    attach(model)
    try:
        with fix_gates(model, gates or {}):
            yield
    finally:
        remove_mindskip(model)


def dense() -> Row:
    return Row("dense", lambda model, batch: nullcontext())


def mindskip(path) -> Row:
    return Row("mindskip", lambda model, batch: _attached(model, lambda m: load_routers(m, path)))


def static(name: str, closed) -> Row:
    """Attention removed from the layers `closed`, whatever the input."""
    if not closed:
        return Row(name, dense().using)
    config, gates = MindSkipConfig(closed), dict.fromkeys(closed, False)
    return Row(name, lambda model, batch: _attached(model, lambda m: add_mindskip(m, config), gates))


def random_gates(config: MindSkipConfig, keep: float, seed: int) -> Row:
    """Each gate open with probability `keep`, drawn anew for each row of each batch."""
    generator = torch.Generator().manual_seed(seed)

    def using(model, batch):
        gates = {i: torch.rand(batch, generator=generator) < keep for i in config.layers}
        return _attached(model, lambda m: add_mindskip(m, config), gates)

    return Row("random", using)


def multiply(gates: dict[int, torch.Tensor]) -> Row:
    """Attention computed, then multiplied by the given gates (B, 1, 1), on the model as it was."""

    @contextmanager
    def using(model, batch):
        def hook(gate):
            return lambda module, args, output: (output[0] * gate.to(output[0].dtype), *output[1:])

        layers = model.get_decoder().layers
        handles = [layers[i].self_attn.register_forward_hook(hook(gate)) for i, gate in gates.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return Row("multiply", using)


# ---------------------------------------------------------------------------------------------
# Quality

SUBSETS = 256  # more static subsets are not searched: each is scored on the whole test split


@torch.no_grad()
def score_answers(model, examples: list[dict], row: Row = dense(), batch_size: int = 256,
          progress=lambda done, total: None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Score answers given their prompts; only prompts vote.

    Returns, for N examples: correct (N,) bool; loss (N,) summed nats; tokens (N,) answer tokens;
    gates (N, routed layers), without columns where nothing is routed.
    """
    collected = {"correct": [], "loss": [], "tokens": [], "gates": []}
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["ids"]))  # less padding
    for start in range(0, len(order), batch_size):
        chosen = [examples[i] for i in order[start : start + batch_size]]
        batch = collate(chosen, model.device)
        first = min(len(prompt_of(example)) for example in chosen) - 1  # the position that predicts the first answer
        targets = batch.pop("labels")[:, first + 1 :]  # (B, A)
        batch = {name: value[:, :-1] for name, value in batch.items()}  # nothing is predicted from the last token
        with row.using(model, len(chosen)):
            if not (skips := routed(model)):
                batch.pop("voters")
            width = targets.shape[1]  # A, the answers' width; 0 is an empty answer, but logits_to_keep=0 means all
            logits = model(**batch, use_cache=False, logits_to_keep=max(1, width)).logits.float()
            logits = logits[:, logits.shape[1] - width :]  # (B, A, vocabulary)
            gates = [skip.gate.flatten().cpu() for skip in skips]
        targets = targets.to(logits.device)
        is_answer = targets != -100
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # 0 where ignored
        collected["correct"].append(((logits.argmax(-1) == targets) | ~is_answer).all(1))
        collected["loss"].append(loss.sum(1))
        collected["tokens"].append(is_answer.sum(1))
        collected["gates"].append(torch.stack(gates, 1) if gates else torch.empty(len(chosen), 0))
        progress(start + len(chosen), len(order))
    back = torch.tensor(order).argsort()
    return {name: torch.cat(values).cpu()[back] for name, values in collected.items()}


def summarize(scores: dict, reference: dict, tasks: list[str]) -> dict:
    """Accuracies in percent by task and on average (every task counts the same), with standard errors."""
    names = list(dict.fromkeys(tasks))
    by_task, average, variance, paired = {}, 0.0, 0.0, 0.0
    for name in names:
        chosen = torch.tensor([task == name for task in tasks])
        right = 100.0 * scores["correct"][chosen].double()
        change = right - 100.0 * reference["correct"][chosen].double()
        by_task[name] = right.mean().item()
        average += right.mean().item() / len(names)
        variance += right.var(correction=0).item() / len(right) / len(names) ** 2
        paired += change.var(correction=0).item() / len(right) / len(names) ** 2
    return {
        "accuracy": by_task, "average": average, "standard_error": math.sqrt(variance),
        "paired_standard_error": math.sqrt(paired), "loss": (scores["loss"].sum() / scores["tokens"].sum()).item(),
        "keep": scores["gates"].mean().item() if scores["gates"].numel() else 1.0,
    }  # fmt: skip


@torch.no_grad()
def similarity_order(model, examples: list[dict], batch_size: int) -> list[int]:
    """Attention layers but the first, the most redundant first: lowest 1 - cos(x, x + F(x)), mean over prompt tokens.

    F(x) is what the attention sublayer adds to the residual stream x. Source: arXiv 2406.15786, section 3.
    """
    layers, handles, seen = model.get_decoder().layers, [], {}

    def watch(i, layer):
        def enter(module, args, kwargs):
            seen[i] = {"x": args[0] if args else kwargs["hidden_states"]}

        def leave(module, args, kwargs, output):
            seen[i]["added"] = output[0]

        def follow(module, args, output):  # a norm or dropout on the way from attention to the residual stream
            if args and args[0] is seen[i].get("added"):
                seen[i]["added"] = output

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(leave, with_kwargs=True))
        handles.extend(child.register_forward_hook(follow) for _, child in layer.named_children())

    for i in attention_layers(model)[1:]:
        watch(i, layers[i])
    totals, count = {}, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], model.device)
        voters = batch["voters"]
        model.get_decoder()(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for i, at in seen.items():
            x, y = at["x"].float(), (at["x"] + at["added"]).float()
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            totals[i] = totals.get(i, 0.0) + (1 - cosine)[voters.to(cosine.device)].sum().item()
        count += voters.sum().item()
    for handle in handles:
        handle.remove()
    return sorted(totals, key=lambda i: totals[i] / count)


# ---------------------------------------------------------------------------------------------
# FLOPs, by formula


def forward_flops(model, tokens: int, visible: int, keep: dict[int, float], logits: int = 1) -> float:
    """FLOPs of one row's forward pass; a multiply-add counts as 2.

    Left out: norms, softmax, routers (D each), the states of linear attention. Multi-head latent attention (DeepSeek)
    comes out some 5% low. Neither the causal mask nor a sliding window is taken off.

    Args:
        tokens: T, computed in this call. visible: S, keys that each may look at.
        keep: fraction of rows that run the attention of a layer; 1 where a layer is not named.
        logits: tokens that go through the output head.
    """
    text = model.config.get_text_config(decoder=True)

    def size(module) -> float:  # of its matrices; of stacked experts (experts, in, out), those that a token visits
        chosen = getattr(text, "num_experts_per_tok", None)
        matrices = [p for name, p in module.named_parameters() if p.ndim > 1 and not name.endswith("bias")]
        return sum(p[0].numel() * chosen if p.ndim == 3 and chosen else p.numel() for p in matrices)

    total = 2.0 * logits * model.get_output_embeddings().weight.numel()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for i, layer in enumerate(model.get_decoder().layers):
        total += 2.0 * tokens * size(layer)
        if (attention := getattr(layer, "self_attn", None)) is not None:
            inside = size(attention.attention if isinstance(attention, MindSkip) else attention)
            scores = 4.0 * tokens * visible * text.num_attention_heads * head_dim  # q . k, then weights . v
            total += keep.get(i, 1.0) * (2.0 * tokens * inside + scores) - 2.0 * tokens * inside
    return total


# ---------------------------------------------------------------------------------------------
# Time and memory


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def prefill(model, prompts: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
    """The prompt pass (B, T): the filled cache, and the first new token (B, 1)."""
    output = model(prompts, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits[:, -1:].argmax(-1)


def decode(model, cache: DynamicCache, token: torch.Tensor, steps: int) -> torch.Tensor:
    """The one-token passes: `steps` more tokens, greedily."""
    for _ in range(steps):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)  # (B, 1)
    return token


def cache_bytes(cache: DynamicCache) -> int:
    return sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if getattr(layer, "is_initialized", False)
    )


@torch.no_grad()
def measure(model, rows: list[Row], prompts: torch.Tensor, new_tokens: int, repeats: int, progress) -> dict[str, dict]:
    """Time the rows in turn, in an order that rotates, after one warm-up: each repeat gives one ratio to dense."""
    times = {row.name: {"prefill": [], "decode": []} for row in rows}
    results = {row.name: {} for row in rows}
    for repeat in range(-1, repeats):
        for row in rows[repeat % len(rows) :] + rows[: repeat % len(rows)]:
            with row.using(model, len(prompts)):
                synchronize(model.device)
                start = time.perf_counter()
                cache, token = prefill(model, prompts)
                synchronize(model.device)
                between = time.perf_counter()
                decode(model, cache, token, new_tokens)
                synchronize(model.device)
                end = time.perf_counter()
                if repeat < 0:
                    gates = {skip.layer: skip.gate for skip in routed(model)}
                    results[row.name].update(kv_bytes=cache_bytes(cache), gates=gates)
                    results[row.name]["peak_bytes"] = peak_bytes(model, prompts, new_tokens)
                else:
                    times[row.name]["prefill"].append(1e3 * (between - start))
                    times[row.name]["decode"].append(1e3 * (end - between) / new_tokens)
        progress(repeat + 2, repeats + 1)
    for name, phases in times.items():
        for phase, values in phases.items():
            ratios = [base / value for base, value in zip(times[rows[0].name][phase], values)]
            low, middle, high = statistics.quantiles(values, n=4)
            results[name][phase] = {
                "median_ms": middle,
                "q1_ms": low,
                "q3_ms": high,
                "speedup": statistics.median(ratios),
            }
    return results


class Watch(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, and the bytes alive in tensors that they made."""

    def __init__(self):
        super().__init__()
        self.operations, self.peak_bytes, self.given, self.made = 0, 0, {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self._note(self.given, (args, kwargs))  # weights and inputs
        output = function(*args, **(kwargs or {}))
        self.made = {key: at for key, at in self.made.items() if not at[0].expired()}
        self._note(self.made, output)
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.made.values()))
        return output

    def _note(self, where: dict, tree) -> None:
        for storage in (t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.given and storage._cdata not in self.made:
                where[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # which keeps the address taken


def peak_bytes(model, prompts: torch.Tensor, new_tokens: int) -> int:
    """Most memory allocated beyond the weights while prefilling and decoding."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        decode(model, *prefill(model, prompts), new_tokens)
        return torch.cuda.max_memory_allocated() - before
    with Watch() as watch:
        decode(model, *prefill(model, prompts), new_tokens)
    return watch.peak_bytes


def long_prompts(examples: list[dict], count: int, length: int) -> torch.Tensor:
    """(count, length) token ids: prompts of one task after another, repeated until they are long enough."""
    by_task = {}
    for example in examples:
        by_task.setdefault(example["task"], []).append(example["ids"])
    rows = []
    for i in range(count):
        own = by_task[list(by_task)[i % len(by_task)]]
        tokens = list(itertools.islice(itertools.chain.from_iterable(itertools.cycle(own[i:] + own[:i])), length))
        rows.append(tokens)
    return torch.tensor(rows)


# ---------------------------------------------------------------------------------------------
# Standard benchmarks, through lm-evaluation-harness (extra `tasks`)

# Shots of the authors' benchmark script, github.com/CASE-Lab-UMD/LLM-Drop; 0 for tasks that are not named.
FEWSHOT = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5}


def import_harness():
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install -e '.[tasks]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def load_tasks(names: list[str], include_path: str | None):
    """The harness's task manager. ValueError if a task is unknown, or asks for more than to score answers."""
    manager = import_harness().tasks.TaskManager(include_path=include_path)
    known = manager.all_subtasks + manager.all_groups
    if unknown := [name for name in names if name not in known]:
        close = difflib.get_close_matches(unknown[0], known)
        raise ValueError(f"--tasks {unknown[0]}: no task or group of lm-evaluation-harness; close are {close}")
    for name in names:  # their data, too, before the model's weights
        with naming(f"--tasks {name}"):
            loaded = manager.load([name])
        for task in loaded["tasks"].values():
            if task.OUTPUT_TYPE not in ("loglikelihood", "multiple_choice"):
                raise ValueError(f"--tasks {name}: {task.OUTPUT_TYPE} is not supported, only choices and likelihoods")
        if name in loaded["groups"] and not loaded["groups"][name].aggregate_metric_list:
            raise ValueError(f"--tasks {name}: a group without a metric of its own; name its tasks")
    return manager


def harness_adapter(model, tokenizer, batch_size: int, label: str):
    """A model of the harness that scores by `score_answers`: routers see the context, not padding or the answers."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        def __init__(self):
            super().__init__()
            self.tokenizer, self.gates = tokenizer, []
            self.max_length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 2048)

        eot_token_id = property(lambda self: tokenizer.eos_token_id)
        prefix_token_id = property(
            lambda self: tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        )

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            if add_special_tokens is None:  # a text may bring its BOS along
                add_special_tokens = not string.startswith(tokenizer.decode(self.prefix_token_id))
            return tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def _loglikelihood_tokens(self, requests, **kwargs):
            examples = []
            for _, context, answer in requests:
                if len(answer) > self.max_length:
                    raise ValueError(
                        f"an answer of {len(answer)} tokens, where the model has {self.max_length} positions"
                    )
                ids = (context + answer)[-(self.max_length + 1) :]  # the last token is never fed, only scored
                examples.append({"ids": ids, "labels": [-100] * (len(ids) - len(answer)) + answer})
            scores = score_answers(model, examples, batch_size=batch_size, progress=show_progress(label))
            self.gates.append(scores["gates"])
            return list(zip((-scores["loss"]).tolist(), scores["correct"].tolist()))

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError("there is no context that could vote")

        def generate_until(self, requests, disable_tqdm=False):
            raise NotImplementedError("generated answers: use model.generate")

    return Adapter()


def run_tasks(model, tokenizer, row: Row, names: list[str], manager, batch_size: int, fewshot: int | None = None,
              limit: int | None = None) -> dict:  # fmt: skip
    """{tasks: {name: {metric, value, standard_error, shots}}, average, keep}; percent. Normalised accuracy, if any."""
    results, gates = {}, []
    for name in names:
        shots = FEWSHOT.get(name, 0) if fewshot is None else fewshot
        with row.using(model, batch_size):
            adapter = harness_adapter(model, tokenizer, batch_size, f"{name}, {row.name}")
            results_of = import_harness().simple_evaluate(adapter, tasks=[name], num_fewshot=shots, limit=limit,
                                                          task_manager=manager, log_samples=False)  # fmt: skip
        found = results_of["results"][name]
        metric = next(key for key in ("acc_norm,none", "acc,none", *found) if isinstance(found.get(key), float))
        error = found.get(metric.replace(",", "_stderr,"))
        results[name] = {"metric": metric.split(",")[0], "shots": shots, "value": 100 * found[metric],
                         "standard_error": 100 * error if isinstance(error, float) else None}  # fmt: skip
        gates += adapter.gates
    gates = torch.cat(gates)
    average = statistics.mean(result["value"] for result in results.values())
    return {"tasks": results, "average": average, "keep": gates.mean().item() if gates.numel() else 1.0}


def compare_tasks(model, tokenizer, config: MindSkipConfig, ours: Row, train: list[dict], names: list[str], manager,
                  args) -> dict:  # fmt: skip
    """Dense, MindSkip, and attention removed from as many layers, chosen by similarity on training data."""
    run = partial(run_tasks, model, tokenizer, names=names, manager=manager, batch_size=args.micro_batch_size,
                  fewshot=args.num_fewshot, limit=args.task_limit)  # fmt: skip
    results = {"dense": run(dense()), "mindskip": run(ours)}
    skipped = round((1 - results["mindskip"]["keep"]) * len(config.layers))
    closed = tuple(sorted(similarity_order(model, train, args.micro_batch_size)[:skipped]))
    results["static"] = {**run(static("static", closed)), "keep": 1 - skipped / len(config.layers), "closed": closed}
    return results


def tasks_table(results: dict) -> str:
    heads = [f"{name} {at['metric']}, {at['shots']}-shot" for name, at in results["dense"]["tasks"].items()]
    lines = []
    for name, row in results.items():
        errors = [at["standard_error"] for at in row["tasks"].values()]
        cells = [f"{at['value']:.1f} +-{math.nan if error is None else error:.1f}"
                 for at, error in zip(row["tasks"].values(), errors)]  # fmt: skip
        lines.append([name, *cells, f"{row['average']:.2f}", f"{row['keep']:.3f}"])
    return table(["%", *heads, "average", "keep"], lines)


# ---------------------------------------------------------------------------------------------
# Showing


def table(header: list[str], lines: list[list[str]]) -> str:
    """Aligned columns; the first to the left, the rest to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in [header, *lines]
    )


def quality_table(quality: dict[str, dict]) -> str:
    tasks = list(quality["dense"]["accuracy"])
    lines = []
    for name, row in quality.items():
        change = f"{row['average'] - quality['dense']['average']:+.2f} +-{row['paired_standard_error']:.2f}"
        lines.append([name, *(f"{row['accuracy'][task]:.1f}" for task in tasks), f"{row['average']:.2f}",
                      f"{row['standard_error']:.2f}", "" if name == "dense" else change, f"{row['loss']:.4f}",
                      f"{row['keep']:.3f}"])  # fmt: skip
    return table(["accuracy %", *tasks, "average", "+-", "to dense", "loss", "keep"], lines)


def cost_table(cost: dict[str, dict]) -> str:
    lines = []
    for name, row in cost.items():
        timing = []
        for phase in ("prefill", "decode"):
            at = row[phase]
            timing += [f"{at['median_ms']:.2f} [{at['q1_ms']:.2f} {at['q3_ms']:.2f}]", f"{at['speedup']:.2f}"]
        counted = [f"{row['keep']:.2f}", f"{row['prefill_gflops']:.3f}", f"{row['decode_mflops']:.3f}"]
        memory = [f"{row['kv_bytes'] / 1024:,.0f}", f"{row['peak_bytes'] / 2**20:.1f}"]
        lines.append([name, *counted, *timing, *memory])
    counted, timing = ["keep", "GFLOP prefill", "MFLOP decode"], ["prefill ms", "x", "decode ms", "x"]
    return table(["cost", *counted, *timing, "KV KiB", "peak MiB"], lines)


def keep_table(gates: torch.Tensor, tasks: list[str], layers: tuple[int, ...]) -> tuple[str, dict]:
    names = list(dict.fromkeys(tasks))
    means = {name: gates[torch.tensor([task == name for task in tasks])].mean(0).tolist() for name in names}
    lines = [[name, *(f"{value:.2f}" for value in row), f"{sum(row) / len(row):.2f}"] for name, row in means.items()]
    return table(["keep ratio", *(f"layer {i}" for i in layers), "all"], lines), means


def import_pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results: dict, folder: Path) -> Path:
    """Two panels: keep ratio by task and layer; average accuracy of every row."""
    pyplot = import_pyplot()
    keep, layers = results["keep_by_task_and_layer"], results["config"]["layers"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    image = left.imshow(list(keep.values()), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    left.set(title="Keep ratio by task and layer", xlabel="layer", xticks=range(len(layers)), xticklabels=layers,
             yticks=range(len(keep)), yticklabels=list(keep))  # fmt: skip
    for y, row in enumerate(keep.values()):
        for x, value in enumerate(row):
            left.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    figure.colorbar(image, ax=left)
    quality = results["quality"]
    right.barh(list(quality), [row["average"] for row in quality.values()],
               xerr=[2 * row["standard_error"] for row in quality.values()], color="steelblue")  # fmt: skip
    right.invert_yaxis()
    right.set(title="Average accuracy, with two standard errors", xlabel="%", xlim=(0, 100))
    path = folder / "results.png"
    figure.savefig(path, dpi=120)
    return path


# ---------------------------------------------------------------------------------------------
# The run


def parse_arguments(argv: list[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("evaluate.py", "Measure a tuned model against the dense one.")
    what = add_input_arguments(parser, "test")
    what.add_argument("--calibration-split", default="train", help="split that chooses static layers")
    what.add_argument("--routers", default="runs/demo/routers.safetensors", help="folder or file of tune.py, or Hub id")
    what.add_argument("--output", help="folder for results; None: beside the routers, or runs/NAME for a Hub id")
    quality = parser.add_argument_group("quality")
    quality.add_argument("--micro-batch-size", type=int, default=256, help="examples scored at a time")
    quality.add_argument("--draws", type=int, default=3, help="draws of random gates")
    quality.add_argument("--seed", type=int, default=0, help="of the random gates")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--prompt-length", type=int, default=512, help="tokens in each prompt of the timing")
    cost.add_argument("--new-tokens", type=int, default=16, help="decode passes for each prompt")
    cost.add_argument("--batch-size", type=int, default=8, help="prompts at a time in the timing")
    cost.add_argument("--repeats", type=int, default=10, help="timed repeats of every row, at least 2")
    cost.add_argument("--plot", action="store_true", help="figures, too; needs the extra `plot`")
    tasks = parser.add_argument_group("standard benchmarks, in place of the above; needs the extra `tasks`")
    tasks.add_argument("--tasks", help="tasks of lm-evaluation-harness, as arc_challenge,boolq")
    tasks.add_argument("--num-fewshot", type=int, help=f"shots; None: {FEWSHOT}, else 0")
    tasks.add_argument("--task-limit", type=int, help="questions of each task; None: all")
    tasks.add_argument("--include-path", help="folder with task definitions of your own")
    return parser, parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """What can be wrong by itself, with no file opened."""
    count = (1, 10**9)
    check_bounds(args, prompt_length=count, new_tokens=count, batch_size=count, micro_batch_size=count, draws=count,
                 repeats=(2, 10**9), max_samples=count, max_length=(2, 10**9), num_fewshot=(0, 10**3),
                 task_limit=count, seed=(0, 2**31 - 1))  # fmt: skip
    if args.plot:
        import_pyplot()
    if args.include_path and not Path(args.include_path).is_dir():
        raise ValueError(f"--include-path {args.include_path}: no such folder")


def find_routers(name: str) -> str:
    """The file that --routers means, fetched if it is a Hub id."""
    path = Path(name, "routers.safetensors") if Path(name).is_dir() else Path(name)
    if path.is_file():
        return str(path)
    if path.suffix == ".safetensors" or name.count("/") != 1:
        raise ValueError(f"--routers {name}: no such file, and not a Hub id (owner/name); run tune.py first")
    with naming(f"--routers {name}"):
        return hf_hub_download(name, "routers.safetensors")


def compare_quality(model, config: MindSkipConfig, ours: Row, train: list[dict], test: list[dict], args):
    """Score every row on `test`; `train` chooses static layers. Returns (summaries, static layers, our gates)."""
    tasks = [example["task"] for example in test]
    scored = partial(score_answers, model, batch_size=args.micro_batch_size)
    reference, scores = scored(test), scored(test, ours)
    keep = scores["gates"].mean().item()
    skipped = round((1 - keep) * len(config.layers))
    often_closed = scored(train, ours)["gates"].mean(0).argsort()[:skipped].tolist()
    chosen = {
        "similarity": tuple(sorted(similarity_order(model, train, args.micro_batch_size)[:skipped])),
        "router": tuple(sorted(config.layers[i] for i in often_closed)),
    }
    subsets = {chosen["similarity"], chosen["router"]}
    candidates = attention_layers(model)[1:]
    if is_searched := math.comb(len(candidates), skipped) <= SUBSETS:
        subsets |= set(itertools.combinations(candidates, skipped))
    static_scores, progress = {}, show_progress("static subsets")
    for i, closed in enumerate(sorted(subsets)):
        static_scores[closed] = summarize(scored(test, static("", closed)), reference, tasks)
        static_scores[closed]["keep"] = 1 - skipped / len(config.layers)
        progress(i + 1, len(subsets))
    if is_searched:
        chosen["best"] = max(static_scores, key=lambda closed: static_scores[closed]["average"])

    quality = {"dense": summarize(reference, reference, tasks), "mindskip": summarize(scores, reference, tasks)}
    for name in ("similarity", "best", "router"):
        if name in chosen:
            quality[f"static, {name}"] = static_scores[chosen[name]]
    drawn = [scored(test, random_gates(config, keep, args.seed + i)) for i in range(args.draws)]
    quality["random"] = mean_of([summarize(one, reference, tasks) for one in drawn])
    return quality, chosen, scores["gates"]


def compare_cost(
    model, config: MindSkipConfig, ours: Row, closed: tuple, prompts: torch.Tensor, args
) -> dict[str, dict]:
    """Time and count the rows that differ in cost: a static drop costs the same whichever layers it closes."""
    with torch.no_grad(), ours.using(model, len(prompts)):
        prefill(model, prompts)
        gates = {skip.layer: skip.gate for skip in routed(model)}
    keep = statistics.mean(gate.mean().item() for gate in gates.values())
    rows = [dense(), ours, static("static", closed), random_gates(config, keep, args.seed), multiply(gates)]
    cost = measure(model, rows, prompts, args.new_tokens, args.repeats, show_progress("timing"))
    for row in cost.values():
        fractions = {layer: gate.mean().item() for layer, gate in row.pop("gates").items()}
        row["keep"] = 1 - sum(1 - fraction for fraction in fractions.values()) / len(config.layers)
        row["prefill_gflops"] = forward_flops(model, args.prompt_length, args.prompt_length, fractions) / 1e9
        row["decode_mflops"] = forward_flops(model, 1, args.prompt_length + args.new_tokens, fractions) / 1e6
    return cost


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_arguments(argv)
    quiet(args)
    with parser.refuse_bad_input():  # the cheap checks first, the weights last
        check_arguments(args)
        path = find_routers(args.routers)
        described, _ = read_routers(path)
        is_local = Path(args.routers).exists()
        folder = Path(args.output or (Path(path).parent if is_local else f"runs/{args.routers.split('/')[1]}"))
        check_folder(folder, overwrite=True)
        names = args.tasks.split(",") if args.tasks else []
        manager = load_tasks(names, args.include_path) if names else None
        tokenizer = load_tokenizer(args)
        train, _ = examples_of(args, args.calibration_split, tokenizer)
        train = subset(train, CALIBRATION, args.seed)
        test, told = ([], f"{len(names)} tasks") if names else examples_of(args, args.split, tokenizer)
        model = model_of(args)
        check_vocabulary(model, train + test)
        config = routed(load_routers(model, path))[0].config
        folder.mkdir(parents=True, exist_ok=True)
        print(describe(model, args.seed))
        remove_mindskip(model)
    print(f"layers {config.layers} capacity {config.capacity} threshold {config.threshold:.4f} | {told}")
    if "step" in described["about"]:
        print(f"UNFINISHED: these are the routers of step {described['about']['step']}, not calibrated; resume tune.py")
    ours = mindskip(path)
    results = {"config": vars(config), "arguments": vars(args), "versions": versions()}

    if names:
        with parser.stop_cleanly("start again"), parser.refuse_bad_input():
            results["tasks"] = compare_tasks(model, tokenizer, config, ours, train, names, manager, args)
            write_results(results, folder / "tasks.json")
        print(f"\n{tasks_table(results['tasks'])}\nstatic closes {list(results['tasks']['static']['closed'])}")
        return print(folder / "tasks.json")

    with parser.stop_cleanly("start again"):
        quality, chosen, gates = compare_quality(model, config, ours, train, test, args)
        text, keep_by_task = keep_table(gates, [example["task"] for example in test], config.layers)
        closes = ", ".join(f"{name} closes {list(layers)}" for name, layers in chosen.items())
        closes += "" if "best" in chosen else "; best: not searched, too many subsets"
        print(f"\n{quality_table(quality)}\nstatic: {closes}\n\n{text}\n")

        prompts = long_prompts(test, args.batch_size, args.prompt_length).to(model.device)
        cost = compare_cost(model, config, ours, chosen["similarity"], prompts, args)
        print(cost_table(cost))
        print(f"{args.batch_size} prompts of {args.prompt_length} tokens at a time, {args.new_tokens} new tokens;"
              f" median of {args.repeats} repeats [quartiles]; {torch.get_num_threads()} threads")  # fmt: skip

        results |= {"quality": quality, "keep_by_task_and_layer": keep_by_task, "cost": cost, "static_layers": chosen}
        write_results(results, folder / "results.json")
    print(folder / "results.json")
    if args.plot:
        print(plot(results, folder))


def write_results(results: dict, path: Path) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(json.dumps(results, indent=2) + "\n")
    partial_path.replace(path)


def mean_of(rows: list[dict]) -> dict:
    """The mean of several summaries, field by field; their standard errors too."""
    first = rows[0]
    if isinstance(first, dict):
        return {key: mean_of([row[key] for row in rows]) for key in first}
    return sum(rows) / len(rows)


if __name__ == "__main__":
    main()
