"""How much of the ideal saving is reached: gates that routers close, against what they skip cut out.

    python tests/limit.py      # one thread, 20 minutes to an hour

On a random Llama of width 512 and 8 layers, for each granularity (of attention, the layer norm is cut out,
too). A share of 1 means that a closed gate, and its router, cost nothing at all. Then the same for four and
eight rows that disagree, with the shape of SmolLM2-135M, and what a step of tune.py takes in forward passes
of the dense model over as many rows.
"""

import argparse
import copy
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tune  # noqa: E402
from evaluate import Watch, copied, decode, prefill, removed, table  # noqa: E402
from mindskip import GRANULARITIES, MindSkipConfig, _mix_in, add_mindskip, fix_gates  # noqa: E402


def limit_model() -> tuple[torch.nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=2048,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False), (3, 4, 5, 6)


class WithoutMLP:
    def forward(self, x, **kwargs):
        return x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]


class WithoutAnything:
    def forward(self, x, **kwargs):
        return x


def three_models(stack: ExitStack, granularity: str) -> list[torch.nn.Module]:
    """Dense, all routed gates closed by their routers (no score reaches 1), and what they skip removed."""
    dense, layers = limit_model()
    closed = add_mindskip(copy.deepcopy(dense), MindSkipConfig(layers, granularity, threshold=1.0))
    if granularity.startswith("attention"):
        return [dense, closed, removed(dense, dict.fromkeys(layers, torch.zeros(1)))]
    without = copy.deepcopy(dense)
    mixin = WithoutMLP if granularity.startswith("mlp") else WithoutAnything
    _mix_in({without.model.layers[i]: mixin for i in layers})
    return [dense, closed, without]


