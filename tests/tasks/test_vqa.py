"""Questions about scenes: what they ask is what the mask says, and a model that generates is
trained on answers and judged by its own."""

from __future__ import annotations

import pytest
import torch

from greenvis import models
from greenvis.core.example import Example
from greenvis.data.image_set import ImageSet
from greenvis.data.questions import RULES, Things, ask, asked, vocabulary
from greenvis.data.splits import Split
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput
from greenvis.tasks.vqa import Vqa, inputs_of

NAMES = ("background", "hat", "ankle boot", "bag")


def _masks() -> torch.Tensor:
    masks = torch.zeros(3, 10, 10, dtype=torch.uint8)
    masks[0, 2:8, 6:10] = 1  # a hat at the right, a smaller boot at the left
    masks[0, 2:4, 0:2] = 2
    masks[1, 5, 5] = 3
    return masks


def _images() -> ImageSet:
    split = Split(torch.zeros(3, 3, 10, 10, dtype=torch.uint8), _masks().char())
    return ImageSet(split, torch.arange(3), Transform(10, 3, seed=0))


def test_answers_are_what_the_mask_says() -> None:
    pairs = ask(_images(), NAMES, len(RULES), seed=0)
    assert len(pairs) == 15
    assert {len(question.split()) for question, _ in pairs} == {5}
    first = dict(pairs[:5])
    assert first["what is the largest ?"] == "hat"
    assert first["what is most left ?"] == "ankle_boot"
    assert first["how many kinds here ?"] == "two"
    assert first["what can be seen ?"] == "ankle_boot hat"
    assert dict(pairs[5:10])["what can be seen ?"] == "bag"
    assert dict(pairs[10:])["what can be seen ?"] == "nothing"
    for image in range(3):
        there = Things(_masks()[image], ["background", "hat", "ankle_boot", "bag"])
        seen = {there.names[n] for n in there.seen}
        asks = [q for q in pairs[5 * image : 5 * image + 5] if q[0].startswith("is there")]
        for question, answer in asks:
            assert (question.split()[3] in seen) == (answer == "yes")
    assert ask(_images(), NAMES, 5, seed=0) == pairs
    with pytest.raises(BadInput, match="from masks or classes"):
        ask(_images().relabeled(torch.zeros(3, 2)), NAMES, 1, 0)


def test_a_class_answers_one_question_in_words() -> None:
    images = _images().relabeled(torch.tensor([1, -1, 0]))
    pairs = ask(images, ("T-shirt/top", "bag, odd"), 1, 0)
    assert [answer for _, answer in pairs] == ["bag odd", "", "t shirt top"]
    known = vocabulary(pairs)
    _, y = asked(images, pairs, known).batch([0, 1, 2])
    assert (y >= 0).sum(1).tolist() == [3, 0, 4]  # words and the end; none of what is not known
    assert Vqa().known(y).tolist() == [True, False, True]
    with pytest.raises(BadInput, match="set questions: 1"):
        ask(images, ("a", "b"), 2, 0)


def test_a_batch_is_images_and_questions_without_padding() -> None:
    pairs = ask(_images(), NAMES, 5, seed=0)
    known = vocabulary(pairs)
    x, y = asked(_images(), pairs, known).take([3, 7, 8]).batch([0, 2])
    assert x.args[0].shape == (2, 3, 10, 10)
    assert x.args[1].shape == (2, 5)
    assert not (x.args[1] == 0).any()
    spoken = [known.words[n - 2] for n in y[1].tolist() if 2 <= n < known.size - 1]
    assert " ".join(spoken) == pairs[8][1]
    assert [n for n in y[1].tolist() if n >= 0][-1] == known.size - 1


def test_it_learns_from_answers_and_is_judged_by_its_own() -> None:
    model = models.build(
        "plain/llava", img_size=16, vision_dim=32, vision_depth=1, embed_dim=32, depth=2, tokens=16
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=generator)
    x = Example((images, torch.tensor([[3, 4], [5, 6], [3, 6], [5, 4]])))
    y = torch.tensor([[7, 15, -1], [8, 9, 15], [10, 15, -1], [9, 15, -1]])
    task, optimizer = Vqa(), torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(25):
        optimizer.zero_grad()
        task.loss(task.answer(model, x, y), y).backward()
        optimizer.step()
    metric = task.metrics(0)["exact_match"]
    with torch.no_grad():
        shown = task.answer(model, x, y)  # of the answers themselves
        out = task.answer(model.eval(), x, y)
    metric.update(out, y)
    assert float(metric.compute()) == 1
    torch.testing.assert_close(shown[:, 0], out[:, 0], atol=1e-4, rtol=1e-4)
    assert task.serve(model, x) == 4
    given = inputs_of(model, x)
    assert given["input_ids"][0].tolist() == [16] * 4 + [3, 4]
    by_name = Example((), given)
    torch.testing.assert_close(task.answer(model, by_name, y), out)
    with pytest.raises(BadInput, match="give labels"):
        task.answer(model.train(), x)
    with pytest.raises(BadInput, match="plain/llava"):
        task.answer(torch.nn.Linear(2, 2), images, y)


def test_an_answer_is_right_to_the_last_token() -> None:
    metric, eye = Vqa().metrics(0)["exact_match"], torch.eye(5)
    answers = torch.tensor([[1, 4, -1], [1, 2, 4], [1, 2, 4], [-1, -1, -1]])
    said = torch.tensor([[1, 4], [1, 2], [1, 4], [0, 0]])  # one right; ends, and stops, too soon
    metric.update(eye[said], answers)
    assert float(metric.compute()) == pytest.approx(1 / 3)
