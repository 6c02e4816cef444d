"""Time at the shape of Llama-3-8B on a GPU, and the scripts on CUDA.

    python tests/gpu.py                     # all parts: nine minutes on an H200 without 1b; JSON goes to runs/gpu
    python tests/gpu.py what-if             # one of them
    python tests/gpu.py --tiny              # the same commands at a tiny shape, on any machine, to see that they run

    what-if     prefill and decoding of the 8 B shape, against dense, removed and multiply
    demo        tune.py and evaluate.py, as in README
    1b, 8b      README's commands for a real model, on a checkpoint of that shape that is made here: tuning with both
                estimators, 20 steps on data like Alpaca's, then evaluation

Weights are random and gates are fixed: times are real, texts are not. The paper reports 1.21x for prompts and answers
of its benchmarks on Llama-3-8B.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import evaluate  # noqa: E402
import tune  # noqa: E402

PARTS = ["what-if", "demo", "1b", "8b"]
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 96, 6, 4, 2, 128),
}


def configuration(name: str) -> str:
    """A folder with the configuration of a shape, and the demo's tokenizer."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[name]
    folder = Path("runs/gpu", name)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=65536,
        rope_theta=500000.0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tune.DEMO).save_pretrained(folder)
    return str(folder)


def checkpoint(name: str, dtype: torch.dtype) -> str:
    """The same with random weights."""
    folder = configuration(name)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder), dtype=dtype)
    model.save_pretrained(folder)
    return folder


def instructions() -> str:
    """A file like Alpaca's: 64 examples of about 200 tokens (the demo's tokenizer: a token for each letter)."""
    path, draw = Path("runs/gpu/instructions.jsonl"), random.Random(0).choices
    rows = [
        {"instruction": "".join(draw("abcdef", k=30)), "output": "".join(draw("abcdef", k=30))}
        for _ in range(64)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def what_if(shape: str, lengths: str, batches: str, *flags: str) -> dict:
    output = Path("runs/gpu", f"what-if {' '.join(flags)} {lengths} {batches}".replace("/", "_"))
    sizes = ["--prompt-length", lengths, "--batch-size", batches]
    evaluate.main(["--what-if", "--model", configuration(shape), "--output", str(output), *sizes, *flags])
    return json.loads((output / "what-if.json").read_text())["cost"]


def timed(main, *flags: str) -> dict:
    """Seconds, and the most GiB that were allocated, of one command."""
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    main(list(flags))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"command": flags, "seconds": time.perf_counter() - start, "peak_gib": peak}


def run(part: str, is_tiny: bool):
    """What one part found, for the JSON."""
    few = ("--repeats", "2", "--prompt-length", "16,32") if is_tiny else ()
    if part == "what-if":
        shape, *lengths = (
            ("tiny", "16", "16,32", "64") if is_tiny else ("8b", "512", "512,2048,8192", "32768")
        )
        return {
            f"{kind}, {length} tokens, {batch} at a time": what_if(
                shape, length, batch, "--attn-implementation", kind, "--repeats", "2" if is_tiny else "5"
            )
            for kind, length, batch in (
                ("sdpa", lengths[1], "1"),
                ("sdpa", lengths[0], "8,32"),
                ("sdpa", lengths[2], "1"),
                ("eager", lengths[1], "1"),
                ("eager", lengths[0], "8,32"),
            )
        }
    if part == "demo":
        tuned = timed(tune.main, "--name", "gpu-demo", "--overwrite", "--steps", "5" if is_tiny else "1500")
        return [tuned, timed(evaluate.main, "--routers", "runs/gpu-demo", *few)]
    shape, name, found = "tiny" if is_tiny else part, f"gpu-{part}", []
    model = ("--model", checkpoint(shape, torch.bfloat16), "--dtype", "bfloat16", "--dataset", instructions())
    for estimator in ("straight-through", "rloo"):
        flags = ("--steps", "5" if is_tiny else "20", "--estimator", estimator, "--micro-batch-size", "1")
        found.append(timed(tune.main, *model, *flags, "--name", name, "--overwrite"))
        lines = Path("runs", name, "log.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["seconds"] for line in lines]
        found[-1]["seconds a step"] = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    splits = ("--split", "train", "--micro-batch-size", "8", "--routers", f"runs/{name}")
    found.append(timed(evaluate.main, *model, *splits, *(few or ("--prompt-length", "512"))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {PARTS}; none: all")
    parser.add_argument("--tiny", action="store_true", help="only see whether all of this runs")
    args = parser.parse_args()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"{wrong}: parts are {PARTS}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    for part in args.parts or PARTS:
        found = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
        found["found"] = run(part, args.tiny)
        evaluate.write_json(found, Path(f"runs/gpu/{part}.json"))
    print("the tests on this device: python -m pytest tests/test_cuda.py")


if __name__ == "__main__":
    main()
