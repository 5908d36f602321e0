"""Learning from unlabelled images: the formula, the stream, and a resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_parts import Own, of_batches
from torch import Tensor, nn

import greenvis as gv
from greenvis import data
from greenvis.core.feeds import Numbered
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.parts import Part
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters.record import find, read
from greenvis.techniques._shared.views import strong_view
from greenvis.techniques.annotation.consistency.consistency import Consistency
from greenvis.techniques.annotation.consistency.pseudo_label import PseudoLabel
from greenvis.techniques.data.adapt.adabn import Adabn

IMAGES = data.load(data.DataSpec(name="digits", train=80, test=30, augment="crop"))
LABELLED, REST = IMAGES.train.take(range(20)), IMAGES.train.take(range(20, 73))  # 53: no multiple


def _net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(144, 10),
    )  # fmt: skip


def test_labelled_weak_and_strong_images_stand_in_one_batch() -> None:
    x, y = LABELLED.batch(range(6))
    live = gv.wrap(_net(), Consistency(mu=2, threshold=0.0, weight=0.5))
    live.feed(unlabeled=[(REST.batch(range(4))[0], torch.zeros(4))])
    torch.manual_seed(1)
    images, labels = live.batch(x, y)
    weak = REST.batch(range(4))[0].repeat(2, 1, 1, 1)
    assert torch.equal(images[6:14], weak)
    torch.manual_seed(1)
    assert torch.equal(images[14:], strong_view(weak, 0.5, 0.6))
    assert labels.tolist() == y.tolist() + [-1] * 16
    logits = live.model(images)
    term = live.terms(images, labels, logits)["consistency"]
    expected = 0.5 * F.cross_entropy(logits[14:], logits[6:14].argmax(1))
    assert term.item() == pytest.approx(expected.item(), abs=1e-6)
    task = live.criterion(F.cross_entropy)(logits, labels)
    assert task.item() == pytest.approx(F.cross_entropy(logits[:6], y).item(), abs=1e-6)
    none = live.criterion(F.cross_entropy)(logits[6:], labels[6:])
    assert none.item() == 0.0
    none.backward()


def test_a_strong_view_cuts_a_square_and_the_classes_hide_in_the_rest() -> None:
    x = torch.rand(50, 2, 16, 16) + 1.0
    torch.manual_seed(2)
    out = strong_view(x, 1.0, 0.0)
    grey = out[:, :1] == out[:, 1:]
    assert out.shape == x.shape
    assert 0.02 < grey.float().mean() < 0.25
    assert (grey.flatten(1).sum(1) <= 81).all()


def test_a_stream_is_a_function_of_seed_and_step() -> None:
    feed = data.Feed(REST, 10, seed=3)
    assert isinstance(feed, Numbered)
    shown = torch.cat([feed.at(step, 1) for step in range(11)])[: 2 * 53]
    assert torch.equal(torch.cat([data.Feed(REST, 10, 3).at(s, 2) for s in range(6)])[:106], shown)
    assert not torch.equal(data.Feed(REST, 10, 4).at(0, 1), feed.at(0, 1))
    for number in range(2):  # each pass shows every image once, in its own order and augmentation
        images, _ = REST.batch(range(53), number)
        part = shown[53 * number : 53 * (number + 1)].flatten(1)
        assert (torch.cdist(part, images.flatten(1)).argmin(1).unique().numel()) == 53
    swept = torch.cat(list(feed.sweep()))
    assert torch.equal(swept, REST.batch(range(53))[0])


def test_a_stream_says_which_images_it_gives_and_gives_some_of_them_alone() -> None:
    feed = data.Feed(REST, 10, seed=3)
    for step in (0, 2, 5):  # the third crosses the end of a pass
        shown, positions = feed.at(step, 2), feed.positions(step, 2)
        weak = [REST.batch([p], (step * 20 + i) // 53)[0] for i, p in enumerate(positions.tolist())]
        assert torch.equal(torch.cat(weak), shown)
        where = torch.tensor([0, 7, 19])
        assert torch.equal(feed.at(step, 2, where), shown[where])


GREEN = Consistency(mu=2, threshold=0.2, refresh=3)
METHODS = [
    Consistency(mu=2, threshold=0.2), Consistency(mu=2, method="freematch"), GREEN,
    Consistency(mu=2, method="softmatch"), PseudoLabel(mu=2, threshold=0.2),
    Consistency(mu=2, method="uda", threshold=0.2, annealing="exp", warmup=0.5),
    Consistency(mu=2, method="softmatch", refresh=2),
]  # fmt: skip


def _part(epochs: int, stop_at: int | None = None, method: gv.Technique = METHODS[0]) -> Part:
    spec = TrainSpec(epochs=epochs, batch_size=10, lr=0.01, checkpoint_every_s=1e-9, eval_every=1)

    def batches(epoch: int, start: int) -> Any:
        loader = data.batches(LABELLED, 10, epoch=epoch, start=start, shuffle=True)
        for number, (x, y) in enumerate(loader, start):
            if stop_at == 2 * epoch + number:
                raise KeyboardInterrupt
            yield x, y

    techniques = [method, Adabn(images=16), gv.Ema(decay=0.8)]
    part = of_batches(batches, 2, lambda: data.batches(IMAGES.test, 30), spec, techniques)
    return Part(**{**vars(part), "feeds": {"unlabeled": REST, "target": IMAGES.test}})


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("stop_at", "method"), [(n, METHODS[0]) for n in (3, 4)] + [(5, m) for m in METHODS]
)
def test_a_training_with_two_streams_resumes_to_the_bit(
    tmp_path: Path, stop_at: int, method: gv.Technique
) -> None:
    def fit(part: Part, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], Any]:
        with gv.track("feeds", dir=tmp_path) as run:
            outcome = loop.run(Own(_net, [part], 3, checkpoint), run)
        return {k: v.clone() for k, v in outcome.live.state_dict().items()}, outcome

    uninterrupted, first = fit(_part(4, None, method))
    file = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(_part(4, stop_at, method), file)
    resumed, second = fit(_part(4, None, method), file)
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(v, uninterrupted[k]) for k, v in resumed.items())
    assert first.metrics == second.metrics
    facts = first.live.facts()
    assert facts == second.live.facts()
    assert 0 < facts[f"{method.name}_sure"] <= 1
    roles = {e["role"]: e["count"] for p in find([tmp_path]) for e in read(p).images}
    assert roles == {"unlabelled": 53, "target": 30}


def test_a_recipe_without_the_stream_is_refused_with_what_to_write(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: r\ndata: {name: digits, train: 40, test: 20}\nmodel: {ref: timm/resnet10t, in_chans: 1}\n"
        "train: {epochs: 1}\narms:\n  plain: {}\n  semi: {techniques: [consistency]}\n"
    )
    with pytest.raises(BadInput, match=r"r\.yaml:7: 'consistency' draws from .*unlabeled: rest"):
        gv.run(file, runs=tmp_path / "runs")
    assert not (tmp_path / "runs" / "r" / "semi").exists()
    part = of_batches(lambda e, s: [], 1, tuple, TrainSpec(), [Consistency()])
    with (
        pytest.raises(BadInput, match="'consistency' draws from a stream"),
        gv.track("none", dir=tmp_path) as run,
    ):
        loop.run(Own(_net, [part]), run)


def test_a_loop_of_ones_own_is_told_what_it_leaves_out() -> None:
    x, y = LABELLED.batch(range(6))
    live = gv.wrap(_net(), Consistency())
    with pytest.raises(GreenvisError, match=r"call live\.feed\(unlabeled=loader\)"):
        live.batch(x, y)
    live.feed(unlabeled=[x])
    with pytest.raises(GreenvisError, match=r"call batch\(x, y\)"):
        live.terms(x, y, live.model(x))
    with pytest.raises(BadInput, match="one class each"):
        live.batch(x, F.one_hot(y, 10).float())
    live.feed(unlabeled=[{"image": x}])
    with pytest.raises(BadInput, match="not dict"):
        live.batch(x, y)
    live.feed(unlabeled=[])
    with pytest.raises(GreenvisError, match="its loader gives no batch"):
        live.batch(x, y)


def test_several_processes_and_trainers_that_count_labels_refuse_it(tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from greenvis.core import distributed
    from greenvis.integrations import transformers

    live = gv.wrap(_net(), Consistency())
    with pytest.raises(BadInput, match="puts images without labels into the batch"):
        transformers.GreenCallback(live, "n", dir=tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(BadInput, match=r"'consistency' draws .* train as one process"):
        gv.wrap(_net(), Consistency())
