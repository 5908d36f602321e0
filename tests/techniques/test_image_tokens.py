"""Fewer tokens of an image in a prompt: which remain, that prompts follow, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import greenvis as gv
from greenvis import models
from greenvis.errors import BadInput
from greenvis.tasks.vqa import Vqa
from greenvis.techniques.inference.kv_cache.kv_cache import KvCache
from greenvis.techniques.inference.tokens.image_tokens import ImageTokens, merged, pooled
from greenvis.testing.task_matrix import task_hosts

IMAGE, COUNT = 32, 16


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "vision_dim": 16, "vision_depth": 1, "embed_dim": 32, "depth": 2}
    return models.build("plain/llava", tokens=32, **sizes).eval()


def _inputs(rows: int = 2, images: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2, 31, (rows, 3), generator=generator)
    image = torch.full((rows, COUNT), IMAGE)
    ids = torch.cat([t for i in range(images) for t in (image, words + i % 2)], 1)
    pixels = torch.rand(rows * images, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}


def _features(plain: Any, pixels: Tensor) -> Tensor:
    return plain.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def _by_hand(plain: Any, features: Tensor, ids: Tensor) -> Tensor:
    """Return the logits of a prompt whose images are these features, after the projector."""
    image = plain.model.multi_modal_projector(features)
    remain = features.shape[1]
    rows = []
    for row in range(len(ids)):
        words = plain.get_input_embeddings()(ids[row][ids[row] != IMAGE])
        rows.append(torch.cat([image[row], words]))
    hidden = plain.model.language_model(inputs_embeds=torch.stack(rows)).last_hidden_state
    assert hidden.shape[1] == remain + 3
    return plain.lm_head(hidden)


def test_two_tokens_become_their_mean_and_all_become_one() -> None:
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(merged(x, 7), x)
    once = merged(x, 6)
    similar = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT
    for row in range(2):  # one at an even place goes to one at an odd place
        a, b = divmod(int(similar[row, ::2, 1::2].argmax()), 3)
        a, b = 2 * a, 2 * b + 1
        rest = {b: (x[row, a] + x[row, b]) / 2}
        want = torch.stack([rest.get(i, x[row, i]) for i in range(7) if i != a])
        torch.testing.assert_close(once[row], want)
    torch.testing.assert_close(merged(x, 1)[:, 0], x.mean(1))


@torch.no_grad()
def test_the_model_answers_as_one_that_is_given_the_tokens_that_remain(plain: Any) -> None:
    given = _inputs()
    features = _features(plain, given["pixel_values"])
    wanted = _by_hand(plain, merged(features, 5), given["input_ids"])
    live = gv.wrap(plain, ImageTokens(keep=5), task="vqa")
    torch.testing.assert_close(plain(**given).logits, wanted, atol=1e-5, rtol=1e-5)
    by_position = plain(given["input_ids"], given["pixel_values"]).logits
    torch.testing.assert_close(by_position, wanted, atol=1e-5, rtol=1e-5)
    live.undo()
    assert plain(**given).logits.shape[1] == COUNT + 3


def test_neighbours_become_their_mean_and_what_is_in_front_stays() -> None:
    x = torch.randn(2, 1 + 16, 5, generator=torch.Generator().manual_seed(2))
    few = pooled(x, 4, (2, 2))
    assert torch.equal(few[:, 0], x[:, 0])
    for field, places in enumerate(([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15])):
        torch.testing.assert_close(few[:, 1 + field], x[:, [1 + p for p in places]].mean(1))
    assert torch.equal(pooled(x, 4, (4, 4)), x)
    rows = pooled(x[:, 1:], 4, (3, 1))  # rows 0–1, 1–2, 2–3
    torch.testing.assert_close(rows[:, 1], x[:, 1 + 4 : 1 + 12].mean(1))


@torch.no_grad()
def test_pooled_is_what_the_model_reads(plain: Any) -> None:
    given = _inputs()
    features = pooled(_features(plain, given["pixel_values"]), 4, (3, 2))
    wanted = _by_hand(plain, features, given["input_ids"])
    live = gv.wrap(plain, ImageTokens(method="pool", keep=6), task="vqa")
    torch.testing.assert_close(plain(**given).logits, wanted, atol=1e-5, rtol=1e-5)
    live.undo()
    with pytest.raises(BadInput, match="rows × columns of fields: give a product, such as 4"):
        gv.wrap(plain, ImageTokens(method="pool", keep=5))


@torch.no_grad()
def test_pruned_are_those_that_the_class_token_attends_to_least(plain: Any) -> None:
    given = _inputs()
    tower = plain.model.vision_tower
    block = next(m for n, m in tower.named_modules() if n.endswith("layers.0"))
    states = tower(given["pixel_values"], output_hidden_states=True).hidden_states[0]
    normed = block.layer_norm1(states)
    q, k = (
        getattr(block.self_attn, f"{part}_proj")(normed).unflatten(-1, (4, -1)).transpose(1, 2)
        for part in "qk"
    )
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    places = attention.argsort(1, descending=True)[:, :5].sort(1).values
    features = _features(plain, given["pixel_values"])
    remain = features.gather(1, places.unsqueeze(-1).expand(-1, -1, features.shape[2]))
    wanted = _by_hand(plain, remain, given["input_ids"])
    live = gv.wrap(plain, ImageTokens(method="prune", keep=5), task="vqa")
    torch.testing.assert_close(plain(**given).logits, wanted, atol=1e-5, rtol=1e-5)
    live.undo()


def test_generate_gives_the_whole_prompt_back_and_goes_with_a_cache(plain: Any) -> None:
    given = _inputs(images=2)
    mask = torch.ones_like(given["input_ids"])
    more = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    full = plain.generate(**given, **more)
    live = gv.wrap(plain, ImageTokens(keep=1.0))
    assert torch.equal(plain.generate(**given, **more), full)
    live.undo()
    live = gv.wrap(plain, ImageTokens(keep=4))
    out = plain.generate(**given, attention_mask=mask, **more)
    dictionary = plain.generate(**given, **more, return_dict_in_generate=True)
    beams = plain.generate(**given, **more, num_beams=2, num_return_sequences=2)
    length = given["input_ids"].shape[1]
    limited = plain.generate(**given, max_length=length + 3, min_new_tokens=3, do_sample=False)
    twin = copy.deepcopy(plain).generate(**given, **more)
    live.undo()
    assert torch.equal(out[:, :length], given["input_ids"])
    assert out.shape == full.shape
    assert torch.equal(dictionary.sequences, out)
    assert torch.equal(limited, out)
    assert torch.equal(twin, out)
    assert torch.equal(beams[:, :length], given["input_ids"].repeat_interleave(2, 0))
    for method in ("static", "window"):
        rows = {} if method == "static" else {"rows": 100}
        live = gv.wrap(plain, [KvCache(method=method, **rows), ImageTokens(keep=4)], task="vqa")
        assert torch.equal(plain.generate(**given, **more), out)
        live.undo()


def test_it_trains_on_shorter_prompts() -> None:
    host = next(h for h in task_hosts() if h.task == "vqa")
    model, (x, y), task = host.build(), host.batch(), Vqa()
    live = gv.wrap(model, ImageTokens(keep=0.25), task=task)
    out = task.answer(model, x, y)
    assert out.shape[:2] == y.shape
    task.loss(out, y).backward()
    gradient = model.model.vision_tower.embeddings.patch_embedding.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    live.undo()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: {**g, "pixel_values": torch.rand(3, 3, 32, 32)}, "as many as the model's"),
        (lambda g: {"pixel_values": g["pixel_values"],
                    "inputs_embeds": torch.zeros(2, 19, 32)}, "no embeddings"),
        (lambda g: {"input_ids": torch.tensor([[IMAGE] * 32, [5] * 32]),
                    "pixel_values": g["pixel_values"]}, "with as many images together"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_go_are_refused(plain: Any, change: Any, says: str) -> None:
    live = gv.wrap(plain, ImageTokens(keep=4))
    with pytest.raises(BadInput, match=says):
        plain(**change(_inputs()))
    live.undo()


def test_models_that_do_not_go_are_refused(plain: Any) -> None:
    with pytest.raises(BadInput, match="16 tokens: give fewer"):
        gv.wrap(plain, ImageTokens(keep=17))
    with pytest.raises(BadInput, match="wants a Llava"):
        gv.wrap(torch.nn.Linear(2, 2), ImageTokens())
    with pytest.raises(BadInput, match="image classifiers"):
        gv.wrap(torch.nn.Linear(2, 2), ImageTokens(), task="classification")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    siglip = models.build(
        "transformers/LlavaForConditionalGeneration",
        image_token_index=31,
        vision_feature_select_strategy="full",
        text_config={"model_type": "llama", "vocab_size": 32, "num_key_value_heads": 2, **small},
        vision_config={"model_type": "siglip_vision_model", "patch_size": 8, "image_size": 32,
                       **small},
    )  # fmt: skip
    with pytest.raises(BadInput, match="set method: merge"):
        gv.wrap(siglip, ImageTokens(method="prune"))
