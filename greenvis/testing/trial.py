"""One trial of the contract: techniques, an example of each, and one host, point by point."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from greenvis.core.modes import in_mode
from greenvis.core.technique import Installed, Stage, Technique, logits_of
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, some
from greenvis.tasks.classification import Classification
from greenvis.testing._loop import Broken, arguments, fed, loss_of, train

if TYPE_CHECKING:
    from greenvis.testing import Host

TOLERANCE = 1e-5
TASK = Classification()


class Trial:
    """Techniques, an example of each, one host; each method checks one point of the contract,
    raising `Broken`."""

    def __init__(
        self, parts: Sequence[tuple[type[Technique], Mapping[str, Any]]], host: Host
    ) -> None:
        self.parts, self.host = parts, host
        self.x, self.y = host.batch()

    def request(self, model: nn.Module, more: str = "") -> list[Technique]:
        """Return the techniques for a new host model; more: "neutral" or "nothing", those arguments
        of theirs as well."""
        out = []
        for kind, example in self.parts:
            own = {**example, **((getattr(kind, more) if more else None) or {})}
            out.append(kind(**arguments(own, model)))
        return out

    def wrapped(self) -> Wrapped:
        """Return a new host model with the technique live, the same each time."""
        model = self.host.build()
        torch.manual_seed(2)
        return fed(wrap(model, self.request(model)), self.x, self.y)

    def recipe_form(self) -> None:
        """Written as a recipe and read again, a request is the same."""
        for request in self.request(self.host.build()):
            if type(request).model_validate(request.model_dump()) != request:
                raise Broken(f"{request!r} is not itself after model_dump and model_validate")
            if not _holds_model(request):
                form = json.loads(json.dumps(request.recipe_form()))
                if type(request)(**form) != request:
                    raise Broken(f"its recipe form {form} does not give {request!r} back")

    def nothing_matches(self) -> None:
        """Targets that match nothing raise BadInput and change nothing."""
        if any(kind.nothing is None for kind, _ in self.parts):
            return
        model = self.host.build()
        with self._unchanged(model, "a request that matches nothing"):
            try:
                wrap(model, self.request(model, "nothing"))
            except BadInput:
                return
            raise Broken(
                f"{[kind.nothing for kind, _ in self.parts]} matches nothing, but no BadInput was "
                "raised"
            )

    def refusal(self) -> str:
        """Return why the technique refuses the host, "" if it does not; a refusal changes nothing,
        and undo at once is bit-exact."""
        model = self.host.build()
        with self._unchanged(model, "a refusal, or undo at once,"):
            request = self.request(model)
            try:
                live = wrap(model, request)
            except BadInput as error:
                return str(error)
            live.undo()
        return ""

    def neutral(self) -> None:
        """Neutral settings leave outputs unchanged."""
        if any(kind.neutral is None for kind, _ in self.parts):
            return
        model = self.host.build()
        before = self._outputs(model)
        wrap(model, self.request(model, "neutral"))
        self._same(
            self._outputs(model), before, "a fresh, neutral install changes the outputs", TOLERANCE
        )

    def rollback(self) -> None:
        """An install that fails later takes this one back."""
        model = self.host.build()
        with self._unchanged(model, "a later technique's failing install"):
            try:
                wrap(model, [*self.request(model), _Faulty()])
            except BadInput:
                return
            raise Broken("the failing technique behind it was swallowed")

    def undo(self) -> None:
        """Undo is bit-exact after two training steps and eval()."""
        model = self.host.build()
        with self._unchanged(model, "undo after 2 steps"):
            live = fed(wrap(model, self.request(model)), self.x, self.y)
            self._train(live, self._optimizer(live), range(2))
            model.eval()
            live.undo()

    def training(self) -> None:
        """Every declared trainable gets a gradient, steps stay finite, a delta loads into a new
        model, and merge equals."""
        live = self.wrapped()
        loss_of(live, TASK, live.batch(self.x, self.y)).backward()
        without = [n for n, p in live.declared.items() if p.grad is None]
        if without:
            raise Broken(f"declared trainable, but without a gradient: {some(without)}")
        frozen = [
            n
            for n, p in live.model.named_parameters()
            if p.grad is not None and not p.requires_grad
        ]
        if frozen:
            raise Broken(f"frozen, but with a gradient: {some(frozen)}")
        live.model.zero_grad(set_to_none=True)
        self._train(live, self._optimizer(live), range(2))
        after = self._outputs(live.model)
        broken = [n for n, p in live.model.named_parameters() if not p.isfinite().all()]
        if broken or not after.isfinite().all():
            raise Broken(f"not finite after two steps: {some(broken) or 'the outputs'}")
        with tempfile.TemporaryDirectory() as folder:
            live.save(folder)
            again = self.wrapped()
            again.load(folder)
        self._same(
            self._outputs(again.model),
            after,
            "a delta loaded into a new model changes the outputs",
            TOLERANCE,
        )
        with self._unchanged(live.model, "serving"):
            served = self._served(live)
        self._same(self._served(live), served, "served once more the model differs", 0.0)
        if any(i.unmergeable for i in live.installed):
            return
        keys = list(self.host.build().state_dict())
        merged = live.merge()
        self._same(
            self._outputs(merged),
            served[: len(self.x)],
            "the merged model differs from the wrapped one",
            TOLERANCE,
        )
        if list(merged.state_dict()) != keys:
            raise Broken(
                f"the merged model has other keys: {some(set(merged.state_dict()) ^ set(keys))}"
            )

    def resume(self) -> None:
        """Two epochs of two steps, everything saved and loaded between them: as without a break."""
        uninterrupted = self.wrapped()
        steady = self._optimizer(uninterrupted)
        for steps in (range(2), range(2, 4)):
            self._train(uninterrupted, steady, steps)
        first = self.wrapped()
        optimizer = self._optimizer(first)
        self._train(first, optimizer, range(2))
        second = self.wrapped()
        second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
        continued = self._optimizer(second)
        continued.load_state_dict(optimizer.state_dict())
        self._train(second, continued, range(2, 4))
        self._same(
            self._served(second),
            self._served(uninterrupted),
            "a resumed run differs from a whole one",
            1e-6,
        )

    # -- means ------------------------------------------------------------------------------------

    def _optimizer(self, live: Wrapped) -> torch.optim.Optimizer:
        return torch.optim.AdamW(live.param_groups(1e-3))

    def _train(self, live: Wrapped, optimizer: torch.optim.Optimizer, steps: range) -> None:
        train(live, TASK, optimizer, lambda: (self.x, self.y), steps)

    def _served(self, live: Wrapped) -> Tensor:
        with live.served() as model, in_mode(model, False), torch.inference_mode():
            first = logits_of(model(self.x)).clone()
            return torch.cat([first, logits_of(model(self.x)).clone()])

    def _outputs(self, model: nn.Module) -> Tensor:
        with in_mode(model, False), torch.no_grad():
            return logits_of(model(self.x)).detach().clone()

    def _same(self, a: Tensor, b: Tensor, what: str, tolerance: float) -> None:
        if a.shape != b.shape:
            raise Broken(f"{what}: shape {tuple(a.shape)} for {tuple(b.shape)}")
        error = (a - b).abs().max().item()
        if not error <= tolerance * max(1.0, b.abs().max().item()):
            raise Broken(f"{what} by {error:.2e} (at most {tolerance:.0e})")

    @contextmanager
    def _unchanged(self, model: nn.Module, what: str) -> Iterator[None]:
        outputs, before = self._outputs(model), _structure(model)
        values = {n: t.detach().clone() for n, t in model.state_dict().items()}
        yield
        for name, value in _structure(model).items():
            if value != before[name]:
                raise Broken(f"{what} leaves other {name} behind")
        now = model.state_dict()
        if list(now) != list(values) or any(not torch.equal(now[n], t) for n, t in values.items()):
            raise Broken(f"{what} leaves other values behind")
        if not torch.equal(self._outputs(model), outputs):
            raise Broken(f"{what} leaves other outputs behind")


def _holds_model(value: Any) -> bool:
    """Whether a request holds a model itself, which no recipe can write."""
    if isinstance(value, (Mapping, BaseModel)):
        return any(
            _holds_model(v) for _, v in (value.items() if isinstance(value, Mapping) else value)
        )
    return isinstance(value, nn.Module)


def _structure(model: nn.Module) -> dict[str, Any]:
    """Return all but values that undo must give back, by what it is."""
    modules = dict(model.named_modules(remove_duplicate=False))
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
    )
    return {
        "modules": {n: id(m) for n, m in modules.items()},
        "classes": {n: type(m) for n, m in modules.items()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {n: [list(getattr(m, h)) for h in hooks] for n, m in modules.items()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "parameters": {
            n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
        },
        "buffers": {n: id(b) for n, b in model.named_buffers(remove_duplicate=False)},
    }


class _Faulty(Technique):
    """Refuses every model, so that the roll-back of those before it can be seen."""

    name: ClassVar[str] = "faulty"
    stage: ClassVar[Stage] = "objective"

    def install(self, model: nn.Module) -> Installed:
        raise BadInput("refused on purpose")
