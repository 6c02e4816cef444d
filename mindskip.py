"""MindSkip: attention that runs only where a tiny router, tuned on a frozen model, says so.

Paper: He et al., "Router-Tuning", arXiv 2410.13184v6. For attention F, its normalised input x, a gate per sequence:

    r = mean_t(x_t) . w      s = sigmoid(r)      m = 1[s >= tau]      y = residual + m * F(x)

    router      w, the linear map that makes a logit r; (D,), float32, no bias, starts at zero
    score       s, the sigmoid of the logit
    threshold   tau; the gate opens where score >= threshold
    gate        m, exactly 0.0 or 1.0; 1 runs attention
    capacity    the fraction of gates that should open (a setting); keep ratio: that did (a result)
    voters      the tokens that the mean is taken over: a prompt's, never padding's or an answer's
    shapes      B rows, T tokens in this call, S tokens visible through the KV cache, D hidden size

Training computes every attention and multiplies by the gate, so that closed gates learn too. Evaluation calls no
attention for a closed gate and caches nothing; both give the same logits. Differs from the paper: only prompt tokens
vote, once, at prefill. Absent on purpose: other granularities (worse in the paper), and copies of modelling code.
"""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, StaticLayer


@dataclass(frozen=True)
class MindSkipConfig:
    """What a saved router is."""

    layers: tuple[int, ...]  # routed decoder layers; never layer 0: the KV cache takes its length from it
    granularity: str = "attention-sequence"  # what is gated, and the unit that shares a gate
    threshold: float = 0.5  # score in [0, 1] at or above which a gate opens
    capacity: float = 0.5  # target keep ratio, a fraction in [0, 1]

    def __post_init__(self):
        object.__setattr__(self, "layers", layers := tuple(sorted(self.layers)))
        if not layers or len(set(layers)) < len(layers) or any(type(i) is not int or i < 1 for i in layers):
            raise ValueError(f"layers must be different integers from 1 up (layer 0 is never routed), got {layers}")
        if self.granularity != "attention-sequence":
            raise ValueError(f"granularity must be 'attention-sequence', got {self.granularity!r}")
        for name, value in (("threshold", self.threshold), ("capacity", self.capacity)):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


# ---- The idea: a score, a hard step, and a gradient that ignores the step ----
def straight_through(score: Tensor, threshold: float) -> Tensor:
    """Gate m = 1[score >= threshold], with dL/dscore := dL/dm.  Source: arXiv 2410.13184v6, Eq. 3/5."""
    hard = (score >= threshold).to(score.dtype)
    # Parentheses matter: (hard + score) - score.detach() rounds away from 0 and 1.
    return hard + (score - score.detach())


class Router(nn.Module):
    """One logit for each sequence from the mean over its voters; float32 whatever the model's dtype."""

    def __init__(self, hidden_size: int, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, device=device))  # score 0.5: open, the dense model

    def forward(self, x: Tensor, voters: Tensor | None) -> Tensor:
        """Score each row of x (B, T, D), over voters (B, T) bool or None for all: (B, 1, 1) in (0, 1)."""
        with torch.autocast(x.device.type, enabled=False):  # in bf16 a logit of -0.004 would round to "open"
            share = None if voters is None else voters / voters.sum(1, keepdim=True)  # (B, T), float32
            mean = x.float().mean(1) if share is None else (share[:, None] @ x.float())[:, 0]  # (B, D)
            return torch.sigmoid(mean @ self.weight)[:, None, None]  # (B, 1, 1)

    def _apply(self, fn, recurse=True):
        exact = self.weight.data
        super()._apply(fn, recurse)
        self.weight.data = exact.to(self.weight.device)  # model.to(bfloat16) moves the router, but must not round it
        return self


