"""Early exits: thresholds as published, answers in order for every mix of exits, and a calibration
that keeps its bound."""

from __future__ import annotations

import copy
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOSTS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import greenvis as gv
from greenvis.bench import exits as bench
from greenvis.core.technique import logits_of
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput, GreenvisError
from greenvis.meters import flops, record
from greenvis.techniques.inference.exits import _confidence
from greenvis.techniques.inference.exits._calibration import choose
from greenvis.techniques.inference.exits.early_exit import InstalledEarlyExit, calibrate, export

FIXTURE = Path(__file__).parents[1] / "fixtures" / "early_exit_thresholds.pt"
MIXES = ["none", "all at first", "all at second", "mixed", "one stays"]


def wrapped(host: str = "timm-vit", **fields: object) -> tuple[Wrapped, InstalledEarlyExit, Tensor]:
    """Return a host with two exits whose heads disagree between samples, in eval, and six
    images."""
    live = gv.wrap(HOSTS[host].build(), gv.EarlyExit(**{"at": (1, 2), **fields}))
    installed = live.installed[0]
    assert isinstance(installed, InstalledEarlyExit)
    generator = torch.Generator().manual_seed(3)
    for head in installed.exits.heads:
        with torch.no_grad():
            head.linear.weight.copy_(torch.randn(head.linear.weight.shape, generator=generator))
    live.model.eval()
    return live, installed, torch.rand(6, *HOSTS[host].input_shape, generator=generator)


def thresholds_for(mix: str, sure: Tensor) -> list[float]:
    """Return thresholds by which samples leave as the mix says. sure: (exits, samples)."""
    first = sure[0].sort().values
    half = float(first[2:4].mean())
    rest = sure[1][sure[0] < half].sort().values
    return {
        "none": [2.0, 2.0],
        "all at first": [0.0, 2.0],
        "all at second": [2.0, 0.0],
        "mixed": [half, float(rest[-2:].mean())],  # three, one, two
        "one stays": [float(first[:2].mean()), 2.0],
    }[mix]


# -- the mathematics ------------------------------------------------------------------------------


def test_budget_thresholds_are_those_of_msdnet() -> None:
    known = torch.load(FIXTURE, weights_only=True)
    for row in known["rows"]:
        shares = _confidence.geometric_shares(math.log(row["p"]), 4)
        torch.testing.assert_close(shares.float(), row["exit_probs"])
        thresholds = _confidence.budget_thresholds(known["val_probs"].amax(-1), shares)
        torch.testing.assert_close(thresholds, row["thresholds"])
        for part in ("val", "test"):
            at = _confidence.leaves_at(known[f"{part}_probs"].amax(-1), thresholds)
            assert torch.equal(torch.bincount(at, minlength=4).float(), row[f"{part}_exit_counts"])
            answers = known[f"{part}_probs"].argmax(-1).gather(0, at[None])[0]
            assert (answers == known[f"{part}_targets"]).float().mean().item() == pytest.approx(
                row[f"{part}_acc"]
            )
            assert known["flops"][at].mean().item() == pytest.approx(row[f"{part}_flops"])


def test_certainty_is_the_definition() -> None:
    logits = torch.randn(7, 5, dtype=torch.bfloat16)
    p = logits.float().softmax(-1)
    torch.testing.assert_close(_confidence.certainty(logits, "max_prob"), p.max(-1).values)
    entropy = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(
        _confidence.certainty(logits, "entropy"), 1 - entropy / torch.log(torch.tensor(5.0))
    )
    assert _confidence.certainty(torch.zeros(1, 5), "entropy").abs() < 1e-6


def test_patience_counts_answers_that_stay() -> None:
    answers = torch.tensor([[1, 1, 0], [1, 2, 0], [1, 2, 0], [0, 2, 0]])
    logits = nn.functional.one_hot(answers, 3).float()
    assert _confidence.confidences(logits, "patience").tolist() == [
        [0, 0, 0],
        [1, 0, 1],
        [2, 1, 2],
        [0, 2, 3],
    ]


def test_as_sure_as_the_threshold_is_sure_enough() -> None:
    """MSDNet's and BranchyNet's rule: ≥. Patience leaves at its number of answers, not after it."""
    sure = torch.tensor([[0.5, 0.5, 0.25], [0.75, 0.25, 0.75], [0.0, 0.0, 0.0]])
    assert _confidence.leaves_at(sure, [0.5, 0.75, _confidence.ALWAYS]).tolist() == [0, 0, 1]
    assert _confidence.leaves_at(
        torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]]), [1.0, 1.0, 1.0]
    ).tolist() == [1, 2]


