"""MindSkip: attention that runs only where a tiny router, tuned on a frozen model, says so.

Paper: He et al., "Router-Tuning", arXiv 2410.13184v6. For attention F, normalised input x, one gate a row:

    r = mean_t(x_t) . w      s = sigmoid(r)      m = 1[s >= tau]      y = residual + m * F(x)

    router      w, the linear map that produces a logit r; (D,), float32, no bias, starts at zero
    score       s, the sigmoid of the logit
    threshold   tau; the gate opens where score >= threshold
    gate        m, exactly 0.0 or 1.0; 1 runs attention
    capacity    target fraction of open gates, the budget (a setting); keep ratio: the measured one (a result)
    voters      tokens that the mean is taken over: those of the prompt, never padding, never an answer
    granularity what F is (attention, mlp, or block: a whole layer), and what shares a gate (sequence, token)
    shapes      B rows, T tokens in this call, S tokens visible through the KV cache, D hidden size,
                U gates in a row: 1, or T where each token has its own

In evaluation mode a closed gate calls nothing and caches nothing. In training mode everything is computed and
multiplied by its gate, so that closed gates get a gradient too. Same gates, same output, in either mode. (The
default estimator of tune.py runs in evaluation mode: it needs a gradient of the logits alone.)
`add_mindskip` swaps classes: the model's own modules get a class that knows the gate. Nothing is renamed.
Differs from the paper: only prompt tokens vote, and only once, at prefill. With a gate for each token (r_t =
x_t . w) on attention or blocks, a skipped token has no query, key or value in that layer, as in Mixture of
Depths. So any family's attention can run on kept tokens alone. (The released code keeps skipped keys.)
"""

import inspect
import json
import re
import warnings
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

GRANULARITIES = [f"{what}-{unit}" for what in ("attention", "mlp", "block") for unit in ("sequence", "token")]


@dataclass(frozen=True)
class MindSkipConfig:
    """Configuration stored with the routers. ValueError if a value is out of range."""

    layers: tuple[int, ...]  # routed decoder layers, from 1 up: the KV cache takes its length from layer 0
    granularity: str = "attention-sequence"  # what is gated, and the unit that shares a gate (GRANULARITIES)
    threshold: float = 0.5  # score in [0, 1] at or above which a gate opens
    capacity: float = 0.5  # target keep ratio, a fraction in [0, 1]

    def __post_init__(self):
        object.__setattr__(self, "layers", layers := tuple(sorted(self.layers)))
        if not layers or len(set(layers)) < len(layers) or any(type(i) is not int or i < 1 for i in layers):
            raise ValueError(f"layers must differ and be integers from 1 up (never layer 0): got {layers}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, got {self.granularity!r}")
        for name in ("threshold", "capacity"):
            if not isinstance(value := getattr(self, name), (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def straight_through(score: Tensor, threshold: float | Tensor) -> Tensor:
    """Gate m = 1[score >= threshold], with dL/dscore := dL/dm.  Source: arXiv 2410.13184v6, Eq. 3/5."""
    hard = (score >= threshold).to(score.dtype)
    # Parentheses matter: (hard + score) - score.detach() rounds away from 0 and 1.
    return hard + (score - score.detach())


class Router(nn.Module):
    """The linear router of one layer: it decides whether the gated part of the layer runs."""

    drawn = None  # thresholds (B, U) in place of the configured one; tune.py draws gates with them
    fixed = None  # gates that fix_gates has set; None: the router decides
    logit = gate = None  # (B, U) of the last forward, with their graph; NaN where a token is padding

    def __init__(self, layer: int, config: MindSkipConfig, hidden_size: int, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, device=device))  # scores of 0.5: open, by default
        self.layer, self.config = layer, config  # index of the decoder layer; what all routers share
        self.is_token = config.granularity.endswith("token")

    def forward(self, x: Tensor, voters: Tensor) -> Tensor:
        """Logits (B, U), from x (B, T, D) after layer norm and voters (B, T) bool.

        In float32 whatever the model's dtype: bfloat16 would round a logit of -0.003 to a score of 0.5: open.
        Sums of products, not matrix products: autocast would round those.
        """
        x = x.float()
        if not self.is_token:
            share = voters / voters.sum(1, keepdim=True)  # (B, T)
            x = (share[..., None] * x).sum(1, keepdim=True)  # (B, 1, D)
        return (x * self.weight).sum(-1)

    def decide(self, x: Tensor, call: "Call") -> Tensor:
        """Gates (B, U) for x (B, T, D): of new sequences, or of these tokens. Notes them for `last`."""
        logit, shape = None, (len(x), x.shape[1] if self.is_token else 1)  # (B, U)
        if self.fixed is None:
            logit = self(x, None if self.is_token else call.votes(x))
            threshold = self.config.threshold if self.drawn is None else self.drawn[:, : shape[1]]
            gate = straight_through(logit.sigmoid(), threshold)
        else:
            gate = torch.as_tensor(self.fixed, device=x.device).float()
            gate = gate.reshape(-1, 1) if gate.ndim < 2 else gate
            if any(n not in (1, m) for n, m in zip(gate.shape, shape)):
                raise ValueError(f"fix_gates: {(*gate.shape,)} gates for {shape}")
            gate = gate.expand(shape)
        noted = gate
        if self.is_token and call.given.get("attention_mask") is not None:  # padding is skipped
            padding = ~call.real(x)
            gate, noted = gate.masked_fill(padding, 0), gate.masked_fill(padding, torch.nan)
            logit = None if logit is None else logit.masked_fill(padding, torch.nan)
        vars(self).update(logit=logit, gate=noted)  # nn.Module's own assignment takes time that shows
        return gate

    def _apply(self, fn, recurse=True):
        exact = self.weight.data
        super()._apply(fn, recurse)
        self.weight.data = exact.to(self.weight.device)  # model.to(bfloat16) moves a router, doesn't round it
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"logit": None, "gate": None}  # a graph can't be copied