# ---- Who votes, and where a decision lives ----
class _Voters:
    """Which tokens vote in the current forward; worked out only when a router asks, so never in decoding."""

    def __init__(self, decoder: nn.Module):
        self.decoder, self.said_above, self.source, self.mask = decoder, False, (None, None, None), None

    def listen(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the model and of its decoder: note the masks, and take `voters` off."""
        if module is not self.decoder or not self.said_above:
            attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            self.source, self.mask = (kwargs.pop("voters", None), kwargs.get("labels"), attention_mask), None
        self.said_above = module is not self.decoder  # the decoder, called next, knows neither voters nor labels
        return args, kwargs

    def of(self, x: Tensor) -> Tensor | None:
        """(B, T) bool, or None when every token of x (B, T, D) votes. ValueError if a row has no voter."""
        voters, labels, attention_mask = self.source
        if voters is None and labels is None and attention_mask is None:
            return None
        if self.mask is not None:
            return self.mask.to(x.device)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if voters is not None:
            if voters.shape != mask.shape:
                raise ValueError(f"voters must have shape {tuple(mask.shape)}, got {tuple(voters.shape)}")
            mask = mask & voters.bool().to(x.device)
        elif labels is not None:
            # Tokens before the first one that is scored; a label at position 0 never is (nothing predicts it).
            scored = nn.functional.pad(labels[:, 1:] != -100, (1, 0))
            mask = mask & (scored.cumsum(1) == 0).to(x.device)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            mask = mask & attention_mask[:, -x.shape[1] :].bool().to(x.device)
        elif attention_mask is not None and voters is None:
            raise ValueError("a 4-D attention mask does not say which tokens are padding: pass voters, (B, T) bool")
        if not (has_voter := mask.any(1)).all():
            raise ValueError(f"rows {(~has_voter).nonzero()[:, 0].tolist()} have no token that votes")
        self.mask = mask
        return mask


@CacheLayerMixin.register  # transformers asks isinstance
class RoutedCacheLayer:
    """A layer of a KV cache, for the kept rows only, with their routing decision; as long as the first layer is.

    gate: (B, 1, 1) float32, None before routing. rows: (kept,) indices of rows with an open gate, None for all.
    """

    def __init__(self, inner: CacheLayerMixin, first: CacheLayerMixin):
        self.inner, self.first, self.gate, self.rows = inner, first, None, None

    def __getattr__(self, name):
        if name == "inner" or name.startswith("__"):  # copy.deepcopy asks before there is an inner
            raise AttributeError(name)
        return getattr(self.inner, name)

    def get_seq_length(self) -> int:
        return self.first.get_seq_length()

    cumulative_length = property(get_seq_length)  # a sliding layer's word for it

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return type(self.inner).get_mask_sizes(self, query_length)  # its own rule, on the true length

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if keys.shape[0] != (expected := len(self.gate if self.rows is None else self.rows)):
            raise ValueError(f"this KV cache was made by a routed model: it holds {expected} rows, not {keys.shape[0]}")
        return self.inner.update(keys, values, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        if self.inner.is_initialized:  # closed for all rows: nothing to crop
            self.inner.crop(tokens_to_remove)

    def reset(self) -> None:
        self.gate = self.rows = None
        self.inner.reset()

    def reorder_cache(self, index: Tensor) -> None:
        """Make row i what row index[i] was; index may be longer or shorter than the batch."""
        index = index.to(self.gate.device)
        place = self.gate.flatten().cumsum(0).long()[index] - 1  # where a kept row's keys are
        self.gate = self.gate[index]
        is_open = self.gate.flatten() > 0
        self.inner.reorder_cache(place[is_open])
        self.rows = None if is_open.all() else is_open.nonzero()[:, 0]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.gate)).repeat_interleave(repeats))


class MindSkip(nn.Module):
    """Attention with a gate; holds the original attention, and the layer norm that serves it alone (or Identity)."""

    def __init__(self, attention: nn.Module, layer: int, config: MindSkipConfig, hidden_size: int, voters: _Voters):
        super().__init__()
        self.attention, self.norm, self.norm_name = attention, nn.Identity(), None
        self.router = Router(hidden_size, next(attention.parameters()).device)
        self.layer, self.config, self.voters = layer, config, voters
        self.fixed = self.gate = self.score = None  # fix_gates; last forward's gate, last routing's score, (B, 1, 1)

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention of (B, T, D) where the gate is open, zeros elsewhere; returns (output, attention weights)."""
        cache = kwargs.get("past_key_values")
        if self.training:
            if cache is not None and cache.get_seq_length(self.layer) > 0:
                raise ValueError("training mode cannot continue a KV cache: call model.eval(), and start a new cache")
            self.gate = self._route(x := self.norm(hidden_states))
            output, weights = self.attention(hidden_states=x, **kwargs)
            return output * self.gate.to(output.dtype), weights

        memory = RoutedCacheLayer(None, None) if cache is None else self._memory(cache)  # None: for this call only
        x = self.norm(hidden_states) if memory.gate is None and self.fixed is None else None  # None: not needed (yet)
        if memory.gate is None:  # at prefill; afterwards no router runs, and no device sync
            memory.gate = self._route(hidden_states if x is None else x).detach()
            rows = memory.gate.flatten().nonzero()[:, 0]
            memory.rows = rows if len(rows) < len(memory.gate) else None
        self.gate, rows = memory.gate, memory.rows
        if rows is None:
            return self.attention(hidden_states=self.norm(hidden_states) if x is None else x, **kwargs)
        output = torch.zeros_like(hidden_states)
        if len(rows) == 0:
            return output, None
        x = self.norm(hidden_states[rows]) if x is None else x[rows]  # (kept, T, D)
        kwargs = {name: _take_rows(value, rows, len(output)) for name, value in kwargs.items()}
        kept, weights = self.attention(hidden_states=x, **kwargs)
        return output.index_copy(0, rows, kept), weights

    def _route(self, x: Tensor) -> Tensor:
        """The gate (B, 1, 1) of new sequences x (B, T, D)."""
        if self.fixed is None:
            score = self.router(x, self.voters.of(x))
            self.score = score.detach()
            return straight_through(score, self.config.threshold)
        gate = torch.as_tensor(self.fixed, device=x.device).float().reshape(-1, 1, 1)
        if len(gate) not in (1, len(x)):
            raise ValueError(f"fix_gates gave layer {self.layer} {len(gate)} gates for a batch of {len(x)} rows")
        return gate.expand(len(x), 1, 1)

    def _memory(self, cache) -> RoutedCacheLayer:
        """This layer of the KV cache, where the decision lives."""
        while len(cache.layers) <= self.layer:
            cache.layers.append(cache.layer_class_to_replicate())
        found = cache.layers[self.layer]
        if not isinstance(found, RoutedCacheLayer):
            if isinstance(found, StaticLayer) or found.get_seq_length() > 0:
                raise ValueError("routing needs a new DynamicCache, not a static one, nor one begun without routers")
            first = next(layer for layer in cache.layers if isinstance(layer, CacheLayerMixin))
            cache.layers[self.layer] = found = RoutedCacheLayer(found, first)
        return found


def _take_rows(value, rows: Tensor, batch: int):
    """The kept rows of everything that has one entry for each row of the batch; the rest as it is."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch:
        return value[rows]
    return tuple(_take_rows(item, rows, batch) for item in value) if isinstance(value, tuple) else value


# ---- Attaching and detaching ----
def add_mindskip(model: nn.Module, config: MindSkipConfig) -> nn.Module:
    """Gate the attention of `config.layers`, in place; zero routers: the dense model. ValueError if they do not fit."""
    if routed(model):
        raise ValueError("the model has MindSkip routers already: call remove_mindskip first")
    decoder, text, name = model.get_decoder(), model.config.get_text_config(decoder=True), type(model).__name__
    layers = getattr(decoder, "layers", ())
    fit = [i for i, layer in enumerate(layers) if getattr(layer, "self_attn", None) is not None][1:]
    if not set(config.layers) <= set(fit):
        found = f"in {fit}" if fit else [child for child, _ in (layers[0] if layers else decoder).named_children()]
        raise ValueError(f"layers {config.layers}: looked in {name} for `self_attn` after its first, found {found}")
    if getattr(text, "num_kv_shared_layers", 0) or model.config._attn_implementation == "flex_attention":
        raise ValueError(f"{name}: keys shared between layers, or flex_attention, leave no rows that could be skipped")
    voters = _Voters(decoder)
    voters.handles = [m.register_forward_pre_hook(voters.listen, with_kwargs=True) for m in {model, decoder}]
    for i in config.layers:
        layers[i].self_attn = MindSkip(layers[i].self_attn, i, config, text.hidden_size, voters)
        if model.device.type != "meta":  # a model without weights only shows whether it can be routed
            _move_norm(layers[i], text.hidden_size)
        layers[i].self_attn.train(layers[i].training)  # a new module is in training mode, and would compute everything
        layers[i].self_attn.register_state_dict_post_hook(_base_names)
    return model


def remove_mindskip(model: nn.Module) -> nn.Module:
    """The original model again: the very modules that it had, and no hooks."""
    for skip in routed(model):
        layer = model.get_decoder().layers[skip.layer]
        layer.self_attn = skip.attention
        if skip.norm_name is not None:
            setattr(layer, skip.norm_name, skip.norm)
        for handle in skip.voters.handles:
            handle.remove()
    return model


@torch.no_grad()
def _move_norm(layer: nn.Module, hidden_size: int) -> None:
    """Move the layer norm into the wrapper, so that a closed gate skips it too, if it serves attention alone.

    Families differ, so look: it is the child whose absence shows a closed attention the bare residual, and no more.
    """
    skip, seen, like = layer.self_attn, [], next(layer.parameters())
    hidden = torch.linspace(-1, 1, hidden_size, device=like.device).to(like.dtype).reshape(1, 1, hidden_size)
    hook = skip.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()]), with_kwargs=True
    )
    skip.eval().fixed = False

    def run() -> tuple[Tensor, bool]:
        output = layer(hidden, position_embeddings=None)
        return output[0] if isinstance(output, tuple) else output, any(x is hidden for x in seen[-1])

    expected, is_bare = run()
    norms = [item for item in layer.named_children() if all(p.ndim < 2 for p in item[1].parameters())]
    for name, child in [] if is_bare else norms:
        setattr(layer, name, nn.Identity())
        output, is_bare = run()
        if is_bare and torch.equal(output, expected):
            skip.norm, skip.norm_name = child, name
            break
        setattr(layer, name, child)
    hook.remove()
    skip.fixed = skip.gate = None


def _base_names(skip: MindSkip, state: dict, prefix: str, metadata) -> None:
    """Give state_dict the base model's names, so that save_pretrained writes a checkpoint that it can load."""
    moved = {prefix + "attention.": prefix, prefix + "norm.": f"{prefix.removesuffix('self_attn.')}{skip.norm_name}."}
    for inside, outside in moved.items():
        for key in [key for key in state if key.startswith(inside)]:
            state[key.replace(inside, outside)] = state.pop(key)


def routed(model: nn.Module) -> list[MindSkip]:
    return [module for module in model.modules() if isinstance(module, MindSkip)]


# ---- Tuning: what may change, and the loss that asks for skipping ----
def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Exactly what tuning may change: one weight (D,) for each routed layer, first layer first."""
    return [skip.router.weight for skip in routed(model)]


def _last_gates(model: nn.Module) -> Tensor:
    gates = [skip.gate for skip in routed(model)]
    if not gates or any(gate is None for gate in gates):
        raise ValueError("no gates yet: the model needs routers (add_mindskip) and a forward pass")
    return torch.cat([gate.flatten().to(gates[0].device) for gate in gates])  # (routed layers * B,)


def capacity_loss(model: nn.Module, capacity: float) -> Tensor:
    """ReLU(mean gate - capacity) over all routed layers, of the last forward; arXiv 2410.13184v6, Eq. 9/10."""
    return torch.relu(_last_gates(model).mean() - capacity)


def keep_ratio(model: nn.Module) -> float:
    """The fraction of gates, over routed layers and rows, that were open in the last forward."""
    return _last_gates(model).mean().item()


@contextmanager
def fix_gates(model: nn.Module, gates: dict[int, bool | Tensor]):
    """Overrule routers: {layer: one bool, or a (B,) bool tensor}. Layers not named keep their router."""
    skips = {skip.layer: skip for skip in routed(model)}
    if unknown := sorted(set(gates) - set(skips)):
        raise ValueError(f"layers {unknown} are not routed; routed are {sorted(skips)}")
    with ExitStack() as stack:
        for layer, gate in gates.items():
            stack.callback(setattr, skips[layer], "fixed", skips[layer].fixed)  # afterwards: as it was
            skips[layer].fixed = gate
        yield model


# ---- Saving and loading ----
def _shape_of(model: nn.Module) -> dict:
    text = model.config.get_text_config(decoder=True)
    return {"model_type": text.model_type, "hidden_size": text.hidden_size, "num_layers": text.num_hidden_layers}


def save_routers(model: nn.Module, path: str | Path, state: dict[str, Tensor] | None = None, **about) -> None:
    """Write routers, `state` (more tensors), and as metadata configuration and `about` (JSON); all or nothing."""
    skips = routed(model)
    if not skips:
        raise ValueError("the model has no routers to save: call add_mindskip first")
    tensors = {f"layers.{skip.layer}.router.weight": skip.router.weight.detach().cpu() for skip in skips}
    described = {"config": asdict(skips[0].config), "model": _shape_of(model), "about": about}
    (partial := Path(f"{path}.partial")).write_bytes(save(tensors | (state or {}), {"mindskip": json.dumps(described)}))
    partial.replace(path)


def read_routers(path: str | Path, revision: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """What a file, or routers.safetensors of a folder or Hub id, holds: ({config, model, about}, tensors)."""
    if Path(path).suffix != ".safetensors" and not Path(path).is_file():
        local = Path(path, "routers.safetensors")
        path = local if Path(path).is_dir() else hf_hub_download(str(path), local.name, revision=revision)
    try:
        with safe_open(path, "pt") as file:
            described = {"about": {}} | json.loads((file.metadata() or {})["mindskip"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        described["config"] = MindSkipConfig(**described["config"])
        for i in described["config"].layers:
            weight, model = tensors[f"layers.{i}.router.weight"], described["model"]
            if i >= model["num_layers"] or weight.shape != (model["hidden_size"],) or not weight.isfinite().all():
                raise ValueError(f"the router of layer {i} is not finite, or does not fit {model}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no MindSkip routers: {error}") from error
    return described, tensors


def load_routers(model: nn.Module, path: str | Path, revision: str | None = None) -> nn.Module:
    """Attach the routers of a file or a Hub id, in place of any. ValueError if they are for another kind of model."""
    described, tensors = read_routers(path, revision)
    if described["model"] != _shape_of(model):
        raise ValueError(f"{path} was tuned for {described['model']}, but this model is {_shape_of(model)}")
    for skip in routed(add_mindskip(remove_mindskip(model), described["config"])):
        skip.router.weight.data.copy_(tensors[f"layers.{skip.layer}.router.weight"])
    return model