@pytest.mark.parametrize("criterion", ["max_prob", "entropy"])
def test_a_model_s_sample_as_sure_as_the_threshold_leaves(criterion: str) -> None:
    live, installed, x = wrapped(criterion=criterion)
    logits, _ = installed.logits([(x, torch.zeros(6))])
    for row in range(6):
        sure = _confidence.certainty(logits[0], criterion)
        with installed.at([float(sure[row]), _confidence.NEVER]) as facts, torch.no_grad():
            live.model(x)
        assert facts["exits"][0] == int((sure >= sure[row]).sum())


def test_a_model_s_sample_of_so_much_patience_leaves() -> None:
    """Three exits that always agree: with patience 1 all leave at the second, which has agreed
    once, with 2 at the third."""
    live, installed, x = wrapped(at=(1, 2, 3), criterion="patience")
    for head in installed.exits.heads:
        nn.init.zeros_(head.linear.weight)
        nn.init.eye_(head.linear.bias[None])
    for patience, exits in ((1, [0, 6, 0, 0]), (2, [0, 0, 6, 0])):
        with installed.at(patience) as facts, torch.no_grad():
            live.model(x)
        assert facts["exits"] == exits


@given(
    st.integers(2, 5),
    st.integers(1, 60),
    st.floats(0.05, 4),
    st.integers(0, 9),
    st.sampled_from([2, 1000]),
)
@settings(max_examples=40)
def test_the_shares_asked_for_leave(
    exits: int, samples: int, p: float, seed: int, values: int
) -> None:
    sure = (
        torch.randint(
            values, (exits, samples), generator=torch.Generator().manual_seed(seed)
        ).float()
        / values
    )
    shares = _confidence.geometric_shares(math.log(p), exits)
    at = _confidence.leaves_at(sure, _confidence.budget_thresholds(sure, shares))
    left = torch.bincount(at, minlength=exits)
    assert int(left.sum()) == samples
    if values == 1000 and all(len(set(row.tolist())) == samples for row in sure):  # no ties
        assert left[:-1].tolist() == [int(samples * float(s)) for s in shares[:-1]]
    costs = torch.arange(1.0, exits + 1)
    for budget in (1.2, 1.7, exits - 0.1):
        assert float((_confidence.shares_for_budget(costs, budget) * costs).sum()) == pytest.approx(
            budget, abs=1e-6
        )


def test_the_bound_on_the_drop_holds_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    lost, gained, samples = 0.03, 0.01, 400
    draws = torch.rand(1000, samples, generator=generator)
    bounds = [
        _confidence.drop_bound(int((d < lost).sum()), int((d > 1 - gained).sum()), samples, 0.9)
        for d in draws
    ]
    assert sum(b < lost - gained for b in bounds) <= 100
    assert _confidence.drop_bound(0, 0, 1000, 0.95) == pytest.approx(1 - 0.025 ** (1 / 1000))
    assert _confidence.drop_bound(5, 0, 5, 0.95) == 1.0


# -- samples that leave ---------------------------------------------------------------------------


