"""Denoising networks of diffusers as models that draw images: trained by their own loss, sampled by
diffusers' solvers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.example import Example
from greenvis.errors import BadInput, nearest
from greenvis.models.drawing import Drawing, Setting, counting, schedulers

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Schedule = Literal["squaredcos_cap_v2", "linear", "scaled_linear"]
PREDICTIONS, SCHEDULES = get_args(Prediction), get_args(Schedule)


class Diffusion(Drawing):
    """Learns images of classes by removing noise from them (Ho et al., 2020), or by the velocity
    from images to noise (Lipman et al., 2023), and draws such.

    Args:
        network: `UNet2DModel` or `DiTTransformer2DModel` of diffusers, with classes or without.
        prediction: What it predicts: the noise, v, the image, or the flow's velocity.
        schedule: Of the noise, as diffusers calls it; a flow has none.
        times: Steps of the noise in training.
        label_dropout: Share of the labels hidden in training, which guidance needs; 0: none, and
            the network's class embedding stays as it is.

    What a saved model's weights say of prediction, schedule and times holds, whatever is asked for.

    Attributes:
        objective: What a technique puts in the place of its own loss: images and classes to a
            scalar.

    Raises:
        BadInput: For a network that is not called so.
    """

    kind: Tensor
    range: Tensor
    objective: Callable[[Tensor, Tensor | None], Tensor] | None

    def __init__(
        self,
        network: nn.Module,
        *,
        prediction: Prediction = "epsilon",
        schedule: Schedule = "squaredcos_cap_v2",
        times: int = 1000,
        label_dropout: float = 0.1,
    ) -> None:
        config: Any = getattr(network, "config", {})
        takes = inspect.signature(network.forward).parameters
        if "timestep" not in takes or not config.get("sample_size") or "in_channels" not in config:
            raise BadInput(
                f"{type(network).__name__} is no denoising network of images: name one of "
                "diffusers, such as diffusers/UNet2DModel with block_out_channels"
            )
        for what, value, known in (
            ("prediction", prediction, PREDICTIONS),
            ("schedule", schedule, SCHEDULES),
        ):
            if value not in known:
                raise BadInput(f"unknown {what} '{value}'{nearest(str(value), known)}")
        if not (0 <= label_dropout < 1 and times >= 2):
            raise BadInput(f"label_dropout {label_dropout} is a share, times {times} at least 2")
        flow = prediction == "flow_prediction"
        super().__init__(network, Setting("euler-flow" if flow else "ddim", min(50, times)))
        number = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        self.classes = int(number or 0) if "class_labels" in takes else 0
        self.label_dropout = label_dropout if self.classes else 0.0
        self.null = self._null_class()
        if config.get("num_embeds_ada_norm"):  # a DiT hides labels itself, in training
            self.label_dropout = 0.0
        size = config["sample_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        self.shape = (int(config["in_channels"]), *sides)
        self.objective = None
        kind = [PREDICTIONS.index(prediction), 0, SCHEDULES.index(schedule), times]
        self.register_buffer("kind", torch.tensor(kind))
        # of the pixels seen in training
        self.register_buffer("range", torch.tensor([float("inf"), -float("inf")]))

    def _null_class(self) -> int | None:
        """Return the label that stands for none, of which the network is given an embedding."""
        network: Any = self.network
        embedding = getattr(network, "class_embedding", None)
        if isinstance(embedding, nn.Embedding) and self.label_dropout:
            rows = torch.cat([embedding.weight.detach(), embedding.weight.detach().mean(0)[None]])
            network.class_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
            return self.classes
        return self.classes if network.config.get("num_embeds_ada_norm") else None

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""
        return PREDICTIONS[int(self.kind[0])]

    @property
    def consistent(self) -> bool:
        """As `Drawing` has it."""
        return bool(self.kind[1])

    @property
    def times(self) -> int:
        """Steps of the noise in training."""
        return int(self.kind[3])

    def become(self, prediction: Prediction, consistent: bool, setting: Setting) -> None:
        """Take note of what the network is trained to predict from now on.

        Args:
            prediction: One of `PREDICTIONS`.
            consistent: As the attribute.
            setting: To draw with.
        """
        self.kind[0], self.kind[1] = PREDICTIONS.index(prediction), int(consistent)
        self.set(setting)

    def base(self) -> Any:
        library, times = schedulers(), self.times
        if self.prediction == "flow_prediction":
            return library.FlowMatchEulerDiscreteScheduler(num_train_timesteps=times)
        return library.DDPMScheduler(
            num_train_timesteps=times,
            beta_schedule=SCHEDULES[int(self.kind[2])],
            prediction_type=self.prediction,
        )

    def alphas(self) -> Tensor:
        """Return √ᾱ and √(1 − ᾱ) by time, (2, times), float32 on the model's device."""
        cumulative = self.base().alphas_cumprod.to(self.range.device)
        return torch.stack([cumulative.sqrt(), (1 - cumulative).sqrt()])

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if setting.guidance != 1 and self.null is None:
            raise BadInput(
                f"guidance {setting.guidance:g} needs a network trained with labels hidden: "
                + ("set label_dropout" if self.classes else "this one takes no labels")
            )

    def scaled(self, x: Tensor) -> Tensor:
        """Return images from the data's range in [−1, 1], which training widens."""
        if self.training:
            low, high = x.detach().aminmax()
            self.range.copy_(torch.stack([self.range[0].minimum(low), self.range[1].maximum(high)]))
        low, high = self.range
        return ((x - low) / (high - low).clamp(min=1e-6) * 2 - 1).clamp(-1, 1)

    def unscaled(self, x: Tensor) -> Tensor:
        """Return images in [−1, 1] in the data's range."""
        low, high = self.range
        return low + (high - low) * (x.clamp(-1, 1) / 2 + 0.5)

    def predict(self, x: Tensor, t: Tensor, y: Tensor | None, guidance: float = 1.0) -> Tensor:
        """Return what the network predicts of noisy images.

        Args:
            x: (batch, channels, height, width).
            t: Time, a scalar or (batch,), 0 to `times`.
            y: Classes (batch,), −1 where unknown; None: of the first class.
            guidance: As in `Setting`.
        """
        t = t.to(x.device).expand(len(x))
        more: dict[str, Tensor] = {}
        if self.classes:
            y = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
            more["class_labels"] = torch.where(y < 0, self.null or 0, y)
        if guidance != 1:
            null = torch.full_like(more["class_labels"], self.null or 0)
            labels = torch.cat([more["class_labels"], null])
            out = self._call(torch.cat([x, x]), torch.cat([t, t]), {"class_labels": labels})
            own, none = out.chunk(2)
            return none + guidance * (own - none)
        return self._call(x, t, more)

    def _call(self, x: Tensor, t: Tensor, more: Mapping[str, Tensor]) -> Tensor:
        out = self.network(x, t, **more).sample
        return out[:, : x.shape[1]]  # a variance behind it is not used

    def hidden(self, y: Tensor | None) -> Tensor | None:
        """Return labels of which some are hidden."""
        if y is None or self.null is None or not self.label_dropout:
            return y
        return torch.where(torch.rand(len(y), device=y.device) < self.label_dropout, self.null, y)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"loss": squared error of what is predicted, or `objective`} of images (batch, …)
        of classes (batch,); None: all of the first.

        Raises:
            BadInput: Of a consistency model.
        """
        if self.objective is not None:
            return {"loss": self.objective(x, y)}
        if self.consistent:
            raise BadInput("a consistency model learns from its teacher: use `consistency_model`")
        clean = self.scaled(x)
        noise = torch.randn_like(clean)
        if self.prediction == "flow_prediction":
            share = torch.rand(len(x), device=x.device)
            noisy, target = along(clean, noise, share), noise - clean
            predicted = self.predict(noisy, share * self.times, self.hidden(y))
        else:
            t = torch.randint(self.times, (len(x),), device=x.device)
            signal, sigma = (_columns(a, clean) for a in self.alphas()[:, t])
            noisy = signal * clean + sigma * noise
            target = {
                "epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean
            }[self.prediction]  # fmt: skip
            predicted = self.predict(noisy, t, self.hidden(y))
        return {"loss": F.mse_loss(predicted, target)}

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return what a run begins with, (count, channels, height, width), of variance 1."""
        kind: dict[str, Any] = {"device": self.range.device, "dtype": self.range.dtype}
        return torch.randn(count, *self.shape, generator=generator, **kind)

    def draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.unscaled(self.solve(self.noise(len(y), generator), y, generator))

    @torch.no_grad()
    def repeated(self, y: Tensor) -> tuple[nn.Module, Example, float]:
        """Return the network, an example of what it is called with, and its calls for one image.

        Args:
            y: Classes (batch,).
        """
        with counting(self.network) as rows:
            self.sample(y)
        more = {"class_labels": y.clamp(min=0)} if self.classes else {}
        t = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        return self.network, Example((self.noise(len(y)), t), more), rows[0] / len(y)

    @torch.no_grad()
    def solve(self, noise: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images, about in [−1, 1], that the setting's solver makes of noise.

        Args:
            noise: (batch, channels, height, width), of variance 1.
            y: Classes (batch,).
            generator: Of what the solver draws as it goes.
        """
        scheduler, setting = self.scheduler(), self.drawn_by
        if setting.solver == "euler-flow" and setting.spacing != "linspace":
            ends = [1 - i / setting.steps for i in range(setting.steps)]  # all steps are alike
            scheduler.set_timesteps(sigmas=ends, device=noise.device)
        else:
            scheduler.set_timesteps(setting.steps, device=noise.device)
        takes = inspect.signature(scheduler.step).parameters
        more = {"generator": generator} if "generator" in takes else {}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        shown: Callable[..., Tensor] = getattr(scheduler, "scale_model_input", lambda x, t: x)
        for t in scheduler.timesteps:
            predicted = self.predict(shown(x, t), t, y, setting.guidance)
            x = scheduler.step(predicted, t, x, **more).prev_sample
        return x


def along(clean: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Return points of the straight lines from images to noise (Liu et al., 2023, eq. 1).

    Args:
        clean: (batch, channels, height, width).
        noise: The same.
        share: (batch,), 0 the image, 1 the noise.
    """
    share = _columns(share, clean)
    return (1 - share) * clean + share * noise


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """Return a number per image so that it multiplies images."""
    return values.view(-1, *[1] * (like.dim() - 1))
