"""A classifier made of names, against the texts' embeddings one by one, and classes without
training from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import greenvis as gv
from greenvis import models
from greenvis.data.captions import Vocabulary
from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.meters import record
from greenvis.techniques.data.zero_shot.zero_shot import ZeroShot, text_classifier

WORDS = ("a", "cat", "dog", "picture", "red")
X = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _clip(words: Any = WORDS) -> Any:
    torch.manual_seed(3)
    model = models.build("plain/clip", img_size=32, embed_dim=32, tokens=8, length=6)
    models.describe(model, words=words)
    return model


def test_a_class_is_the_mean_of_its_texts_of_length_one_twice() -> None:
    embeddings = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    got = text_classifier(embeddings)
    for c in range(3):
        mean = sum(e / e.norm() for e in embeddings[c]) / 4
        assert torch.allclose(got[c], mean / mean.norm(), atol=1e-6)
    once = F.normalize(embeddings.mean(1), dim=-1)
    assert not torch.allclose(got, once, atol=1e-2)  # long texts do not count more


def test_logits_are_those_of_the_model_with_the_texts_themselves() -> None:
    plain = _clip().eval()
    vocabulary = Vocabulary(WORDS, 6)
    names, templates = ("cat", "red dog", "unknown"), ("{name}", "a picture of {name}")
    live = gv.wrap(_clip(), ZeroShot(classes=names, templates=templates), task="classification")
    got = live.model.eval()(X)
    assert got.shape == (5, 3)
    rows = []
    for name in names:
        each = []
        for template in templates:
            tokens = vocabulary.encode([template.format(name=name)] * len(X))
            each.append(plain(X, tokens).text_embeds[0])
        rows.append(F.normalize(torch.stack(each).mean(0), dim=0))
    images = plain(X, vocabulary.encode(["cat"] * len(X))).image_embeds
    expected = plain.model.logit_scale.exp() * images @ torch.stack(rows).T
    assert torch.allclose(got, expected, atol=1e-4)
    alone = gv.wrap(_clip(), ZeroShot(classes=("cat", "dog")))
    both = plain(X[:2], vocabulary.encode(["cat", "dog"])).logits_per_image
    assert torch.allclose(alone.model.eval()(X[:2]), both, atol=1e-4)
    undone = alone.undo()
    assert torch.equal(undone.eval()(X[:2], vocabulary.encode(["cat", "dog"])).logits_per_image,
                       both)  # fmt: skip


def test_any_tokenizer_and_any_model_with_both_encoders_will_do() -> None:
    inner = _clip().model
    encode = Vocabulary(WORDS, 6).encode

    class Tokenizer:
        pad_token = "0"

        def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
            assert options == {"padding": True, "truncation": True, "return_tensors": "pt"}
            tokens = encode(texts)
            return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "other": 1}

    own = gv.wrap(_clip(), ZeroShot(classes=("cat", "dog"))).model.eval()(X)
    for tokenize in (encode, Tokenizer()):
        torch.manual_seed(3)
        live = gv.wrap(_clip().model, ZeroShot(classes=("cat", "dog"), tokenize=tokenize))
        assert torch.allclose(live.model.eval()(X), own, atol=1e-5)
    assert inner is not None


def test_its_classifier_trains_like_another(tmp_path: Path) -> None:
    y = torch.tensor([0, 1, 0, 1, 1])
    request = ZeroShot(classes=("cat", "dog"))
    live = gv.wrap(_clip(), request)
    optimizer = torch.optim.SGD(live.param_groups(0.1), lr=0.1)
    before = live.model.zero_shot.weight.detach().clone()
    outputs = live.model.train()(X)
    (F.cross_entropy(outputs, y) + live.loss(X, y, outputs)).backward()
    optimizer.step()
    live.step_end()
    assert not torch.equal(live.model.zero_shot.weight, before)
    live.save(tmp_path)
    again = gv.wrap(_clip(), request)
    again.load(tmp_path)
    assert torch.equal(again.model.zero_shot.weight, live.model.zero_shot.weight)


def test_new_classes_in_a_recipe_take_no_training(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: base\ntask: image_text\n"
        "data: {name: synthetic, train: 60, test: 30, img_size: 16, normalise: false,"
        ' captions: "a {name}"}\n'
        "model: {ref: plain/clip, img_size: 16, embed_dim: 16, depth: 1}\n"
        "train: {epochs: 1, batch_size: 20}\narms: {clip: {}}\n"
    )
    (tmp_path / "new.yaml").write_text(
        "name: new\n"
        "data: {name: synthetic, train: 60, test: 30, img_size: 16, normalise: false}\n"
        'model: {ref: plain/clip, img_size: 16, embed_dim: 16, depth: 1, init: "run:base",'
        " classifier: keep}\n"
        "train: {epochs: 0, batch_size: 20}\n"
        'arms: {names: {techniques: [{zero_shot: {templates: ["a {name}"]}}]}}\n'
    )
    session.run(tmp_path / "base.yaml", runs=tmp_path / "runs")
    folder = session.run(tmp_path / "new.yaml", runs=tmp_path / "runs")
    (run,) = [record.read(file) for file in record.find([folder])]
    assert 0 <= run.facts["accuracy"] <= 1
    assert run.facts["epochs"] == 0


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(BadInput, match="reads no texts"):
        gv.wrap(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), ZeroShot(classes=("a", "b")))
    with pytest.raises(BadInput, match="give `classes`"):
        gv.wrap(_clip(), ZeroShot())
    with pytest.raises(BadInput, match="`tokenize`"):
        gv.wrap(_clip(words=None), ZeroShot(classes=("cat", "dog")))
    for fields in ({"templates": ()}, {"templates": ("a picture",)}):
        with pytest.raises(BadInput):
            ZeroShot(**fields)
    with pytest.raises(BadInput, match="names 2 classes, and the data has 3"):
        gv.wrap(_clip(), ZeroShot(classes=("a", "b")), classes=("x", "y", "z"))
    with pytest.raises(BadInput, match="task: classification"):
        gv.wrap(_clip(), ZeroShot(classes=("cat", "dog")), task="image_text")


def test_a_few_images_of_each_class_give_means_instead() -> None:
    plain, y = _clip().eval(), torch.tensor([0, 1, 0, 1, 1])
    live = gv.wrap(_clip(), [gv.ZeroShot(classes=("cat", "dog")), gv.Ncm(metric="cosine")])
    live.criterion(F.cross_entropy)(live.model(X), y)
    live.step_end()
    features = plain(X, Vocabulary(WORDS, 6).encode(["cat"] * len(X))).image_embeds
    means = torch.stack([F.normalize(features[y == c].mean(0), dim=0) for c in (0, 1)])
    assert torch.allclose(live.model(X), features @ means.T, atol=1e-5)