def capacity_loss(model: nn.Module, capacity: float, keep: float | None = None) -> Tensor:
    """ReLU(mean gate - capacity), over all routed layers and rows of the last forward.  Eq. 9/10.

    keep: what to take for the mean (tune.py: the keep ratio of the step before, so that a step can be
    computed in parts); the gradient still goes to these gates. Differs from the released code, which has a
    ReLU for each layer: at micro-batch 1 their means are 0 or 1.
    """
    if not 0 <= capacity <= 1:
        raise ValueError(f"capacity must be a fraction in [0, 1], got {capacity}")
    mean = _mean_gate(model)
    if keep is not None:
        mean = keep + (mean - mean.detach())
    return torch.relu(mean - capacity)


def keep_ratio(model: nn.Module) -> float:
    """The fraction of gates, over routed layers and rows or tokens, that were open in the last forward."""
    return _mean_gate(model).item()


def _mean_gate(model: nn.Module) -> Tensor:
    gates = last(model, "gate")
    return gates.nanmean() if gates.ndim == 3 else gates.mean()  # a row's NaN is no padding, but an error


def last(model: nn.Module, what: str) -> Tensor:
    """Each "gate" of the last forward, or each "logit" from which a router decided: (routed layers, B).

    (routed layers, B, T) where each token has a gate, with NaN for padding.
    """
    found = [one for one in (getattr(router, what) for router in routers(model)) if one is not None]
    if not found:
        raise ValueError(f"no {what} yet: the model needs routers (add_mindskip) and a forward pass")
    found = torch.stack([one.to(model.device) for one in found])
    return found if routers(model)[0].is_token else found[..., 0]


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Exactly what tuning may change: one weight (D,) for each routed layer, first layer first."""
    return [router.weight for router in routers(model)]


@contextmanager
def fix_gates(model: nn.Module, gates: dict[int, bool | Tensor]):
    """Overrule routers: {layer: one bool, or a (B,) bool tensor}. Layers not named keep their router.

    Where each token has a gate, (B, T) will do, too.
    """
    before = {router: router.fixed for router in routers(model) if router.layer in gates}
    if unknown := sorted(set(gates) - {router.layer for router in before}):
        raise ValueError(f"layers {unknown} are not routed: routed are {[r.layer for r in routers(model)]}")
    for gate in gates.values():
        if not isinstance(gate, bool) and getattr(gate, "dtype", None) != torch.bool:
            raise ValueError(f"a gate is True, False, or a (B,) tensor of them, got {gate}")
    try:
        for router in before:
            router.fixed = gates[router.layer]
        yield model
    finally:
        for router, fixed in before.items():
            router.fixed = fixed


# ---- The gate. Classes named _... are mixed into the classes of the model's modules (_mix_in): modules and
# names stay, only the class changes. They replace `__call__`, so that hooks of what is skipped don't run.
class _Mixin:
    """What remove_mindskip takes out again."""


# Where the result of attention, or of the MLP, replaces that of the layer norm before it, this norm serves it
# alone and can wait for the gate. Its name is captured, as here:
#     residual = hidden_states
#     hidden_states = self.input_layernorm(hidden_states)
#     hidden_states, _ = self.self_attn(hidden_states=hidden_states, ...)
# Other norms (after attention, or shared with the MLP) stay as they are: right, but they take their time.
_OUTPUT = r"(?:residual = hidden_states\s+hidden_states = self\.(\w+)\(hidden_states\)(?:\s*#.*)*\s+"
_OUTPUT += r"hidden_states|\n *\w+)"


class _Gated(_Mixin):
    """Mixed into an MLP. Attention and blocks differ a little (below)."""

    # Its name in a decoder layer, and how the layer's code calls it: it must take as many values as we give.
    child, use = "mlp", _OUTPUT + r" = self\.mlp\("
    own_norm = ()  # the layer norm that leaves its work to this gate (see _DeferredNorm)
    skips_keys = False  # what is skipped leaves no key and no value in the KV cache
    gives_weights = False  # its result is a pair, whose second value, attention weights, is not used
    outputs = ("output_router_logits",)  # what a model collects from such modules; skipped ones give none

    def __call__(self, hidden_states: Tensor, *others, **kwargs) -> Tensor | tuple:
        """What the module gives for (B, T, D) where the gate is open, `nothing` where it is closed."""
        if others:
            kwargs |= zip(_parameters(type(self).forward)[1:], others)
        call_module = self.call_and_multiply if self.router.training else self.call_on_kept
        output = call_module(hidden_states, kwargs, current_call(self))
        return (output, None) if self.gives_weights else output

    def compute(self, x: Tensor, kwargs: dict) -> Tensor:
        """The module itself. Its hooks run, by which a model collects attention weights."""
        output = super().__call__(x, **kwargs)
        return output[0] if self.gives_weights else output

    def call_and_multiply(self, hidden: Tensor, kwargs: dict, call: "Call") -> Tensor:
        """Everything is computed, so that closed gates get a gradient."""
        x, tokens = self.normalise(hidden), hidden.shape[1]
        gate = self.router.decide(self.router_input(x), call)  # (B, U)
        if self.router.is_token and self.skips_keys:
            places = torch.arange(tokens, device=x.device).expand(gate.shape)
            mask = token_mask(kwargs.get("attention_mask"), places, places, gate > 0, tokens)
            kwargs["attention_mask"] = mask
        output = self.compute(x, kwargs)
        gate = gate[..., None].to(output.dtype)  # (B, U, 1)
        return output * gate + self.nothing(hidden, output.dtype) * (1 - gate)

    def call_on_kept(self, hidden: Tensor, kwargs: dict, call: "Call") -> Tensor:
        """Only rows whose gate is open are computed; where each token has a gate, rows that keep a token."""
        router, x, batch = self.router, None, hidden.shape[0]
        cache = kv_cache(kwargs) if call.cache is None else call.cache
        memory = _routed_cache_layer(cache, router, hidden.shape[1])
        if memory.gate is None or router.is_token:  # a sequence is routed once, at prefill
            x = self.normalise(hidden) if router.fixed is None else None
            gate = router.decide(hidden if x is None else self.router_input(x), call)
            memory.note(gate.detach(), router.fixed)
            memory.nothing = hidden.new_zeros(1, 1, hidden.shape[2])  # one broadcast zero: the layer adds it
        elif router.fixed is not None and router.fixed is not memory.fixed:
            raise ValueError("fix_gates came after the prefill: a KV cache keeps its decisions")
        elif call.voters is not None and call.voters.shape != hidden.shape[:2]:
            raise ValueError(f"voters {(*call.voters.shape,)} came after the prefill, or for another batch")
        else:  # no router runs, and no device is waited for
            vars(router).update(gate=memory.gate, logit=None)
        rows, count = memory.rows, memory.rows.shape[0]
        if count == 0:
            return memory.nothing if self.own_norm else self.nothing(hidden)
        kept = hidden if x is None else x
        if count < batch:
            kept = kept.index_select(0, rows)  # (R, T, D)
            kwargs = {name: take_rows(value, rows, batch) for name, value in kwargs.items()}
        x = self.normalise(kept) if x is None else kept
        output = self.compute_tokens(x, kwargs, memory) if router.is_token else self.compute(x, kwargs)
        if count == batch:
            return output
        return self.nothing(hidden, output.dtype).index_copy_(0, rows, output)

    def compute_tokens(self, x: Tensor, kwargs: dict, memory: "_RoutedCacheLayer") -> Tensor:
        """Only kept tokens of x (R, T, D) are computed. Rows that keep fewer begin with void columns."""
        tokens, mask = x.shape[1], kwargs.get("attention_mask")
        is_kept = memory.gate[memory.rows] > 0  # (R, T)
        index = torch.arange(tokens, device=x.device).expand(is_kept.shape)
        are_all = tokens == 1 or bool(is_kept.all())
        if not are_all:
            index = is_kept.int().argsort(dim=1, stable=True)[:, tokens - int(is_kept.sum(1).max()) :]
            is_kept = is_kept.gather(1, index)  # (R, K): K columns
            kwargs = {name: take_tokens(value, index, tokens) for name, value in kwargs.items()}
        if self.skips_keys:
            kwargs["attention_mask"] = memory.mask(mask, index, is_kept, tokens)
        if are_all:
            return self.compute(x, kwargs)
        output = self.compute(take_tokens(x, index, tokens), kwargs)
        whole, (row, column) = self.nothing(x, output.dtype), is_kept.nonzero(as_tuple=True)
        whole[row, index[row, column]] = output[row, column]
        return whole

    def normalise(self, x: Tensor) -> Tensor:
        return self.own_norm[0](x, asked=True) if self.own_norm else x

    def router_input(self, x: Tensor) -> Tensor:
        """What the router sees of a module's input."""
        return x

    def nothing(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor: what stands where a gate is closed, before the residual stream is added."""
        return torch.zeros_like(hidden, dtype=dtype)  # that of an output: autocast changes it


class _GatedAttention(_Gated):
    child, use = "self_attn", _OUTPUT + r", \w+ = self\.self_attn\("
    skips_keys, gives_weights, outputs = True, True, ("output_attentions",)


class _GatedBlock(_Gated):
    child, use = None, r"return \w+\s*$"
    skips_keys, outputs = True, ("output_attentions", "output_router_logits", "output_hidden_states")

    def router_input(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), x.shape[-1:])  # the residual stream isn't normalised

    def nothing(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return hidden.to(dtype, copy=True)  # a layer's output has the residual stream in it


class _DeferredNorm(_Mixin):
    """Mixed into the norm that serves a gated module alone: it does nothing until the gate asks."""

    def __call__(self, x: Tensor, asked: bool = False) -> Tensor:
        return super().__call__(x) if asked else x


def take_rows(value, rows: Tensor | slice, batch: int):
    """The kept rows of everything that has one entry for each row of the batch; the rest as it is."""
    if isinstance(value, tuple):
        return tuple([take_rows(item, rows, batch) for item in value])
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch:
        return value[rows] if isinstance(rows, slice) else value.index_select(0, rows)
    return value


def put_rows(kept: Tensor, rows: Tensor, batch: int, empty: int = 0) -> Tensor:
    """The inverse of take_rows: a whole batch, with `empty` in the rows that were left out."""
    if len(rows) == batch:
        return kept
    return kept.new_full((batch, *kept.shape[1:]), empty).index_copy_(0, rows, kept)


def take_tokens(value, index: Tensor, tokens: int):
    """The tokens `index` (R, K) of everything that has one entry for each token, (R or 1, T, ...)."""
    shapes = (1, tokens), (len(index), tokens)
    if isinstance(value, Tensor) and value.shape[:2] in shapes:
        rows = torch.arange(len(index), device=index.device)[:, None]
        return value.expand(len(index), *value.shape[1:])[rows, index]
    return tuple(take_tokens(item, index, tokens) for item in value) if isinstance(value, tuple) else value


def token_mask(mask: Tensor | None, queries: Tensor, keys: Tensor, is_there: Tensor, total: int) -> Tensor:
    """The attention mask (R, 1, Q, K) of kept tokens: each sees itself, and kept ones that `mask` shows it.

    mask: (R or 1, 1, T, S), of all tokens; None: those before it. queries (R, Q), keys (R, K): places in a
    sequence of `total` tokens, -1 for a void column. is_there: (R, K) bool.
    """
    queries, keys, is_there = queries[..., None], keys[:, None], is_there[:, None]
    if mask is None:
        return (is_there & (keys < queries) | (keys == queries))[:, None]
    is_seen = (is_there | (keys == queries))[:, None]  # (R, 1, Q, K)
    rows = torch.arange(len(keys), device=mask.device)[:, None, None]
    queries, keys = queries - total + mask.shape[2], keys - total + mask.shape[3]  # a window has fewer keys
    mask = mask.expand(len(keys), -1, -1, -1)[rows, :, queries, keys.clamp(0)].movedim(-1, 1)
    return mask.masked_fill(~is_seen, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


# ---- Who votes. A Call is one forward pass. It isn't kept on the model, which two threads may use at once.
_CALL: ContextVar["Call | None"] = ContextVar("call", default=None)  # each thread has its own


@dataclass
class Call:
    """What tells who votes in one forward pass."""

    routing: MindSkipConfig  # a model and its decoder have the same object, so that a decoder knows its call
    voters: Tensor | None  # (B, T) bool, if the user or the labels tell
    prompt: int | None  # in `generate`, how many tokens the prompt has: those after them don't vote
    given: dict  # the model's arguments: attention_mask (B, S), position_ids, ...; then "votes", once found
    cache: Cache | None = None  # a decoder layer is given it, and notes it here for its MLP, which isn't

    def real(self, x: Tensor) -> Tensor:
        """(B, T) bool, for x (B, T, D): tokens that the attention mask doesn't call padding."""
        padding = self.given.get("attention_mask")
        if isinstance(padding, Tensor) and padding.ndim == 2:
            return padding[:, -x.shape[1] :].bool().to(x.device)
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def votes(self, x: Tensor) -> Tensor:
        """(B, T) bool, for x (B, T, D). ValueError if nothing tells who votes, or a row has no voter."""
        if "votes" in self.given:  # another layer asked
            return self.given["votes"].to(x.device)
        padding, places, mask = self.given.get("attention_mask"), self.given.get("position_ids"), self.real(x)
        if self.voters is not None:
            if self.voters.shape != x.shape[:2] or self.voters.dtype != torch.bool:
                told = f"{self.voters.dtype} {(*self.voters.shape,)}"
                raise ValueError(f"voters must be bool {(*x.shape[:2],)}, got {told}")
            mask = mask & self.voters.to(x.device)
        elif padding is not None and getattr(padding, "ndim", None) != 2:
            raise ValueError("a 4-D attention mask doesn't tell what is padding: pass voters, (B, T) bool")
        elif padding is None and places is not None and (places.diff() < 0).any():
            raise ValueError("positions start again: packed sequences would share a gate; pass voters")
        if self.prompt is not None:
            if x.shape[1] < self.prompt:
                raise ValueError(f"a decision needs the whole prompt: {self.prompt} tokens, not {x.shape[1]}")
            mask = mask & (torch.arange(x.shape[1], device=x.device) < self.prompt)
        if rows := (~mask.any(1)).nonzero()[:, 0].tolist():
            raise ValueError(f"rows {rows} have no token that votes: pass voters, (B, T) bool")
        self.given["votes"] = mask
        return mask

    def run(self, function, *args, **kwargs):
        """function(*args, **kwargs), during which this is the current call."""
        context = copy_context()
        context.run(_CALL.set, self)
        return context.run(function, *args, **kwargs)


class _RoutedModel(_Mixin):
    """Mixed into the model, which is given labels, and its decoder, which joins the model's call."""

    def __call__(self, *args, voters: Tensor | None = None, **kwargs):
        kwargs, outer = kwargs | dict(zip(_parameters(type(self).forward), args)), _CALL.get()
        if outer and outer.routing is not self.routing:  # another model, which is running, asks this one
            outer = None
        for name in () if self.training else _GATED[self.routing.granularity.split("-")[0]].outputs:
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"{name}: what a gate skips gives none")
        if self.training and (cache := kv_cache(kwargs)) and cache.get_seq_length() > 0:
            raise ValueError("training mode cannot continue a KV cache: call model.eval()")
        if voters is None and (labels := kwargs.get("labels")) is not None:
            # Tokens before the first one that is scored; a label at position 0 never is: nothing predicts it.
            voters = nn.functional.pad(labels[:, 1:] != -100, (1, 0)).cumsum(1) == 0
            if (labels[:, 0] != -100).any() and not routers(self)[0].is_token:
                warnings.warn("labels leave no prompt: token 0 alone decides; pass voters", stacklevel=2)
        elif voters is None and outer is not None:
            voters = outer.voters
        ids, is_told = kwargs.get("input_ids"), voters is not None or outer is not None
        has_padding = getattr(self.config, "pad_token_id", None) is not None
        if has_padding and ids is not None and ids.shape[1] > 1 and not is_told:  # transformers' own method
            self.warn_if_padding_and_no_attention_mask(ids, kwargs.get("attention_mask"))
        # Embeddings may be more than the tokens that `generate` was given (PEFT's virtual tokens).
        prompt = outer.prompt if outer and (outer.given or kwargs.get("inputs_embeds") is None) else None
        given = dict(kwargs)
        if outer and getattr(kwargs.get("attention_mask"), "ndim", None) != 2:  # made by a multimodal wrapper
            given["attention_mask"] = outer.given.get("attention_mask")
        return Call(self.routing, voters, prompt, given).run(super().__call__, **kwargs)

    def generate(self, inputs: Tensor | None = None, generation_config=None, *args, **kwargs):
        """Only the prompt votes, however it is continued: with a cache, without, or by candidates."""
        settings = generation_config or self.generation_config
        if (kwargs.get("guidance_scale") or settings.guidance_scale or 1) != 1:
            raise ValueError("guidance_scale must be 1: the negative prompt would be routed as this one")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        prompt = None if ids is None else ids.shape[1]
        call = Call(self.routing, None, prompt, {})
        return call.run(super().generate, inputs, generation_config, *args, **kwargs)


