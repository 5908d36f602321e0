"""What is trained side by side: the same work as people write it without greenvis, with a peer, and
with greenvis."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from greenvis import models
from greenvis.core.installed import Samples
from greenvis.core.wrap import wrap
from greenvis.experiment.session import run as run_recipe
from greenvis.meters import record
from greenvis.techniques import registry

TRAIN, TEST, BATCH, LR = 500, 450, 32, 1e-3
LITE0 = {"ref": "timm/tf_efficientnet_lite0", "pretrained": "efficientnet-lite0"}
VIT = {
    "ref": "hf/vit", "img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3,
}  # fmt: skip
STUDENT = {"ref": "plain/convnet", "in_chans": 3, "channels": [16, 32, 64]}


@dataclass(frozen=True)
class Trained:
    """A training: CPU time of all of it, and the share of test images it is right about."""

    cpu_s: float
    accuracy: float


@dataclass(frozen=True)
class Arm:
    """One way to do a work.

    Args:
        name: Of the peer, or of what greenvis adds.
        train: Trains with a seed.
        lines: Of code, or of a recipe, that a user writes for it; None: not counted.
        ours: Whether it is greenvis.
    """

    name: str
    train: Callable[[int], Trained]
    lines: int | None = None
    ours: bool = False


@dataclass(frozen=True)
class Work:
    """The same work, done in several ways; the first arm is what others are compared with.

    Args:
        name: In the table.
        about: What is trained, and what differs between the arms.
        target: The greatest share of the first arm's CPU time that greenvis may take.
        arms: The ways.
    """

    name: str
    about: str
    target: float
    arms: Sequence[Arm]


@functools.cache
def digits(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits in three channels, float32 (n, 3, side, side) and int64 (n,):
    those to train on, and those to test on."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True).repeat(1, 3, 1, 1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:TRAIN], y[:TRAIN], x[-TEST:], y[-TEST:]


def built(options: dict[str, Any], seed: int) -> nn.Module:
    """Return a model for ten classes."""
    torch.manual_seed(seed)
    ref, rest = options["ref"], {k: v for k, v in options.items() if k != "ref"}
    return models.build(ref, num_classes=10, **rest)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a plain model, or of one of transformers."""
    return getattr(output, "logits", output)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images a model is right about."""
    model.eval()
    answers = torch.cat([logits_of(model(part)) for part in x.split(64)])
    return int((answers.argmax(-1) == y).sum()) / len(y)


def timed(train: Callable[[], float]) -> Trained:
    """Return what a training gives, and the CPU time of this process that it takes."""
    start = time.process_time()
    score = train()
    return Trained(time.process_time() - start, score)


def loop(
    model: nn.Module,
    side: int,
    epochs: int,
    term: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    parameters: Any = None,
    before: Callable[[Tensor], None] = lambda rows: None,
) -> float:
    """Train as by hand: AdamW, a cosine, cross entropy and a further term of images, labels, logits
    and rows."""
    x, y, *test = digits(side)
    chosen = (
        [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    )
    optimizer = torch.optim.AdamW(chosen, LR, weight_decay=0.05)
    steps = epochs * -(-len(y) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(y)).split(BATCH):
            before(rows)
            logits = logits_of(model(x[rows]))
            loss = F.cross_entropy(logits, y[rows])
            if term is not None:
                loss = loss + term(x[rows], y[rows], logits, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return accuracy(model, test[0], test[1])


def recipe(model: dict[str, Any], side: int, epochs: int, techniques: Sequence[Any] = ()) -> Arm:
    """Return greenvis's own way: a recipe, run whole, records and meter included."""
    content = {
        "name": "peers",
        "data": {"name": "digits", "train": TRAIN, "test": TEST, "img_size": side, "in_chans": 3},
        "model": model,
        "train": {"epochs": epochs, "batch_size": BATCH, "lr": LR, "eval_every": 0, "threads": 1},
        "arms": {"ours": {"techniques": list(techniques)} if techniques else {}},
        "meter": {"codecarbon": False},
    }

    def train(seed: int) -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(yaml.safe_dump(content))

            def whole() -> float:
                found = run_recipe(
                    path, overrides=[f"train.seeds=[{seed}]"], runs=Path(folder, "runs")
                )
                (done,) = [record.read(file) for file in record.find([found])]
                return float(done.facts["accuracy"])

            return timed(whole)

    return Arm("greenvis recipe", train, len(yaml.safe_dump(content).splitlines()), ours=True)


def lines(*functions: Callable[..., Any]) -> int:
    """Return the lines of code of functions."""
    return sum(len(inspect.getsource(f).strip().splitlines()) for f in functions)


# -- the works -------------------------------------------------------------------------------------


def fine_tuning(side: int = 64, epochs: int = 4) -> Work:
    """All of EfficientNet-Lite0."""

    def plain(seed: int) -> Trained:
        model = built(LITE0, seed)
        return timed(lambda: loop(model, side, epochs))

    arms = [Arm("plain loop", plain, lines(loop))]
    if importlib.util.find_spec("lightning"):
        arms.append(
            Arm("Lightning", lambda seed: _lightning(seed, side, epochs), lines(_lightning))
        )
    about = f"EfficientNet-Lite0 with ImageNet weights, {side} pixels, {epochs} epochs"
    return Work("fine-tuning", about, 1.0, [*arms, recipe(LITE0, side, epochs)])


