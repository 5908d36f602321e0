"""What is counted, and how intervals and choices were made, in sentences."""

from __future__ import annotations

import statistics

from greenvis.report import comparison, formatting, measures, stats, verdict
from greenvis.report.shape import Results

PAIRED = 0.5  # correlation above which a difference by pairs scatters less than one of means


def counted(results: Results) -> list[str]:
    """Say what is in the joules, and what intervals and marks rest on."""
    n = sorted({len(row.seeds) for row in results.arms.values() if row.seeds})
    seeds = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}" if n else "no"
    return [
        "Training energy is all energy of a run but its measurement (latency, FLOPs): set-up, "
        "training, evaluation, a "
        "teacher's forward passes, and every start that broke off before the one that finished. "
        "The mean over finished seeds.",
        "A teacher or a base that another run trained is charged whole in “base and teacher "
        "included”, which comparisons "
        "rest on first; own training is the run's own share. What others trained, at a cost nobody "
        "knows, is in neither.",
        f"Finished seeds per arm: {seeds}. A ratio to the baseline is one of geometric means.",
        "Bands (low–high) come from the coefficients of the sources below. All arms measured on "
        "one host share them, so they "
        "widen the joules, not the ratios. ± is the standard deviation over seeds.",
        _repeatability(results),
        *_repeated(results),
        *_intervals(results),
        *_chosen(results),
        f"Pricing model: {results.pricing_model}. SCI follows ISO/IEC 21031 with R = one "
        f"{results.unit}; no certification is claimed.",
    ]


def _chosen(results: Results) -> list[str]:
    """Say on which images choices were made: held out ones, or, for all that is known, the
    test's."""
    name = measures.written(results.measure)
    reached = any(row.energy_to_baseline_j for row in results.arms.values())
    read = (
        [f"Where an arm reached the baseline's {name} is read off test images, epoch by epoch."]
        if reached
        else []
    )
    held = sorted(
        {d["held_out"] for d in results.data if isinstance(d, dict) and d.get("held_out")}
    )
    if held:
        many = " or ".join(f"{n:,}" for n in held)
        return [
            f"{many} training images were held out; thresholds and a target {name} are chosen on "
            "them. On which images "
            "learning rates and epochs were chosen is not on record: where it was on the test, "
            f"{_figures(results)} are too good.",
            *read,
        ]
    return [
        "No validation images were held out: learning rates, epochs and whatever else was chosen "
        "was chosen on test images "
        f"or not at all, so that {_figures(results)} may be too good.",
        *read,
    ]


def _figures(results: Results) -> str:
    name = measures.written(results.measure)
    return "accuracies" if name == measures.DEFAULT else f"figures of {name}"


def _intervals(results: Results) -> list[str]:
    """Say what the intervals are, and that sentences, marks and tables rest on them alone."""
    if not results.comparisons:
        return [
            "No arm is compared with a baseline by two seeds or more: nothing is said to be better "
            "or cheaper."
        ]
    m, lost, measure = results.comparisons, verdict.margin(results), results.measure
    keeps, loses = f"above −{lost}", "below"
    if not measure.higher_is_better:
        keeps, loses = f"below +{lost}", "above"
    if not lost:
        keeps = f"at 0 or {'above' if measure.higher_is_better else 'below'}"
    return [
        f"Intervals of differences and ratios to the baseline hold for all {m} arm(s) together "
        "with 95 % (Dunnett's, the variance pooled over the arms; of one arm it is Student's t). "
        "Marks, “shown”, “keeps”, “loses” and bold are read off them and nothing else: a "
        "difference is shown where “no change” lies outside its interval. Seeds draw the training "
        "images as well as the first weights, so that both are in the scatter.",
        _pairing(results),
        f"An arm keeps the {measures.written(measure)} where its whole interval lies {keeps}, "
        "loses it where the whole interval "
        f"lies {loses}, and is not yet decided else; the seeds said to be wanting suppose that "
        "mean and scatter stay. One seed "
        "decides nothing.",
        *_tested(results),
    ]


def _pairing(results: Results) -> str:
    """Say that seeds are not paired, and whether pairing them would have been narrower here."""
    base = results.arms[str(results.baseline)].gain.by_seed
    known = []
    for label, row in results.arms.items():
        pairs = [(v, base[s]) for s, v in row.gain.by_seed.items() if s in base]
        r = stats.correlation(pairs) if label != results.baseline else None
        known += [] if r is None else [r]
    text = "Arms are not paired by seed, which costs half the degrees of freedom"
    if not known:
        return f"{text}."
    r = statistics.median(known)
    text += (
        f"; the {measures.written(results.measure)} of an arm and of the baseline, seed by seed, "
        f"correlate with {formatting.fixed(r, 2)} here (median over {len(known)} arm(s))"
    )
    return text + (
        ": pairing may be narrower in this report." if r > PAIRED else ": pairing would win little."
    )


def _tested(results: Results) -> list[str]:
    """Say what the size of the test limits."""
    n, measure = comparison.images_tested(results), results.measure
    if n is None or not measures.is_share(measure):
        return []
    return [
        f"The smallest test has {comparison.tested(results)}, of which one is worth "
        f"{formatting.points(measure, 1 / n).lstrip('+')}: no interval of a difference is narrower "
        "than that to each side."
    ]


def _repeatability(results: Results) -> str:
    """Say how far the same work reads apart at another time, and whether bands hold that."""
    bands = [
        s["repeatability"]
        for s in results.sources
        if s.get("provenance") == "estimated" and s.get("repeatability")
    ]
    texts = {
        f"×{k['low']:.3g}–{k['high']:.3g}, {k.get('citation') or 'of unknown origin'}"
        for k in bands
    }
    if texts:
        return (
            "Bands hold how far the same work reads apart from one time to another: "
            f"{'; '.join(sorted(texts))}."
        )
    return (
        "How far the same work reads apart from one time to another is in no band here: on a "
        "shared machine of two CPUs, up to "
        "×1.78 between two days."
    )


def _repeated(results: Results) -> list[str]:
    """Say how well the energy of one image was told, where the records know."""
    worst = max((row.inference_energy_j.spread for row in results.arms.values()), default=0.0)
    return [
        f"The energy of one {results.unit} is the median of repeated readings; their quartile "
        "range ÷ √readings is "
        f"{100 * worst:.1f} % of it or less in each run. Its intervals are those of the readings, "
        "or of the seeds where these scatter wider: a neighbour's load may last through all "
        "readings of a run."
    ] if worst else []  # fmt: skip
