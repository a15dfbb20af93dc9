"""Parts of a card on how well it answers: scores, confusion, calibration, abstention, segments, rows from before the cut-off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finlora.card.curves import Slice, make_abstention_curve, slice_by_cutoff, slice_by_length, trace_abstention
from finlora.card.evidence import Evidence, Scored
from finlora.card.part import Block, Part, Picture, make_part
from finlora.card.profile import PartName
from finlora.card.verdict import Gain, compare_with_base, compare_with_majority, seed_of
from finlora.evaluate.answer_table import AnswerTable
from finlora.evaluate.parity_report import PARITY_FILE, parity_table
from finlora.report.scores import find_majority
from finlora.report.tables import TextTable, format_score, format_share
from finlora.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOT_SCORED = (
    "no evaluation of exactly these weights was found: run `finlora evaluate`, or name its results with --results"
)
_NO_LABELS = "{}: answers were generated, so no label has a probability (eval.method=labels scores labels)"
_FREE_TEXT = "{}: answers are free text, which has no labels to count and no probability to compare."
_MAX_CELLS = 400
_PER_CENT = "% with 95 % interval."


def describe_scores(evidence: Evidence) -> Part:
    """Scores with intervals, beside the base and always the most frequent label."""
    rows: list[tuple[str, ...]] = []
    gains: list[tuple[str, ...]] = []
    gaps = []
    for scored in evidence.scored:
        result, majority = scored.result, find_majority(scored.result)
        compared = [compare(scored, seed_of(result)) for compare in (compare_with_base, compare_with_majority)]
        gains += [(scored.name, *_gain_cells(gain)) for gain in compared if gain is not None]
        if majority is not None:
            gain = compared[1]
            always = format_share(gain.accuracy, gain.low, gain.high) if gain else f"{100 * majority.accuracy:.1f}"
            rows.append(
                (scored.name, f"always {majority.label}", always, f"{100 * majority.weighted_f1:.1f}", "", "", "")
            )
        if scored.base is None:
            gaps.append(
                f"{scored.name}: the base's scores on the same questions: `finlora evaluate --base` with the same settings"
            )
        else:
            rows.append(_score_row(scored.name, "base", scored.base))
        rows.append(_score_row(scored.name, "adapter", result))
        if scored.is_of_search:
            gaps.append(
                f"{scored.name}: scores on the test split: a search held these examples out from the training split"
            )
        elif result.is_partial:
            total = evidence.count_test_rows(scored)
            of = f"of {total:,} " if total else ""
            gaps.append(
                f"{scored.name}: the whole test split: only {result.num_examples:,} {of}test examples were scored"
            )
    header = ("evaluation", "answers of", "accuracy", "weighted F1", "strict", "within tolerance", "unparsable")
    notes = (
        f"{_PER_CENT} Accuracy: the answer contains the truth; strict: it is the truth alone; F1 is weighted over labels. "
        "Examples of one group (sentence, headline, filing or own column) are resampled together.",
        "* Only a part of the test split was scored.",
    )
    tables = [
        TextTable(
            title="Scores",
            header=header,
            rows=tuple(rows),
            notes=notes if any(scored.result.is_partial for scored in evidence.scored) else notes[:1],
        ),
        TextTable(
            title="Differences in accuracy",
            header=("evaluation", "adapter against", "points (95 % interval)", "result", "compared"),
            rows=tuple(gains),
            notes=(
                "Paired: example by example on the same questions. Unpaired: from the two intervals, which is wider.",
            ),
        ),
    ]
    return Part(
        name="scores",
        title="Scores against base and majority",
        blocks=tuple(table for table in tables if table.rows),
        sources=_list_sources(evidence, has_tables=True, has_base=True),
        gaps=tuple(gaps) if evidence.scored else (_NOT_SCORED,),
    )


def describe_confusion(evidence: Evidence) -> Part:
    """Confusion counts as a picture, or as a table of the most frequent confusions where there are many labels."""
    from finlora.report.charts import draw_confusion, has_matrix

    blocks: list[Block] = []
    for scored in evidence.scored:
        if not scored.result.counts:
            blocks.append(_FREE_TEXT.format(scored.name))
            continue
        if has_matrix(scored.result):
            blocks.append(Picture(f"Confusion: {scored.name}", draw_confusion(scored.result)))
        blocks.append(_list_confusions(scored))
    return _part("confusion", "Confusion", evidence, blocks, [])


def describe_parity(evidence: Evidence) -> Part:
    """Answers as it is served beside those as it was trained, at other bits of the base and merged."""
    name: PartName = "parity"
    title = "Parity of the served forms"
    if evidence.why_no_parity:
        gap = f"answers at other bits than those of the training, or merged: {evidence.why_no_parity}"
        return make_part(name, title, [], [], [gap])
    return make_part(name, title, [parity_table(evidence.parity)], [evidence.folder / PARITY_FILE], [])


def describe_calibration(evidence: Evidence) -> Part:
    """Share of right answers by the probability that they were given with."""
    from finlora.report.charts import draw_reliability

    blocks: list[Block] = []
    gaps: list[str] = []
    for scored in evidence.scored:
        result = scored.result
        if not result.calibration:
            _explain_unlabelled(scored, blocks, gaps)
            continue
        blocks.append(Picture(f"Reliability: {scored.name}", draw_reliability(result)))
        rows = [
            (
                f"{each['low']:.1f} to {each['high']:.1f}",
                f"{each['count']:,.0f}",
                f"{100 * each['confidence']:.1f}",
                f"{100 * each['accuracy']:.1f}",
            )
            for each in result.calibration
        ]
        error, labels = result.metrics.get("calibration_error"), result.labels
        notes = [f"Expected calibration error {100 * error:.1f} %, over ten bins."] if error is not None else []
        if {"temperature", "num_fitted", "estimated_accuracy", "accuracy"} <= labels.keys():
            notes.append(
                f"Calibrated by a temperature of {labels['temperature']:.2f}, fitted on {labels['num_fitted']:,} of the answers, "
                f"the mean probability of the answers is {100 * labels['estimated_accuracy']:.1f} %, beside an accuracy "
                f"of {100 * labels['accuracy']:.1f} %. A server estimates the accuracy in this way."
            )
        blocks.append(
            TextTable(
                title=f"Probability and right answers: {scored.name}",
                header=("probability", "rows", "mean probability %", "right %"),
                rows=tuple(rows),
                notes=tuple(notes),
            )
        )
    return _part("calibration", "Calibration", evidence, blocks, gaps)


def describe_abstention(evidence: Evidence) -> Part:
    """Accuracy on the rows that are left when the model abstains below a probability."""
    blocks: list[Block] = []
    gaps: list[str] = []
    for scored in evidence.scored:
        curve = make_abstention_curve(scored.result, scored.table, seed_of(scored.result))
        if not curve:
            _explain_unlabelled(scored, blocks, gaps)
            continue
        if scored.table is not None:
            blocks.append(Picture(f"Abstention: {scored.name}", draw_abstention(scored.table)))
        note = "Below the threshold the model abstains (`--threshold` of `finlora score`)."
        if scored.table is None:
            note += f" Thresholds are the bounds of ten bins, and intervals ignore groups: {scored.why_no_table}."
        blocks.append(
            TextTable(
                title=f"Rows left and accuracy on them: {scored.name}",
                header=("threshold", "rows left", "share %", "accuracy %"),
                rows=tuple(_slice_row(each) for each in curve),
                notes=(note,),
            )
        )
    return _part("abstention", "Abstention", evidence, blocks, gaps)


def _explain_unlabelled(scored: Scored, blocks: list[Block], gaps: list[str]) -> None:
    """Say why answers have no probabilities: free text never has any, which is no open point."""
    if scored.result.counts:
        gaps.append(_NO_LABELS.format(scored.name))
    else:
        blocks.append(_FREE_TEXT.format(scored.name))


def describe_segments(evidence: Evidence) -> Part:
    """Accuracy by length of text, and by the task file's own columns."""
    blocks: list[Block] = []
    gaps = []
    for scored in evidence.scored:
        if scored.table is None:
            gaps.append(f"{scored.name}: accuracy by length of text: {scored.why_no_table}")
        else:
            blocks.append(
                TextTable(
                    title=f"By length of the prompt: {scored.name}",
                    header=("length", "rows", "share %", "accuracy %"),
                    rows=tuple(_slice_row(each) for each in slice_by_length(scored.table, seed_of(scored.result))),
                    notes=("Four groups of about equally many rows; the prompt is the question with its text.",),
                )
            )
        blocks += _list_segments(scored)
    return _part("segments", "By segment", evidence, blocks, gaps)