@pytest.mark.one_in(4)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("host", ["timm-vit", "torchvision-resnet", "timm-swin"])
def test_answers_and_gradients_are_those_of_each_samples_own_exit(host: str, mix: str) -> None:
    live, installed, x = wrapped(host)
    with installed.exits.record() as seen:
        live.model(x)
        logits = torch.stack([s.clone() for s in seen])
    sure = _confidence.certainty(logits, "max_prob").detach()
    installed.thresholds = thresholds_for(mix, sure)
    at = _confidence.leaves_at(sure, (*installed.thresholds, _confidence.ALWAYS))
    want = logits.gather(0, at[None, :, None].expand(1, -1, logits.shape[-1]))[0]
    got = live.model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    scale = torch.linspace(-1, 1, got.numel()).view_as(got)
    named = {n: p for n, p in live.model.named_parameters() if p.requires_grad}
    grads = [
        torch.autograd.grad((out * scale).sum(), list(named.values()), allow_unused=True)
        for out in (got, want)
    ]
    for name, a, b in zip(named, *grads, strict=True):
        a, b = (torch.zeros_like(named[name]) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@given(
    st.lists(st.floats(0.15, 1.0), min_size=2, max_size=2),
    st.permutations(range(6)),
    st.integers(0, 6),
)
@settings(max_examples=25)
def test_order_and_company_do_not_matter(limits: list[float], order: list[int], size: int) -> None:
    live, installed, x = _SHARED
    installed.thresholds = limits
    with torch.inference_mode():
        alone = torch.cat([live.model(one[None]) for one in x])
        among = live.model(x[order[:size]])
    torch.testing.assert_close(among, alone[order[:size]], atol=1e-5, rtol=1e-5)


_SHARED = wrapped()


@pytest.mark.parametrize(
    "other", [gv.TokenMerge(r=2), gv.TokenPrune(blocks=(1,), method="class_attention")]
)
def test_samples_leave_a_model_that_merges_or_prunes_tokens(other: gv.Technique) -> None:
    live = gv.wrap(HOSTS["timm-vit"].build(), [other, gv.EarlyExit(at=(1, 2))])
    live.model.eval()
    installed = live.installed[1]
    assert isinstance(installed, InstalledEarlyExit)
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits, _ = installed.logits([(x, torch.zeros(6))])
    sure = _confidence.confidences(logits, "max_prob")
    installed.thresholds = thresholds_for("mixed", sure)
    at = _confidence.leaves_at(sure, (*installed.thresholds, _confidence.ALWAYS))
    assert len(at.unique()) == 3
    with torch.no_grad():
        torch.testing.assert_close(live.model(x), logits[at, torch.arange(6)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mix", ["all at first", "mixed"])
def test_the_rest_of_the_model_sees_only_those_who_stay(mix: str) -> None:
    live, installed, x = wrapped()
    sizes: list[int] = []
    live.model.blocks[-1].register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    with torch.no_grad():
        sure = _confidence.confidences(installed.logits([(x, torch.zeros(6))])[0], "max_prob")
        sizes.clear()
        with installed.at(thresholds_for(mix, sure)) as facts:
            live.model(x)
    assert sum(facts["exits"]) == 6
    assert sizes == ([] if mix == "all at first" else [facts["exits"][-1]])
    assert sizes != [6]


def test_patience_leaves_where_the_loop_says() -> None:
    live, installed, x = wrapped(at=(1, 2, 3), criterion="patience", threshold=1)
    logits, _ = installed.logits([(x, torch.zeros(6))])
    want = []
    for answers in logits.unbind(1):
        before, count = None, 0
        for row in answers[:-1]:
            count = count + 1 if before == int(row.argmax()) else 0
            before = int(row.argmax())
            if count == 1:
                break
        else:
            row = answers[-1]
        want.append(row)
    with torch.no_grad():
        torch.testing.assert_close(live.model(x), torch.stack(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["transformers-vit", "transformers-clip"])
@pytest.mark.parametrize("mix", ["all at first", "mixed", "none"])
def test_the_outputs_type_stays(host: str, mix: str) -> None:
    live, installed, x = wrapped(host)
    kind = type(live.model(x))
    sure = _confidence.confidences(installed.logits([(x, torch.zeros(6))])[0], "max_prob")
    installed.thresholds = thresholds_for(mix, sure)
    out = live.model(x)
    assert type(out) is kind
    assert logits_of(out).shape == (6, 5)
    if host == "transformers-vit":
        pairs = live.model(x, return_dict=False)
        assert isinstance(pairs, tuple)
        torch.testing.assert_close(pairs[0], logits_of(out))
        if mix != "none":
            with pytest.raises(GreenvisError, match="'labels'"):
                live.model(x, labels=torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("mix", ["all at first", "mixed", "none"])
def test_half_precision_stays(mix: str) -> None:
    live, installed, x = wrapped()
    installed.thresholds = thresholds_for(
        mix, _confidence.confidences(installed.logits([(x, torch.zeros(6))])[0], "max_prob")
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert live.model(x).dtype == torch.bfloat16
    live.model.to(torch.bfloat16)
    assert live.model(x.bfloat16()).dtype == torch.bfloat16


def test_never_is_the_model_itself_and_costs_nothing() -> None:
    host = HOSTS["timm-dinov2-registers"]
    model, x = host.build().eval(), host.batch()[0]
    before, macs = model(x), flops.count(model, x[:1], cross_check=False).macs
    live = gv.wrap(model, gv.EarlyExit())
    assert torch.equal(model.eval()(x), before)
    assert flops.count(model, x[:1], cross_check=False).macs == macs
    assert (
        list(inspect.signature(model.forward).parameters)
        == list(inspect.signature(type(model).forward).parameters)[1:]
    )
    live.undo()
    assert "forward" not in vars(model)


def test_a_copy_leaves_by_itself() -> None:
    live, installed, x = wrapped(threshold=0.0)
    twin = copy.deepcopy(live.model)
    with torch.no_grad():
        twin.blocks[0].exit.linear.bias.add_(5.0)
        torch.testing.assert_close(twin(x) - 5.0, live.model(x))
    assert sum(installed.exits.tally) == 6


# -- FLOPs ----------------------------------------------------------------------------------------


def test_flops_of_real_exits_are_counted_exactly() -> None:
    live, installed, x = wrapped()
    sure = _confidence.confidences(installed.logits([(x, torch.zeros(6))])[0], "max_prob")
    installed.thresholds = thresholds_for("mixed", sure)
    at = _confidence.leaves_at(sure, (*installed.thresholds, _confidence.ALWAYS))
    assert len(at.unique()) > 1
    found = flops.distribution(live.model, [x])
    assert found["mean"] == pytest.approx(float(torch.tensor(installed.costs)[at].mean()))
    assert (found["min"], found["max"]) == (
        installed.costs[int(at.min())],
        installed.costs[int(at.max())],
    )


# -- training -------------------------------------------------------------------------------------


def test_the_term_is_the_sum_over_exits_and_the_base_may_stay() -> None:
    x, y = HOSTS["timm-vit"].batch()
    for base, distill in (("train", 0.0), ("freeze", 0.5)):
        live = gv.wrap(
            HOSTS["timm-vit"].build(),
            gv.EarlyExit(at=(1, 2), base=base, weights=(0.5, 2.0), distill=distill),
        )
        installed = live.installed[0]
        logits = live.model(x)
        seen = [s.detach() for s in installed.exits.last_logits]
        term = live.terms(x, y, logits)["early_exit"]
        want = torch.zeros(())
        for weight, early in zip((0.5, 2.0), seen, strict=True):
            teach = (
                nn.functional.kl_div(
                    (early / 3).log_softmax(-1), (logits / 3).softmax(-1), reduction="batchmean"
                )
                * 9
            )
            want = want + weight * (nn.functional.cross_entropy(early, y) + distill * teach)
        torch.testing.assert_close(term, want)
        term.backward()
        learned = {n for n, p in live.model.named_parameters() if p.grad is not None}
        heads = set(installed.trainable)
        assert heads <= learned
        assert (learned == heads) == (base == "freeze")
        with pytest.raises(GreenvisError, match="training mode"):
            live.terms(x, y, logits)


def test_training_with_checkpointing_gives_the_same_gradients() -> None:
    x, y = HOSTS["timm-vit"].batch()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        live = gv.wrap(HOSTS["timm-vit"].build(), gv.EarlyExit(at=(1,)))
        live.model.set_grad_checkpointing(checkpointing)
        live.loss(x, y, live.model(x)).backward()
        grads.append({n: p.grad for n, p in live.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(g, grads[1][n], atol=1e-6) for n, g in grads[0].items())


# -- calibration ----------------------------------------------------------------------------------


def answers(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (3, samples, 4) of exits that are the surer the righter they are, and
    labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (samples,), generator=generator)
    right = nn.functional.one_hot(y, 4).float()
    noise = torch.randn(3, samples, 4, generator=generator)
    return 4 * right + noise * torch.tensor([3.0, 2.0, 1.5])[:, None, None], y


@pytest.mark.parametrize("criterion", ["max_prob", "entropy", "patience"])
def test_a_calibrated_drop_is_kept_on_new_samples(criterion: str) -> None:
    logits, y = answers(8000)
    found = choose(logits, y, [1.0, 2.0, 3.0], criterion, target_drop=0.02)
    assert found.met
    assert found.drop <= found.drop_upper <= 0.02
    assert found.cost < 0.95
    fresh, labels = answers(20_000, seed=1)
    at = _confidence.leaves_at(
        _confidence.confidences(fresh, criterion), (*found.thresholds, _confidence.ALWAYS)
    )
    early = fresh.argmax(-1).gather(0, at[None])[0]
    assert (
        float((fresh[-1].argmax(-1) == labels).float().mean() - (early == labels).float().mean())
        <= 0.02
    )


def test_samples_that_choose_thresholds_do_not_judge_them() -> None:
    """Half of them, and no sample both: the bound is for samples that had no part in the choice.

    Asked from outside: a label that matters belongs to a judge, and what a judge's exits say
    changes no threshold.
    """
    logits, y = answers(60)
    asked: dict[str, Any] = {"costs": [1.0, 2.0, 3.0], "criterion": "max_prob", "budget": 0.7}
    base = choose(logits, y, **asked)
    judges, proposers = [], []
    for row in range(60):
        wrong = y.clone()
        wrong[row] = (
            (logits[-1, row].argmax() + 1) % 4
            if logits[-1, row].argmax() == y[row]
            else logits[-1, row].argmax()
        )
        judges += (
            [row] if choose(logits, wrong, **asked).whole_accuracy != base.whole_accuracy else []
        )
        turned = logits.clone()
        turned[:2, row] = 100 * nn.functional.one_hot(torch.tensor(0), 4)  # surer than any
        proposers += [row] if choose(turned, y, **asked).thresholds != base.thresholds else []
    assert len(judges) == base.samples == 30
    assert proposers
    assert not set(judges) & set(proposers)
    assert base.accuracy * 30 == pytest.approx(round(base.accuracy * 30))


def test_few_samples_promise_nothing_and_nobody_leaves() -> None:
    logits, y = answers(60)
    found = choose(logits, y, [1.0, 2.0, 3.0], "max_prob", target_drop=0.005)
    assert found.exits == (0.0, 0.0, 1.0)
    assert (found.cost, found.drop, found.drop_upper) == (1.0, 0.0, 0.0)
    assert found.as_dict()["thresholds"] == [None, None]


@pytest.mark.parametrize("criterion", ["max_prob", "entropy"])
def test_a_budget_is_spent(criterion: str) -> None:
    logits, y = answers(4000)
    found = choose(logits, y, [1.0, 2.0, 3.0], criterion, budget=0.6)
    assert found.met
    assert found.cost == pytest.approx(0.6, abs=0.03)
    with pytest.raises(BadInput, match=r"0\.333"):
        choose(logits, y, [1.0, 2.0, 3.0], criterion, budget=0.2)


def test_thresholds_travel_with_the_delta(tmp_path: Path) -> None:
    live, installed, x = wrapped(budget=0.6)
    images = torch.rand(80, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    facts = installed.calibrate([(images, torch.arange(80) % 5)])
    assert installed.thresholds == [t if t is not None else 1e8 for t in facts["thresholds"]]
    live.save(tmp_path)
    again = gv.wrap(HOSTS["timm-vit"].build(), gv.EarlyExit(at=(1, 2), budget=0.6))
    again.load(tmp_path)
    assert torch.equal(again.model.eval()(x), live.model(x))
    assert any(0 < n < 6 for n in installed.exits.tally)


# -- recipes, reports and the bench ---------------------------------------------------------------

RECIPE = """\
name: tiny
data: {name: digits, train: 200, test: 100, held_out: 160}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 3, num_heads: 2}
train: {epochs: 1, batch_size: 20, lr: 1.0e-3, threads: 1}
arms:
  whole: {}
  frozen:
    model: {init: "run:whole", classifier: keep}
    techniques: [{early_exit: {at: [1, 2], base: freeze, budget: 0.7}}]
meter: {codecarbon: false}
"""


def test_a_recipe_calibrates_on_held_out_images_and_reports_every_setting(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    with pytest.raises(BadInput, match=r"'early_exit' calibrates.*data.held_out"):
        gv.run(tmp_path / "tiny.yaml", overrides=["data.held_out=null"], runs=tmp_path / "runs")
    gv.run(tmp_path / "tiny.yaml", runs=tmp_path / "runs")
    found = {r.header["arm"]: r.facts for r in map(record.read, record.find([tmp_path / "runs"]))}
    calibration = found["frozen"]["calibration"]["early_exit"]
    assert calibration["samples"] == 80
    assert calibration["cost"] == pytest.approx(0.7, abs=0.1)
    points = {p["setting"]: p for p in found["frozen"]["operating_points"]}
    assert (
        points["never"]["accuracy"] == found["whole"]["accuracy"]
    )  # the base and its classifier, as they were
    assert points["calibrated"]["accuracy"] == found["frozen"]["accuracy"]
    assert points["calibrated"]["macs"] < points["never"]["macs"]
    assert sum(points["calibrated"]["exits"]) == 100
    spread = found["frozen"]["macs_distribution"]
    assert spread["min"] < spread["mean"] == found["frozen"]["macs"] < spread["max"]
    gv.report([tmp_path / "runs"], out=tmp_path / "out")
    row = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["frozen"][
        "operating_points"
    ]
    assert {r["setting"]: r["macs_ratio"] for r in row}["calibrated"] < 0.9
    assert "## Settings of one model" in (tmp_path / "out" / "report.md").read_text()
    assert "Settings of one model" in (tmp_path / "out" / "index.html").read_text()


def test_the_bench_measures_what_left(tmp_path: Path) -> None:
    found = bench.run(
        tmp_path, model="timm/test_vit", batches=(1, 4), leaving=(0.5, 1.0), images=4, rounds=1
    )
    rows = {(r["batch"], r["setting"]): r for r in found["rows"]}
    assert len(rows) == 8
    for batch in (1, 4):
        assert rows[batch, "never"]["exits"] == "0 0 0 4"
        assert rows[batch, "100% leave"]["exits"] == "4 0 0 0"
        assert rows[batch, "50% leave"]["exits"] == "2 1 0 1"
        assert rows[batch, "100% leave"]["macs_ratio"] < rows[batch, "50% leave"]["macs_ratio"] < 1
    assert (tmp_path / "figures" / "exits.svg").exists()
    assert "realised" in (tmp_path / "report.md").read_text()


# -- plain models up to an exit -------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("host", ["timm-vit", "torchvision-vit", "timm-convnext"])
def test_an_exported_exit_is_static_and_smaller(host: str) -> None:
    live, installed, x = wrapped(host)
    want = installed.logits([(x, torch.zeros(6))])[0]
    for k in (1, 2):
        plain = export(live, exit=k)
        torch.testing.assert_close(plain(x), want[k - 1], atol=1e-5, rtol=1e-5)
        program = torch.export.export(plain, (x,))
        torch.testing.assert_close(program.module()(x), want[k - 1], atol=1e-5, rtol=1e-5)
    sizes = [
        sum(p.numel() for p in m.parameters())
        for m in (export(live, 1), export(live, 2), live.model)
    ]
    assert sizes == sorted(set(sizes))
    assert flops.count(export(live, 2), x[:1], cross_check=False).macs <= installed.costs[1]
    with pytest.raises(BadInput, match="there are 2"):
        export(live, exit=3)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["timm-vit", "timm-convnext", "transformers-vit"])
def test_an_exported_exit_compiles_to_one_graph_and_runs_in_onnxruntime(
    host: str, tmp_path: Path
) -> None:
    import onnxruntime

    live, installed, x = wrapped(host)
    want = installed.logits([(x, torch.zeros(6))])[0][0]
    plain = export(live, exit=1)
    compiled: Any = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want, atol=1e-5, rtol=1e-5)
        torch.onnx.export(plain, (x,), dynamo=True, verbose=False).save(tmp_path / "exit.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "exit.onnx")
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# -- bad inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"at": (9,)}, "1 to 3"),
        ({"at": (1.5,)}, "between 0 and 1"),
        ({"at": ("block.1",)}, "nearest|did you mean|blocks"),
        ({"at": (1, 2), "weights": (1.0,)}, "weights has 1"),
        ({"at": (1, 2), "threshold": (0.5, 0.5, 0.5)}, "threshold has 3"),
        ({"target_drop": 0.01, "budget": 0.5}, "not both"),
        ({"at": ("blocks.0.attn.qkv",)}, "blocks.0.attn.qkv"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], says: str) -> None:
    model = HOSTS["timm-vit"].build()
    keys = list(model.state_dict())
    with pytest.raises(BadInput, match=says):
        gv.wrap(model, gv.EarlyExit(**fields))
    assert list(model.state_dict()) == keys
    assert "forward" not in vars(model)


def test_a_model_that_joins_its_batch_is_refused() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)) for _ in range(3)
            )
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                x = x - x.mean(0, keepdim=True)
            return self.head(x.mean((2, 3)))

    with pytest.raises(BadInput, match="joins the samples"):
        gv.wrap(Joined(), gv.EarlyExit(at=(1,), input_shape=(3, 8, 8)))


def test_calibrate_wants_exits_and_samples() -> None:
    live = gv.wrap(HOSTS["timm-vit"].build(), [])
    with pytest.raises(BadInput, match="no early exits"):
        calibrate(live, [], budget=0.5)
    live, _, x = wrapped()
    with pytest.raises(BadInput, match="no samples"):
        calibrate(live, [], budget=0.5)
    with pytest.raises(BadInput, match="6 held-out samples"):
        calibrate(live, [(x, torch.zeros(6, dtype=torch.int64))], budget=0.5)
    with pytest.raises(BadInput, match="either"):
        calibrate(live, [(x, torch.zeros(6, dtype=torch.int64))])
