"""AdaLoRA: factors kept near orthogonal by a penalty, and a budget of ranks that moves to the
layers that need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.model import AdaLoraModel
from torch import Tensor, nn

from greenvis.core.attached import below
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared.lora_layers import NAME


def orthogonality(factors: Iterable[tuple[str, Tensor]]) -> Tensor:
    """Return the mean of ‖A·Aᵀ − I‖ over A factors (rank, in) and ‖Bᵀ·B − I‖ over B factors (out,
    rank), a scalar.

    Zhang et al. (2023, eq. 4), with PEFT's plain Frobenius norm (the paper squares it). factors: by
    name, of which the part "lora_A" or "lora_B" tells the kind.
    """
    distances = []
    for name, factor in factors:
        gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
        distances.append(
            torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        )
    return torch.stack(distances).mean()


class Ranks:
    """PEFT's rank allocation on a model with AdaLoRA layers.

    Every layer starts with `config.init_r` ranks. For the first tenth of the training all stay;
    then the least important of all layers' ranks are switched off, step by step, until on average
    `config.target_r` are left, which learn on for the last three tenths.
    """

    def __init__(self, model: nn.Module, config: AdaLoraConfig, total_steps: int | None) -> None:
        self.tuner = AdaLoraModel(model, config, NAME)
        self.config = config
        self.total_steps = total_steps
        self.step = 0

    @property
    def factors(self) -> list[tuple[str, nn.Parameter]]:
        """A, B and E of every layer, by name."""
        return [(n, p) for n, p in self.tuner.model.named_parameters() if "lora_" in n]

    def penalty(self, total_steps: int | None) -> Tensor:
        """Return the orthogonality of the factors. Raises BadInput where nobody said how long the
        training is."""
        self._plan(total_steps)
        return orthogonality((n, p) for n, p in self.factors if "lora_E" not in n)

    def advance(self, total_steps: int | None) -> None:
        """Weigh the ranks by the step's gradients and switch off what the budget no longer has room
        for."""
        self._plan(total_steps)
        settled = self.step >= (self.config.total_step or 0) - self.config.tfinal
        missing = [n for n, p in self.factors if p.grad is None]
        if missing and not settled:
            raise GreenvisError(
                f"adalora weighs ranks by their gradients, and '{missing[0]}' has none: call "
                "step_end() of the wrapped model between optimizer.step() and optimizer.zero_grad()"
            )
        # a gradient that is not finite is of a step that a scaler skipped: one such would spoil the
        # running means for good
        if settled or all(p.grad.isfinite().all() for _, p in self.factors if p.grad is not None):
            self.tuner.update_and_allocate(self.step)
        self.step += 1

    def _plan(self, total_steps: int | None) -> None:
        total = self.total_steps or total_steps
        if total is None:
            raise BadInput(
                "adalora spreads its budget of ranks over the whole training and does not know its "
                "length: set total_steps, "
                "or call plan(steps) of the wrapped model before the first step"
            )
        if self.step == 0:
            self.config.total_step, self.config.tinit = total, total // 10
            self.config.tfinal = 3 * total // 10

    def state_dict(self) -> dict[str, Tensor]:
        """Return how far the allocation is: the step, the ranks that are on, and the importances
        until they are settled."""
        if not self.step:
            return {}
        allocator = self.tuner.rankallocator
        state = {"ranks.step": torch.tensor([self.step, self.config.total_step])}
        state |= {
            f"ranks.on.{n}": torch.tensor(on) for n, on in (self.config.rank_pattern or {}).items()
        }
        state |= {f"ranks.importance.{n}": t for n, t in allocator.exp_avg_ipt.items()}
        return state | {f"ranks.uncertainty.{n}": t for n, t in allocator.exp_avg_unc.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        allocator = self.tuner.rankallocator
        allocator.reset_ipt()
        self.step, self.config.rank_pattern = 0, None
        if "ranks.step" not in state:
            return
        total = int(state["ranks.step"][1])
        self._plan(total)
        self.config.total_step = total
        self.step = int(state["ranks.step"][0])
        on = {n: t.tolist() for n, t in below(state, "ranks.on.").items()}
        self.config.rank_pattern = on or None
        for name, factor in self.factors:
            if f"ranks.importance.{name}" in state:
                allocator.exp_avg_ipt[name] = state[f"ranks.importance.{name}"].to(factor)
                allocator.exp_avg_unc[name] = state[f"ranks.uncertainty.{name}"].to(factor)
                # PEFT's sign that the others are there
                allocator.ipt[name] = torch.zeros_like(factor)