def describe_cutoff(evidence: Evidence) -> Part:
    """Test rows from before the end of the base's own training data, which may have held them."""
    blocks: list[Block] = []
    gaps = []
    known = evidence.cutoff
    if known is None:
        gaps.append(
            f"the base's training cut-off: no file of {evidence.contract.base} states it. Write it into fields.yaml as "
            "base_training_cutoff"
        )
    for scored in evidence.scored:
        if scored.table is None:
            gaps.append(f"{scored.name}: dates of the test rows: {scored.why_no_table}")
        elif not any(scored.table.time):
            gaps.append(f"{scored.name}: dates of the test rows: the data has none (columns.time of a task file)")
        elif known is not None:
            day, source = known
            blocks.append(
                TextTable(
                    title=f"Test rows and the base's training cut-off: {scored.name}",
                    header=("rows", "count", "share %", "accuracy %"),
                    rows=tuple(_slice_row(each) for each in slice_by_cutoff(scored.table, day, seed_of(scored.result))),
                    notes=(
                        f"Cut-off {day}: {source}. The base may have seen rows from before it in its own training.",
                    ),
                )
            )
    return _part("cutoff", "Test rows and the base's training cut-off", evidence, blocks, gaps)


def draw_abstention(table: AnswerTable) -> Figure:
    """Draw the accuracy over the share of rows that are answered, likeliest rows first."""
    from finlora.report.plots import COLOURS, new_figure

    figure, axes = new_figure(5.0, 4.0)
    points = trace_abstention(table)
    axes.plot(
        [100 * share for share, _ in points], [100 * right for _, right in points], color=COLOURS[0], linewidth=1.8
    )
    axes.set_xlim(0, 100)
    axes.set_ylim(top=101)
    axes.set_xlabel("rows answered, %", fontsize=12)
    axes.set_ylabel("accuracy on them, %", fontsize=12)
    axes.grid(color="#EEEEEE")
    return figure