def three_that_differ(stack: ExitStack, count: int) -> list[torch.nn.Module]:
    """The same for rows that disagree: each of 15 routed layers, of 30, is closed for half of them.

    Which half is drawn for each layer. Removed: attention and its norm see the other half; weights are read
    for it, and its keys kept. This is the bound.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    dense, layers = LlamaForCausalLM(config).eval().requires_grad_(False), tuple(range(14, 29))
    routed = add_mindskip(copied(dense), MindSkipConfig(layers))
    gates = {i: torch.randperm(count) < count // 2 for i in layers}
    stack.enter_context(fix_gates(routed, gates))
    return [dense, routed, removed(dense, gates)]


@torch.no_grad()
def operations_share(granularity: str = "attention-sequence") -> float:
    """(dense - closed) / (dense - removed), by operations dispatched in one decode step."""
    counts = []
    with ExitStack() as stack:
        for model in three_models(stack, granularity):
            cache, token = prefill(model, torch.arange(16)[None])
            with Watch() as watch:
                decode(model, cache, token, 1)
            counts.append(watch.operations)
    return (counts[0] - counts[1]) / (counts[0] - counts[2])


def cpu_time(function, *args) -> tuple[float, object]:
    """CPU milliseconds of this thread in one call, and what it returns."""
    start = time.thread_time()
    result = function(*args)
    return 1e3 * (time.thread_time() - start), result


def share_of(samples: list[tuple[float, float, float]]) -> float:
    """(dense - closed) / (dense - removed): medians of differences, as both were timed in the same moment."""
    saved, ideal = zip(*((dense - closed, dense - removed) for dense, closed, removed in samples))
    return statistics.median(saved) / statistics.median(ideal)


@torch.no_grad()
def time_shares(
    build, repeats: int, rows: int = 1, length: int = 512, new_tokens: int = 32
) -> dict[str, dict]:
    """CPU time of one thread: shares of the ideal gain, for `rows` prompts at a time. build: makes three models.

    Three copies of one model take turns, in decoding at every token, so that a drift of the machine meets
    all. Each begins as often as the others: the first one finds other things in the processor's caches.
    """
    times, prompt = {"prefill": [], "decode": []}, torch.arange(rows * length).view(rows, length)
    with ExitStack() as stack:
        models = build(stack)
        for repeat in tqdm(range(-1, repeats), "limit", leave=False, disable=None):
            prefills, states, steps = [0.0] * 3, [None] * 3, []
            for k in (turn % 3 for turn in range(repeat, repeat + 3)):
                prefills[k], states[k] = cpu_time(prefill, models[k], prompt)
            for token in range(new_tokens):
                steps.append([0.0] * 3)
                for k in (turn % 3 for turn in range(token, token + 3)):
                    steps[-1][k], _ = cpu_time(decode, models[k], *states[k], 1)
            if repeat >= 0:
                times["prefill"].append([prefills])
                times["decode"].append(steps)
    results = {}
    for phase, measured in times.items():  # a list of (dense, closed, removed) for each repeat
        low, _, high = statistics.quantiles([share_of(samples) for samples in measured], n=4)
        everything = [sample for samples in measured for sample in samples]
        medians = [statistics.median(column) for column in zip(*everything)]
        results[phase] = {"share": share_of(everything), "q1": low, "q3": high, "ms": medians}
    return results


def time_step(estimator: str, repeats: int, rows: int = 4, length: int = 256) -> dict[str, float]:
    """A step of tune.tune, in forward passes of the dense model over as many rows, taken before each step.

    Rows are prompts, times draws of their gates. Half of a row is its prompt. Learning rate 0: the gates stay as
    they are before training.
    """
    dense, layers = limit_model()
    draws = tune.DRAWS if estimator == "rloo" else 1
    ids = torch.arange(rows // draws * length).reshape(-1, length).tolist()
    examples = [{"task": "all", "ids": row, "prompt": length // 2} for row in ids]
    flags = f"--estimator {estimator} --lr 0 --batch-size {len(ids)} --steps {repeats + 1}".split()
    model, ratios, clock = add_mindskip(copy.deepcopy(dense), MindSkipConfig(layers)), [], []

    def between_steps(*_) -> None:
        end = time.thread_time()
        if clock:
            ratios.append((end - clock[0]) / clock[1])
        with torch.no_grad():
            forward, _ = cpu_time(tune.score, dense, examples * draws)
        clock[:] = time.thread_time(), forward / 1e3

    handle = register_optimizer_step_post_hook(between_steps)
    tune.tune(model, examples, tune.parse_arguments(flags))
    handle.remove()
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"dense_forwards": middle, "q1": low, "q3": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25, help="of every figure, at least 2")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows, spread = {}, "[{q1:.3f} {q3:.3f}]"
    print("Llama 512 x 8 layers, layers 3-6 routed and closed; CPU time of one thread, interleaved")
    shares = {granularity: partial(three_models, granularity=granularity) for granularity in GRANULARITIES}
    counts = {f"{count} rows that differ": count for count in (4, 8)}
    shares |= {name: partial(three_that_differ, count=count) for name, count in counts.items()}
    for name, build in shares.items():
        many = counts.get(name, 1)  # rows; with several, a prefill takes long, and a step tells more
        some, steps = (repeats, 32) if many == 1 else (max(2, repeats // 6), 64)
        results = time_shares(build, some, rows=many, new_tokens=steps)
        rows[name] = {phase: f"{one['share']:.3f} {spread.format(**one)}" for phase, one in results.items()}
        rows[name]["operations"] = operations_share(name) if name in GRANULARITIES else float("nan")
    columns = {"prefill": "{prefill}", "decode": "{decode}", "decode, operations": "{operations:.3f}"}
    print(table("share of the ideal gain", rows, columns))
    columns = {"median": "{median:.3f}", "quartiles": "{quartiles}"}
    rows = {}
    for estimator in ("rloo", "straight-through"):
        at = time_step(estimator, repeats)
        rows[estimator] = {"median": at["dense_forwards"], "quartiles": spread.format(**at)}
    print("\n" + table("tuning step of 4 rows of 256 tokens, in dense forward passes", rows, columns))


if __name__ == "__main__":
    main()
