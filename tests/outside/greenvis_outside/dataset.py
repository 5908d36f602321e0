"""A data set from outside, drawn by its seed: all a third party has to write."""

import torch

from greenvis.data import DataSet, Split, Stored
from greenvis.data.splits import sha256


class Stripes(DataSet):
    """Lines that run across or down, under noise."""

    name = "stripes"
    source = "drawn by greenvis-outside"
    licence = "CC0-1.0"
    size = {"train": 200, "test": 80}
    classes = ("across", "down")

    def read(self) -> Stored:
        """Return all of them: 8 pixels, grey."""
        train, test = (self._draw(count, part) for part, count in enumerate(self.size.values()))
        digest = sha256(x.numpy().tobytes() for s in (train, test) for x in (s.images, s.labels))
        return Stored(train, test, self.classes, digest, img_size=8, in_chans=1)

    def _draw(self, count: int, part: int) -> Split:
        generator = torch.Generator().manual_seed(2 * self.spec.seed + part)
        labels = torch.arange(count) % 2
        images = torch.randint(0, 128, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        lines = torch.randint(0, 8, (count,), generator=generator)
        for image, label, line in zip(images, labels, lines, strict=True):
            image[0].movedim(int(label), 0)[line] += 127
        return Split(images, labels)