def _part(name: PartName, title: str, evidence: Evidence, blocks: Sequence[Block], gaps: Sequence[str]) -> Part:
    return Part(
        name=name,
        title=title,
        blocks=tuple(blocks),
        sources=_list_sources(evidence, has_tables=name not in ("confusion", "calibration")),
        gaps=tuple(gaps) if evidence.scored else (_NOT_SCORED,),
    )


def _list_sources(evidence: Evidence, *, has_tables: bool, has_base: bool = False) -> tuple[str, ...]:
    """Return the files behind the evaluations.

    Args:
        has_tables: with the tables of answers.
        has_base: with those of the base.
    """
    pairs = [(scored.result, scored.source) for scored in evidence.scored]
    if has_base:
        pairs += [(scored.base, scored.base_source) for scored in evidence.scored if scored.base and scored.base_source]
    found = []
    for result, source in pairs:
        found.append(str(source))
        if has_tables and result.answers:
            found.append(str(source.parent / "answers" / result.answers))
    return tuple(dict.fromkeys(found))


def _score_row(name: str, whose: str, result: Result) -> tuple[str, ...]:
    return (
        name,
        whose,
        f"{format_score(result, 'accuracy')}{'*' if result.is_partial else ''}",
        format_score(result, "weighted_f1") if "weighted_f1" in result.metrics else "none",
        format_score(result, "strict_accuracy"),
        format_score(result, "numeric_accuracy") if "numeric_accuracy" in result.metrics else "none",
        f"{result.metrics['unparsable']:,.0f}" if "unparsable" in result.metrics else "not measured",
    )


def _gain_cells(gain: Gain) -> tuple[str, ...]:
    points = f"{100 * gain.gain:+.1f} ({100 * gain.gain_low:+.1f} to {100 * gain.gain_high:+.1f})"
    return gain.other, points, gain.word, "paired" if gain.is_paired else "unpaired"


def _list_confusions(scored: Scored) -> TextTable:
    """Return each label's row count and recall, and its most frequent wrong answer."""
    rows = []
    for label, answers in list(scored.result.counts.items())[:_MAX_CELLS]:
        total, right = sum(answers.values()), answers.get(label, 0)
        wrong = max(((count, other) for other, count in answers.items() if other != label), default=None)
        rows.append(
            (
                label,
                f"{total:,}",
                f"{100 * right / total:.1f}" if total else "none",
                f"{wrong[1]} ({wrong[0]:,})" if wrong else "none",
            )
        )
    left_out = len(scored.result.counts) - len(rows)
    return TextTable(
        title=f"By true label: {scored.name}",
        header=("label", "rows", "right %", "most frequent wrong answer"),
        rows=tuple(rows),
        notes=(f"{left_out:,} further labels are left out.",) if left_out else (),
    )


def _list_segments(scored: Scored) -> list[TextTable]:
    return [
        TextTable(
            title=f"By {column}: {scored.name}",
            header=(column, "rows", "share %", "accuracy %"),
            rows=tuple(
                (
                    value or "(empty)",
                    f"{metrics['count']:,.0f}",
                    f"{100 * metrics['count'] / scored.result.num_examples:.1f}",
                    format_share(metrics["accuracy"], metrics["accuracy_low"], metrics["accuracy_high"]),
                )
                for value, metrics in values.items()
            ),
        )
        for column, values in scored.result.segments.items()
    ]


def _slice_row(each: Slice) -> tuple[str, ...]:
    return (
        each.name,
        f"{each.num_rows:,}",
        f"{100 * each.share:.1f}",
        format_share(each.accuracy, each.low, each.high),
    )