_parameters = cache(lambda forward: list(inspect.signature(forward).parameters)[1:])  # without self


def kv_cache(given: dict) -> Cache | None:
    """The KV cache among a call's arguments, by its type: its name has changed (transformers 5.24)."""
    return next((value for value in given.values() if isinstance(value, Cache)), None)


def current_call(module: nn.Module) -> Call:
    """The call that this module runs in. ValueError if there is none, or it would train wrongly."""
    if (call := _CALL.get()) is None:
        raise ValueError("a routed layer was called by itself: call the model, or its decoder")
    if module.training:
        checkpointed = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(checkpointed, "keywords", {}).get("use_reentrant"):
            raise ValueError("reentrant checkpointing loses the gates' gradient: set use_reentrant=False")
    return call


class _RoutedLayer(_Mixin):
    """Mixed into a decoder layer whose attention or MLP is gated: notes the KV cache for the gate.

    In training it passes the current Call on as an argument: arguments are all that gradient checkpointing
    keeps until it runs `forward` again, in the backward pass.
    """

    def __call__(self, *args, **kwargs):
        call = current_call(self)
        if call.cache is None:
            call.cache = kv_cache(kwargs)
        if self.training:
            kwargs["call"] = call
        return super().__call__(*args, **kwargs)

    def forward(self, *args, call: Call | None = None, **kwargs):
        return call.run(super().forward, *args, **kwargs) if call else super().forward(*args, **kwargs)


