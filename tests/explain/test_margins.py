"""By how much an answer is ahead: of labels, of tags, of several labels at once; and what is no choice has none."""

import torch

from hfq.tasks.text.multi_label_classification import MultiLabelClassification
from hfq.tasks.text.regression import Regression
from hfq.tasks.text.text_classification import TextClassification
from hfq.tasks.text.token_classification import TokenClassification

LABELS = {"id2label": {"0": "O", "1": "B-X", "2": "B-Y"}}
FLOATS, INT8 = torch.tensor([3.0, 1.0, -0.5]), torch.tensor([1.0, 2.0, 0.25])


def test_an_answers_lead_is_below_zero_where_int8_gives_another() -> None:
    task = TextClassification(LABELS)
    margins = task.margins([FLOATS, FLOATS], [FLOATS, INT8])
    assert margins.tolist() == [2.0, -1.0]


def test_of_several_labels_or_words_the_nearest_counts() -> None:
    several = MultiLabelClassification({**LABELS, "problem_type": "multi_label_classification"})
    assert several.margins([FLOATS], [INT8]).tolist() == [-0.25]
    words = TokenClassification(LABELS)
    pair = [torch.stack([FLOATS, INT8])], [torch.stack([INT8, INT8])]
    assert words.margins(*pair).tolist() == [-1.0]


def test_a_number_is_no_choice() -> None:
    assert Regression({"num_labels": 1, "id2label": {"0": "LABEL_0"}}).margins([FLOATS], [INT8]) is None
