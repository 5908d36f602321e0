"""What is trained side by side: the same work as people write it without greenvis, with a peer, and
with greenvis."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.bench._digits import TRAIN, built, digits
from greenvis.bench.peers._work import (
    BATCH,
    LITE0,
    LR,
    STUDENT,
    VIT,
    Arm,
    Trained,
    Work,
    accuracy,
    lines,
    loop,
    recipe,
    timed,
)  # fmt: skip
from greenvis.core.installed import Samples
from greenvis.core.wrap import wrap
from greenvis.techniques import registry


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