# ---- Where a decision lives: with the KV cache.
ROUTABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # a key and a value for each token: rows can be left out


class _RoutedCacheLayer(DynamicLayer):
    """Mixed into a layer of a KV cache: what gates keep, and keys and values of that alone.

    Those of kept rows, or of kept tokens, with void columns in rows that keep fewer.
    """

    granularity, has_all_keys = None, False  # of its gates; those of MLPs leave all keys here
    gate, rows = None, torch.empty(0)  # (B, U), None before routing; indices of rows that keep something
    fixed = nothing = None  # gates that overruled the router; what closed attention gives
    places = None  # with gates for tokens: (B, columns), a key's place in the sequence, -1 where it is void
    first = None  # the cache's first layer, which knows the length even where this one is closed

    def note(self, gate: Tensor, fixed) -> None:
        """Store a decision, and which rows run."""
        self.gate, self.fixed = gate, fixed
        rows = [i for i, is_kept in enumerate((gate > 0).any(1).tolist()) if is_kept]
        self.rows = torch.tensor(rows, dtype=torch.long, device=gate.device)

    def mask(self, mask: Tensor | None, index: Tensor, is_kept: Tensor, tokens: int) -> Tensor | None:
        """The attention mask (R, 1, K, columns) of tokens `index` (R, K), whose keys are kept from now on."""
        # Tokens so far, with those of this call; and how many of the last ones a sliding window lets through.
        total = tokens if self.first is None else self.first.get_seq_length()
        visible = min(total, getattr(self, "sliding_window", total) - 1 + tokens)
        queries = index + total - tokens  # their places in the sequence
        new = put_rows(queries.where(is_kept, -1), self.rows, len(self.gate), -1)
        self.places = new if self.places is None else torch.cat([self.places, new], 1)
        keys = self.places[self.rows]
        if keys.shape[1] == total == visible and (keys >= 0).all():
            return mask  # all tokens so far were kept
        return token_mask(mask, queries, keys, keys >= total - visible, total)

    def get_seq_length(self) -> int:
        # Columns don't tell it with gates for tokens, nor without a kept row (closed, or since reordered).
        is_known = self.has_all_keys or (self.places is None and len(self.rows))
        return super().get_seq_length() if is_known else self.first.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.cumulative_length = self.get_seq_length()  # a sliding window counts only tokens that it gets
        return super().get_mask_sizes(query_length)

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        is_of_gate = self.has_all_keys or keys.shape[0] == self.rows.shape[0]
        if self.places is not None:
            columns = keys.shape[2] + (self.keys.shape[2] if self.is_initialized else 0)
            is_of_gate = is_of_gate and self.places.shape[1] == columns
        if not is_of_gate:
            raise ValueError("a routed model made this KV cache: only that model can go on with it")
        if self.places is None:
            return super().update(keys, values, *args, **kwargs)
        # Not a sliding window's own update: it would forget columns, some of which may be void.
        rows, batch = self.rows, len(self.places)
        cached = DynamicLayer.update(self, put_rows(keys, rows, batch), put_rows(values, rows, batch))
        return cached if len(rows) == batch else take_rows(cached, rows, batch)

    def crop(self, tokens_to_remove: int) -> None:
        if self.places is not None:  # layer 0, cropped before this one, tells the new length
            self.places = self.places.where(self.places < self.get_seq_length(), -1)
        elif self.is_initialized:  # else closed for all rows
            super().crop(tokens_to_remove)
        if not self.first.get_seq_length():  # what comes next is a new prompt
            self.reset()

    def reset(self) -> None:
        self.gate = self.places = None  # nothing is decided
        super().reset()

    def reorder_cache(self, index: Tensor) -> None:
        """Make row i what row index[i] was; index may be longer or shorter than the batch."""
        if self.gate is None:
            return
        index = index.to(self.gate.device)
        place = (self.gate > 0).any(1).cumsum(0) - 1  # of a kept row's keys
        self.note(self.gate[index], self.fixed)
        if self.places is not None:
            self.places = self.places[index]
        elif not self.has_all_keys:
            index = place[index[self.rows]]
        if self.is_initialized:
            super().reorder_cache(index)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:  # the first layer's rows are repeated already
        self.reorder_cache(torch.arange(len(self.first.keys) // repeats).repeat_interleave(repeats))


def _routed_cache_layer(cache: Cache | None, router: Router, tokens: int) -> _RoutedCacheLayer:
    """The cache's layer of this router, made a routed one at its first use, in a call of `tokens` tokens.

    A layer for this call alone, if there is no cache, or nothing to keep: tokens of an MLP have no keys, and
    are routed at each call.
    """
    i, granularity = router.layer, router.config.granularity
    if cache is None or granularity == "mlp-token":
        return _RoutedCacheLayer()
    while len(cache.layers) <= i:
        cache.layers.append(cache.layer_class_to_replicate())
    if getattr(layer := cache.layers[i], "granularity", None) != granularity:
        # Before an MLP, the attention of its layer has cached what this call brought.
        has_all_keys = granularity.startswith("mlp")
        is_new = layer.get_seq_length() <= tokens * has_all_keys
        if type(layer) not in ROUTABLE or not is_new or getattr(cache, "offloading", False):
            raise ValueError("routing needs a new DynamicCache, not static, not begun without routers")
        layer.granularity, layer.has_all_keys = granularity, has_all_keys
        layer.first = next(one for one in cache.layers if isinstance(one, DynamicLayer))
        _mix_in({layer: _RoutedCacheLayer})
    return layer


# ---- Attaching and detaching.
def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder layers. Llama 4's is not found by get_decoder (transformers 5.23)."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else getattr(found, "model", found)


def attention_layers(model: nn.Module) -> list[int]:
    """Layers whose `self_attn` caches a key and a value for each token, as linear attention does not."""
    layers, caches = getattr(decoder_of(model), "layers", ()), DynamicCache(config=model.config).layers
    fit = [getattr(layer, "self_attn", None) and type(one) in ROUTABLE for layer, one in zip(layers, caches)]
    return [i for i, fits in enumerate(fit) if fits]


_GATED = {"attention": _GatedAttention, "mlp": _Gated, "block": _GatedBlock}


def gated_module(layer: nn.Module, granularity: str) -> nn.Module | None:
    """What of a decoder layer a gate can skip."""
    child = _GATED[granularity.split("-")[0]].child
    return getattr(layer, child, None) if child else layer


def add_mindskip(model: nn.Module, config: MindSkipConfig) -> nn.Module:
    """Gate what `config.granularity` names, in `config.layers`, in place. All routers are zero, scores 0.5.

    ValueError if the model has routers, or these layers cannot be routed. The model is then left as it was.
    """
    if routers(model):
        raise ValueError("the model has MindSkip routers already: call remove_mindskip first")
    if not set(config.layers) <= set(fit := attention_layers(model)[1:]):
        raise ValueError(f"layers {config.layers}: only the attention of layers {fit} can be routed")
    decoder, text = decoder_of(model), model.config.get_text_config(decoder=True)
    what, unit = config.granularity.split("-")
    attention, temperature = model.config._attn_implementation, getattr(text, "attn_temperature_tuning", 0)
    if unit == "token" and (temperature or attention not in ("eager", "sdpa")):
        raise ValueError(f"gates for tokens need eager or sdpa attention, without temperature: {attention}")
    if getattr(text, "num_kv_shared_layers", 0) or attention == "flex_attention":
        raise ValueError("keys shared between layers, or flex_attention, leave no rows to skip")
    mixins, gated = dict.fromkeys((model, decoder), _RoutedModel), {}  # all that can fail comes first
    for i in config.layers:
        layer = decoder.layers[i]
        sublayer = gated_module(layer, config.granularity)
        found = re.search(_GATED[what].use, inspect.getsource(type(layer).forward))
        if sublayer is None or hasattr(sublayer, "router") or not found:
            raise ValueError(f"layer {i} ({type(layer).__name__}) has no {what} that can be left out")
        router = Router(i, config, text.hidden_size, next(sublayer.parameters()).device)
        router.train(layer.training)  # a new module is in training mode, and would skip nothing
        norm = tuple(getattr(layer, name) for name in found.groups() if name)
        gated[sublayer] = router, norm
        mixins |= {layer: _RoutedLayer} | {sublayer: _GATED[what]} | dict.fromkeys(norm, _DeferredNorm)
    for sublayer, added in gated.items():
        sublayer.router, sublayer.own_norm = added
    _mix_in(mixins)
    model.routing = decoder.routing = replace(config)  # an object of this model's own
    return model


def remove_mindskip(model: nn.Module) -> nn.Module:
    """The original model again: the same modules, of the same classes, with nothing added."""
    for module in [one for one in model.modules() if isinstance(one, _Mixin)]:
        _mix_in({module: None})
        if isinstance(getattr(module, "router", None), Router):
            del module.router, module.own_norm
        vars(module).pop("routing", None)
    return model


def _mix_in(mixins: dict[object, type | None]) -> None:
    """Put a mixin before the class of each object, or take it out again where it is None."""
    for one, mixin in mixins.items():
        new = _mixed(mixin, type(one)) if mixin else type(one).__bases__[1]
        one.__class__ = new
        for name in ("forward", "_old_forward"):  # where accelerate keeps the `forward` that it found
            if getattr(vars(one).get(name), "__self__", None) is one:
                setattr(one, name, new.forward.__get__(one))


# A class with `mixin` before `old`, under the name of `old`: others look that up.
_mixed = cache(lambda mixin, old: type(old.__name__, (mixin, old), {"__module__": old.__module__}))


# ---- Saving and loading.
def _shape_of(model: nn.Module) -> dict:
    text = model.config.get_text_config(decoder=True)
    return {name: getattr(text, name) for name in ("model_type", "hidden_size", "num_hidden_layers")}


def save_routers(model: nn.Module, path: str | Path, state: dict[str, Tensor] | None = None, **about) -> None:
    """Write routers, `state` (more tensors), and as metadata configuration and `about`; all or nothing."""
    found = {router.config for router in routers(model)}
    if len(found) != 1 or not all(weight.isfinite().all() for weight in router_parameters(model)):
        raise ValueError(f"routers to save must be there, finite, and of one configuration: got {found}")
    tensors = {f"layers.{r.layer}.router.weight": r.weight.detach().cpu() for r in routers(model)}
    described = {"config": asdict(found.pop()), "model": _shape_of(model), "about": about}
    write(save(tensors | (state or {}), {"mindskip": json.dumps(described)}), path)


def write(data: bytes, path: str | Path) -> None:
    """All or nothing: a run that is killed, or a disk that is full, leaves no half-written file."""
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from error


def read_routers(path: str | Path, revision: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """What a file, or routers.safetensors of a folder or Hub id, holds: ({config, model, about}, tensors)."""
    if Path(path).is_dir():
        path = Path(path, "routers.safetensors")
    elif not Path(path).is_file() and Path(path).suffix != ".safetensors":
        path = hf_hub_download(str(path), "routers.safetensors", revision=revision)
    try:
        with safe_open(path, "pt") as file:
            described = {"about": {}} | json.loads((file.metadata() or {})["mindskip"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        described["config"], size = MindSkipConfig(**described["config"]), described["model"]["hidden_size"]
        for weight in (tensors[f"layers.{i}.router.weight"] for i in described["config"].layers):
            if weight.shape != (size,) or not weight.float().isfinite().all():
                raise ValueError(f"a router is not finite, or not of {size} weights")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no MindSkip routers: {error}") from error
    return described, tensors


def load_routers(model: nn.Module, path: str | Path, revision: str | None = None) -> nn.Module:
    """Attach the routers of a file or Hub id, in place of any. ValueError if they are for another model."""
    described, tensors = read_routers(path, revision)
    if described["model"] != _shape_of(model):
        raise ValueError(f"{path} was tuned for {described['model']}, but this model is {_shape_of(model)}")
    add_mindskip(remove_mindskip(model), described["config"])
    for router in routers(model):
        router.weight.data.copy_(tensors[f"layers.{router.layer}.router.weight"])
    return model