def frozen_prefix(side: int = 64, epochs: int = 8, blocks: int = 2) -> Work:
    """The last stages of EfficientNet-Lite0."""

    def plain(seed: int) -> Trained:
        model: Any = built(LITE0, seed)
        frozen = [model.conv_stem, model.bn1, *model.blocks[:-blocks]]
        for module in frozen:
            module.requires_grad_(False)
        return timed(lambda: loop(model, side, epochs))

    ours = recipe(LITE0, side, epochs, [{"partial": {"blocks": blocks, "cache": True}}])
    about = (
        f"the last {blocks} stages of EfficientNet-Lite0, {epochs} epochs: by hand the frozen part "
        "runs at each step, greenvis keeps what it gives"
    )
    return Work("prefix", about, 0.5, [Arm("plain loop", plain, lines(plain, loop)), ours])


def distillation(side: int = 64, epochs: int = 12) -> Work:
    """A small network learns of EfficientNet-Lite0."""
    teacher = built(LITE0, 0)
    loop(teacher, side, 4)
    for parameter in teacher.requires_grad_(False).eval().parameters():
        parameter.grad = None

    def plain(seed: int) -> Trained:
        model = built(STUDENT, seed)

        def term(x: Tensor, y: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
            with torch.no_grad():
                answers = teacher(x)
            soft = F.log_softmax(answers / 4, -1)
            return 16 * F.kl_div(
                F.log_softmax(logits / 4, -1), soft, log_target=True, reduction="batchmean"
            )

        return timed(lambda: loop(model, side, epochs, term))

    def ours(seed: int) -> Trained:
        model = built(STUDENT, seed)
        with tempfile.TemporaryDirectory() as folder:
            distill = registry.find("distill").model_validate({"teacher": teacher, "cache": True})
            live = wrap(model, distill)
            train = timed(
                lambda: loop(
                    model, side, epochs,
                    lambda x, y, logits, rows: live.loss(x, y, logits),
                    live.param_groups(LR),
                    lambda rows: live.set_samples(
                        Samples(Path(folder), {"images": "digits"}, TRAIN, 1, rows)
                    ),
                )
            )  # fmt: skip
            live.set_samples(None)
        return train

    about = (
        f"a small convolutional network learns of EfficientNet-Lite0, {side} pixels, {epochs} "
        "epochs: by hand the teacher answers at each step, greenvis keeps its answers"
    )
    arms = [
        Arm("plain loop, live teacher", plain, lines(plain, loop)),
        Arm("greenvis in that loop", ours, lines(ours, loop), ours=True),
    ]
    return Work("distillation", about, 0.5, arms)


def low_rank(side: int = 32, epochs: int = 6) -> Work:
    """LoRA of a vision transformer."""
    ours = recipe(VIT, side, epochs, [{"lora": {"rank": 4, "targets": ["qkv"]}}])
    peer = Arm("transformers + PEFT", lambda seed: _peft(seed, side, epochs), lines(_peft))
    about = f"LoRA of a vision transformer of 0.7 M parameters, {side} pixels, {epochs} epochs"
    return Work("lora", about, 1.0, [peer, ours])


def metering(side: int = 32, epochs: int = 6) -> Work:
    """A plain training, metered."""

    def plain(seed: int) -> Trained:
        model = built(VIT, seed)
        return timed(lambda: loop(model, side, epochs))

    def codecarbon(seed: int) -> Trained:
        from codecarbon import OfflineEmissionsTracker

        model = built(VIT, seed)

        def train() -> float:
            tracker = OfflineEmissionsTracker(
                country_iso_code="FRA", save_to_file=False, log_level="error"
            )
            with tracker:
                return loop(model, side, epochs)

        return timed(train)

    def ours(seed: int) -> Trained:
        from greenvis.meters.track import track

        model = built(VIT, seed)

        def train() -> float:
            with (
                tempfile.TemporaryDirectory() as folder,
                track("peers", model, dir=folder, quiet=True),
            ):
                return loop(model, side, epochs)

        return timed(train)

    about = f"a vision transformer of 0.7 M parameters, {side} pixels, {epochs} epochs, metered"
    arms = [
        Arm("codecarbon", codecarbon, 2), Arm("no meter", plain, 0),
        Arm("greenvis.track", ours, 1, ours=True),
    ]  # fmt: skip
    return Work("metering", about, 1.0, arms)


WORKS: dict[str, Callable[[], Work]] = {
    "lora": low_rank,
    "distillation": distillation,
    "fine-tuning": fine_tuning,
    "prefix": frozen_prefix,
    "metering": metering,
}


def _lightning(seed: int, side: int, epochs: int) -> Trained:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    net = built(LITE0, seed)
    x, y, *test = digits(side)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), LR, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train() -> float:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), loader)
        return accuracy(net, test[0], test[1])

    return timed(train)


def _peft(seed: int, side: int, epochs: int) -> Trained:
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    x, y, *test = digits(side)

    class Digits(Dataset):
        def __len__(self) -> int:
            return len(y)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"pixel_values": x[i], "labels": y[i]}

    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "k_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    model: Any = get_peft_model(built(VIT, seed), config)  # type: ignore[arg-type]

    def train() -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH,
                learning_rate=LR, lr_scheduler_type="cosine", weight_decay=0.05, use_cpu=True,
                save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            Trainer(model=model, args=arguments, train_dataset=Digits()).train()
        return accuracy(model, test[0], test[1])

    return timed(train)
