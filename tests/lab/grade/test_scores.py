"""The course reading is the seed entry's formula, to the last digit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from rouge_score import rouge_scorer

from lab.grade.scores import mark_common, score
from lab.intervals import mean, quantile

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jieba

STORED = json.loads(Path(__file__).with_name("predictions.json").read_text(encoding="utf-8"))
PAIRS = [(row["prediction"], row["reference"]) for row in STORED]


def seed_formula(prediction: str, reference: str) -> float:
    """Said again from the description: cut, join, blanks 0, the scorer as it comes, F1."""
    prediction_tokens = " ".join(jieba.lcut(prediction))
    reference_tokens = " ".join(jieba.lcut(reference))
    if prediction_tokens.strip() == "" or reference_tokens.strip() == "":
        return 0.0
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return float(scorer.score(reference_tokens, prediction_tokens)["rougeL"].fmeasure)


def longest_common(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for one in first:
        before = 0
        for place, other in enumerate(second, start=1):
            before, row[place] = (
                row[place],
                before + 1 if one == other else max(row[place], row[place - 1]),
            )
    return row[-1]


def whitespace_formula(prediction: str, reference: str) -> float:
    ours, theirs = (" ".join(jieba.lcut(text)).split() for text in (prediction, reference))
    common = longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def test_course_reading_equals_the_seed_formula_to_the_last_digit() -> None:
    ours = [score(prediction, reference).rouge_course for prediction, reference in PAIRS]
    theirs = [seed_formula(prediction, reference) for prediction, reference in PAIRS]

    assert ours == theirs
    assert mean(ours) == sum(theirs) / len(theirs)
    assert len(PAIRS) > 30
    assert len(set(theirs)) > 12, "the stored list is too dull to tell formulas apart"


def test_whitespace_reading_counts_every_piece() -> None:
    for prediction, reference in PAIRS:
        expected = whitespace_formula(prediction, reference)
        assert score(prediction, reference).rouge_whitespace == pytest.approx(expected, abs=1e-12)


def test_identical_chinese_scores_nothing_in_the_course_reading() -> None:
    text = "线程束里的线程一起执行同一条指令。"

    assert score(text, text).rouge_course == 0.0
    assert score(text, text).rouge_whitespace == 1.0
    assert score(text, text).is_exact


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_blank_answers_score_nothing_in_both(blank: str) -> None:
    for pair in ((blank, "CUDA"), ("CUDA", blank)):
        assert score(*pair).rouge_course == 0.0
        assert score(*pair).rouge_whitespace == 0.0


def test_marks_show_what_is_common_and_keep_the_texts() -> None:
    texts = ("warp 有 32 个线程", "一个 warp 有 64 个线程")

    ours, theirs = mark_common(*texts), mark_common(*reversed(texts))

    assert "".join(piece for piece, _ in ours) == "warp 有 32 个线程"
    assert "".join(piece for piece, _ in theirs) == "一个 warp 有 64 个线程"
    assert [p for p, common in ours if common] == [p for p, common in theirs if common]
    assert ("32", False) in ours


def test_quantile_lies_between_neighbours() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.25) == 1.25
    assert quantile([], 0.5) == 0.0
