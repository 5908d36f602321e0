"""greenvis in accelerate's own loops: an Accelerator that weighs by samples and saves what
techniques hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput
from greenvis.integrations import _state


class GreenAccelerator(Accelerator):
    """An Accelerator for a wrapped model.

        accelerator = GreenAccelerator(live, gradient_accumulation_steps=4)

    `backward` takes a mean over a batch, `criterion(logits, y) + live.loss(x, y, logits)`; an
    optimizer step learns the mean over all its samples, replayed ones included, however many
    micro-batches and processes they came in. `save_state` writes, beside the weights, what
    techniques are and hold; `load_state` takes it back, and a plain Accelerator refuses it.

    Args:
        live: What `gv.wrap` returned.
        options: Those of Accelerator.
    """

    def __init__(self, live: Wrapped, **options: Any) -> None:
        _state.check_live(live, "GreenAccelerator")
        super().__init__(**options)
        if self.gradient_accumulation_steps > 1 or self.mixed_precision == "fp16":
            settings = "gradient_accumulation_steps above 1, nor with mixed_precision fp16"
            _state.refuse_seams(live, f"GreenAccelerator with {settings},", _state.REPEATED)
        self.live = live
        self._mean = distributed.SampleMean()
        self._own: dict[str, Tensor] = {}
        self.register_save_state_pre_hook(self._save)
        self.register_load_state_pre_hook(self._load)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward of a batch's mean loss; with the step's last one, make the gradient the
        mean over its samples."""
        super().backward(loss * self._mean.weight(self.live.trained_on), **kwargs)
        if self.sync_gradients:
            self._mean.rescale(
                self.live.model.parameters(), self.gradient_accumulation_steps * self.num_processes
            )

    def _is_ours(self, model: nn.Module) -> bool:
        return self.unwrap_model(model) is self.live.model

    def _save(
        self, models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str
    ) -> None:
        for model, state in zip(models, weights, strict=True):
            if self._is_ours(model) and self.live.active:
                prefix = next((n for n, m in model.named_modules() if m is self.live.model), "")
                state.update(
                    {
                        f"{prefix}{'.' if prefix else ''}{k}": v
                        for k, v in self.live.checkpoint_config().items()
                    }
                )
        _state.save_own(
            self.live, Path(output_dir) / _state.FOLDER, _state.own_state(self.live, every=True)
        )

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        if not any(self._is_ours(model) for model in models):
            raise BadInput("load_state finds no wrapped model: prepare(live.model) before it")
        self._own = _state.load_own(self.live, Path(input_dir) / _state.FOLDER)

    def load_state(self, *args: Any, **kwargs: Any) -> None:
        """Load what `save_state` wrote, as Accelerator does. Raises BadInput for other techniques
        or processes."""
        super().load_state(*args, **kwargs)
        _state.give_own(self.live, self._own)
