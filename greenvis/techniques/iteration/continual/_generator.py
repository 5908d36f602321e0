"""A small generator of labelled images: a conditional variational autoencoder, for replay without a
buffer of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.attached import below, prefixed
from greenvis.errors import BadInput
from greenvis.models.vae import LATENT, elbo, networks

MOST = 3 * 64 * 64  # values of an image: a perceptron draws no larger one worth training on
LR = 1e-3


class Generator:
    """Learns the images of a task and, from what it drew itself before, those of earlier ones (Shin
    et al., 2017).

    The label is given to encoder and decoder (Sohn et al., 2015). Pixels are brought to 0 … 1 by
    the range that the first task's have. All draws come from a generator of its own.
    """

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.classes: list[int] = []  # that it can draw
        self.outputs = 0
        self.shape: tuple[int, ...] = ()
        self.range = torch.tensor([0.0, 1.0])
        self.net = nn.ModuleDict()

    def learn(
        self, loader: Any, outputs: int, epochs: int, share: float, device: torch.device
    ) -> None:
        """Train on a task's (x, y), each batch with `share` as many images of earlier classes;
        outputs: classes in all.

        Raises BadInput for images of more than MOST values.
        """
        if not self.shape:
            self._begin(loader, outputs)
        earlier = list(self.classes)
        net, classes = self.net.to(device), set(earlier)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        memory = networks(self._values, self.outputs).to(device)
        memory.load_state_dict(before)
        optimizer = torch.optim.Adam(net.parameters(), lr=LR)
        for _ in range(epochs):
            for x, y in loader:
                x, y = x.to(device), y.to(device)
                classes |= set(y.tolist())
                pixels = self._pixels(x)
                if earlier:
                    labels = self._labels(earlier, max(1, round(share * len(x)))).to(device)
                    pixels = torch.cat([pixels, self._drawn(memory, labels)])
                    y = torch.cat([y, labels])
                loss = elbo(pixels, *self._run(net, pixels, y))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.net, self.classes = net.cpu(), sorted(classes)

    def draw(self, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return images (count, *shape) and labels (count,) of the classes it knows, each as
        likely."""
        labels = self._labels(self.classes, count)
        low, high = self.range.tolist()
        pixels = self._drawn(self.net.to(device), labels.to(device))
        return (low + (high - low) * pixels).view(count, *self.shape), labels.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(p.nbytes for p in self.net.parameters())

    @property
    def _values(self) -> int:
        return int(torch.tensor(self.shape).prod()) if self.shape else 0

    def _begin(self, loader: Any, outputs: int) -> None:
        low, high = float("inf"), -float("inf")
        for x, _ in loader:
            self.shape = tuple(x.shape[1:])
            low, high = min(low, float(x.min())), max(high, float(x.max()))
        if self._values > MOST:
            raise BadInput(
                f"the generator draws images of up to {MOST:,} values, not {self._values:,}: set "
                "data.img_size, or keep images in a buffer"
            )
        self.outputs, self.range = outputs, torch.tensor([low, max(high, low + 1e-6)])
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.random)))
            self.net = networks(self._values, outputs)

    def _pixels(self, x: Tensor) -> Tensor:
        low, high = self.range.tolist()
        return ((x.flatten(1).float() - low) / (high - low)).clamp(0, 1)

    def _labels(self, classes: Sequence[int], count: int) -> Tensor:
        return torch.tensor(classes)[torch.randint(len(classes), (count,), generator=self.random)]

    def _noise(self, rows: int, device: torch.device) -> Tensor:
        return torch.randn(rows, LATENT, generator=self.random).to(device)

    def _run(self, net: nn.Module, pixels: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts: Any = net
        hot = F.one_hot(y, self.outputs).float()
        mean, log_var = parts["encoder"](torch.cat([pixels, hot], 1)).chunk(2, 1)
        code = mean + (0.5 * log_var).exp() * self._noise(len(pixels), pixels.device)
        return parts["decoder"](torch.cat([code, hot], 1)), mean, log_var

    @torch.no_grad()
    def _drawn(self, net: nn.Module, labels: Tensor) -> Tensor:
        parts: Any = net
        hot = F.one_hot(labels, self.outputs).float()
        return parts["decoder"](
            torch.cat([self._noise(len(labels), labels.device), hot], 1)
        ).sigmoid()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, what it knows, and where its draws are."""
        return {
            **prefixed("net.", self.net.state_dict()),
            "classes": torch.tensor(self.classes, dtype=torch.int64),
            "shape": torch.tensor([self.outputs, *self.shape], dtype=torch.int64),
            "range": self.range,
            "random": self.random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.classes, (self.outputs, *shape) = state["classes"].tolist(), state["shape"].tolist()
        self.shape, self.range = tuple(shape), state["range"].cpu()
        self.random.set_state(state["random"].cpu())
        if self.shape:
            self.net = networks(self._values, self.outputs)
            self.net.load_state_dict(below(state, "net."))
