"""One traced forward: which weights act on what, and where attention happens, whatever the library.

Every tensor carries tags of where it came from: the weights since the last matrix product, and what
happened to it on the way ("act", "norm", "sum" of two branches, "mul" of two branches, "neg", an
attention). Weights are known by identity, so a weight that is read by another module than its own
(torchvision's Swin, BEiT) is seen too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from greenvis.core.example import tensors_in
from greenvis.errors import BadInput
from greenvis.models.structure.calls import AttentionCall, Call, Tags, Trace, weights_in
from greenvis.models.structure.probing import image, probing, shapes

_ACTIVATIONS = frozenset({
    "relu", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu",
    "leaky_relu", "prelu", "rrelu",
    "mish", "softplus", "selu", "celu", "glu", "hardtanh", "clamp", "erf", "softsign", "logsigmoid",
})  # fmt: skip
_NORMS = frozenset({"layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"})
_PRODUCTS = frozenset({"matmul", "rmatmul", "bmm", "baddbmm", "einsum"})
_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_POOLS = {
    "mean": "mean", "adaptive_avg_pool2d": "mean", "adaptive_avg_pool1d": "mean",
    "avg_pool2d": "mean", "amax": "max",
    "adaptive_max_pool2d": "max", "max_pool2d": "max",
}  # fmt: skip
_NEGATIONS = frozenset({"neg", "negative", "view_as_complex", "rsub"})
# only the first operand's values matter
_LIKENESSES = frozenset({"type_as", "expand_as", "view_as", "reshape_as", "to"})


def trace(model: nn.Module, x: Tensor) -> Trace:
    """Run `model(x)` once, without leaving a trace on the model, and return what it did.

    Args:
        model: The model.
        x: Images (batch, channels, height, width).

    Returns:
        The calls, attentions and shapes of the forward.

    Raises:
        BadInput: Where the forward fails, saying in which module.
    """
    traced = Trace(x)
    names = {id(m): n for n, m in model.named_modules()}
    stack: list[str] = []
    hooks = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(names[id(module)])
        traced.executed.setdefault(stack[-1])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path = stack.pop()
        first_input = next(tensors_in((args, kwargs)), None)
        first_output = output[0] if isinstance(output, tuple) and output else output
        shapes = (
            tuple(t.shape) if isinstance(t, Tensor) else () for t in (first_input, first_output)
        )
        traced.runs.setdefault(path, []).append((next(shapes), next(shapes)))
        # compiled code hides its functions: take the inputs' tags
        if any(t not in traced.tags for t in tensors_in(output)):
            tags = traced.tags_of(args, kwargs)
            if tags and next(module.parameters(), None) is None:
                tags |= {("act", None)}
            for tensor in tensors_in(output):
                if tags and tensor not in traced.tags:
                    traced.tags[tensor] = tags

    with probing(model):
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            with _Recorder(traced, model, stack):
                traced.output = model(x)
        except Exception as error:
            at = f"'{stack[-1]}' of " if stack and stack[-1] else ""
            raise BadInput(
                f"a forward of {type(model).__name__} on an input {tuple(x.shape)} failed in "
                f"{at}it: {type(error).__name__}: {str(error).strip()[:300]}; give an example "
                "input that the model takes"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
    return traced


def trace_any(model: nn.Module) -> Trace:
    """Trace a model on the first image shape it takes: its configuration's, else common sizes.

    Args:
        model: The model.

    Returns:
        The calls, attentions and shapes of the forward.

    Raises:
        BadInput: With the shapes that were tried and why the first one failed.
    """
    tried: dict[tuple[int, ...], str] = {}
    for shape in shapes(model):
        if shape in tried:
            continue
        try:
            return trace(model, image(model, shape))
        except BadInput as error:
            tried[shape] = str(error)
    reason = next(iter(tried.values()), "it has no parameters")
    raise BadInput(
        f"no image shape found that {type(model).__name__} takes; tried {[*tried]}: {reason}. "
        "Structure is read from one forward on an image batch (batch, channels, height, width)"
    )


class _Recorder(TorchFunctionMode):
    """Sees every torch function of the forward and passes the tags on."""

    def __init__(self, traced: Trace, model: nn.Module, stack: list[str]) -> None:
        super().__init__()
        self.traced, self.stack = traced, stack
        self.modules = dict(model.named_modules())
        self.owner = {
            id(p): n
            for n, m in self.modules.items()
            for p in m._parameters.values()
            if p is not None
        }
        # q and k of each product of two activations
        self.pairs: dict[int, tuple[Tags, Tags, tuple[int, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # an in-place function changes its own input's tags
        before = self.traced.tags_of(args, kwargs)
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        tags = self._tags(name, args, kwargs, before, out)
        if tags:
            for tensor in tensors_in(out):
                self.traced.tags[tensor] = tags
        return out

    def _tags(self, name: str, args: Any, kwargs: Any, before: Tags, out: Any) -> Tags:
        operands = list(tensors_in((args, kwargs)))
        if name in ("linear", *_CONVS):
            return self._weighted(name, args, kwargs, before, out)
        if name == "multi_head_attention_forward":
            return self._multihead(args, kwargs)
        if name == "scaled_dot_product_attention":
            q, k, v = (
                args[i] if len(args) > i else kwargs[n]
                for i, n in enumerate(("query", "key", "value"))
            )
            tags = self.traced.tags_of
            return self._attention(tags(q), tags(k), tags(v), tuple(q.shape))
        if name in _LIKENESSES:
            return self.traced.tags_of(args[:1])
        if name in _PRODUCTS:
            return self._product(operands[-2:], before)
        if name in _NORMS or name == "rsqrt":
            return self._norm(name, args, kwargs, before, out)
        if name in ("softmax", "log_softmax"):
            return before | {("map", i) for kind, i in before if kind == "scores"}
        if name in _ACTIVATIONS:
            return before | {("act", None)}
        if name in _NEGATIONS:
            return before | {("neg", None)}
        if name in _POOLS:
            return before | {("pool", _POOLS[name])}
        branches = [
            t for t in (self.traced.tags_of(o) for o in operands) if weights_in(t) or _attentions(t)
        ]
        if len(branches) > 1 and name in ("add", "iadd", "radd", "sub", "isub"):
            return before | {("sum", None)}
        if len(branches) > 1 and name in ("mul", "imul", "rmul"):
            gates = {("gate", w) for t in branches if ("act", None) in t for w in weights_in(t)}
            return before | {("mul", None)} | gates
        if name in ("cat", "concat", "concatenate"):
            parts = list(tensors_in(args[0] if args else kwargs["tensors"]))
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if all(p.dim() == 3 for p in parts) and dim in (1, -2):
                self.traced.joins.append(tuple(p.shape[1] for p in parts))
        return before

    def _weighted(self, name: str, args: Any, kwargs: Any, before: Tags, out: Tensor) -> Tags:
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        groups = (args[6] if len(args) > 6 else kwargs.get("groups", 1)) if name != "linear" else 1
        top = self.stack[-1] if self.stack else ""
        path, direct = self.owner.get(id(weight)), True
        if (
            path is None
            # a weight computed on the fly (standardised, parametrised): its module is the one that
            # runs
        ):
            path, direct = top, False
            if not isinstance(self.modules[top], (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                return before
        depthwise = groups > 1 and groups == x.shape[1 - weight.dim()]
        tags = self.traced.tags_of(x)
        for attention in (self.traced.attentions[i] for i in _attentions(tags)):
            inputs = weights_in(attention.q | attention.k | attention.v)
            # summed with the stream: past `out`
            beside = ("sum", None) in tags and not set(weights_in(tags)) <= set(inputs)
            if attention.out is None and not beside:
                attention.out = path
        kind = "linear" if name == "linear" else "conv"
        i, o, w = tuple(x.shape), tuple(out.shape), tuple(weight.shape)
        self.traced.calls.append(
            Call(path, kind, tags, i, o, w, depthwise, functional=path != top, direct=direct)
        )
        own: Tags = frozenset({("weight", path)})
        if depthwise:
            return tags | own | {("depthwise", path)}
        # talking heads: a layer of heads between product and softmax
        return own | {t for t in tags if t[0] in ("scores", "map") and self._of_heads(t[1], w)}

    def _of_heads(self, index: Any, weight: tuple[int, ...]) -> bool:
        """Whether a layer's inputs are as many as the heads of a product."""
        shape = self.pairs[index][2]
        return len(shape) > 3 and weight[1] == shape[-3]

    def _norm(self, name: str, args: Any, kwargs: Any, before: Tags, out: Any) -> Tags:
        path = next(
            (self.owner[id(t)] for t in tensors_in((args, kwargs)) if id(t) in self.owner), None
        )
        if path is None:
            path = self.stack[-1] if self.stack else ""
        own = list(self.modules[path]._parameters.values())
        leaf = not self.modules[path]._modules
        if (name != "rsqrt" and path) or (
            leaf and own and all(p is None or p.dim() == 1 for p in own)
        ):
            shape = tuple(next(tensors_in(args), out).shape)
            self.traced.calls.append(Call(path, "norm", before, shape, shape))
        return before | {("norm", None)}

    def _product(self, operands: list[Tensor], before: Tags) -> Tags:
        """Note q·k of two activations, and an attention where a softmax of one meets v."""
        if len(operands) < 2 or any(isinstance(o, nn.Parameter) for o in operands):
            return before
        a, b = (self.traced.tags_of(o) for o in operands)
        maps = {i for kind, i in a ^ b if kind == "map"}
        if maps:
            index = max(maps)
            v = b if ("map", index) in a else a
            return self._attention(
                self.pairs[index][0], self.pairs[index][1], v, self.pairs[index][2]
            )
        if not (weights_in(a) and weights_in(b)):
            return before
        index = len(self.pairs)
        self.pairs[index] = (a, b, tuple(operands[0].shape))
        return before | {("scores", index)}

    def _attention(self, q: Tags, k: Tags, v: Tags, shape: tuple[int, ...]) -> Tags:
        heads = shape[-3] if len(shape) > 3 else None
        return self._add(AttentionCall(tuple(self.stack), "linear", q, k, v, shape, heads))

    def _multihead(self, args: Any, kwargs: Any) -> Tags:
        named = ("query", "key", "value", "embed_dim_to_check", "num_heads")
        query, _, _, _, heads = (
            args[i] if len(args) > i else kwargs[n] for i, n in enumerate(named)
        )
        length, batch, dim = (
            query.shape if query.dim() == 3 else (query.shape[0], 1, query.shape[-1])
        )
        call = AttentionCall(
            tuple(self.stack), "multihead", shape=(batch, length, dim), heads=heads, out=""
        )
        return self._add(call) | {("weight", self.stack[-1])}

    def _add(self, call: AttentionCall) -> Tags:
        if self.traced.first_attention is None:
            self.traced.first_attention = len(self.traced.calls)
        self.traced.attentions.append(call)
        return frozenset({("attention", len(self.traced.attentions) - 1)})


def _attentions(tags: Tags) -> list[int]:
    return [i for kind, i in tags if kind == "attention"]
