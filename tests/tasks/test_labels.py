"""Labels are matched by name and never guessed in silence; columns and datasets are found or asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Features, Value
from transformers import BertConfig

from hfq.common.errors import DataError, UnsupportedError
from hfq.data.reference import DatasetReference, find_dataset
from hfq.recipe import Recipe
from hfq.source.checkpoint import Checkpoint, CheckpointInfo
from hfq.tasks.labels import LabelMap
from hfq.tasks.registry import make_task
from hfq.tasks.text.text_classification import TextClassification

TEXT = Value("string")
SPAM = {0: "ham", 1: "spam"}
NLI = {0: "contradiction", 1: "entailment", 2: "neutral"}
GENERIC = {0: "LABEL_0", 1: "LABEL_1"}


def task(names: dict[int, str] | None = None, **config: Any) -> TextClassification:
    """A model with labels of these names, as config.json holds them: keys are strings there."""
    if names is not None:
        config["id2label"] = {str(i): name for i, name in names.items()}
    return TextClassification(config)


def text_columns(features: Any, requested: list[str], label: str) -> list[str]:
    return list(task(SPAM).columns(features, {"text": requested, "label": [label]})["text"])


def label_column(features: Any, requested: str | None) -> str:
    (found,) = task(SPAM).find_labels(features, [requested] if requested else [])
    return found


def ids(labels: LabelMap, *values: Any) -> list[int | None]:
    return [labels(value) for value in values]


def mismatch(model: TextClassification, feature: Any, values: list[Any]) -> str:
    with pytest.raises(DataError) as caught:
        model.labels.align(feature, values)
    return str(caught.value)


def test_same_names_in_the_same_order() -> None:
    labels = task(SPAM).labels.align(ClassLabel(names=["ham", "spam"]), [0, 1])
    assert ids(labels, 0, 1) == [0, 1]
    assert labels.how == "by name (0=ham, 1=spam)"


def test_names_in_another_order_are_matched_by_name() -> None:
    feature = ClassLabel(names=["entailment", "neutral", "contradiction"])
    labels = task(NLI).labels.align(feature, [0, 1, 2])
    assert ids(labels, 0, 1, 2) == [1, 2, 0]
    assert labels.how.startswith("by name")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("not_equivalent", "Not Equivalent"),
        ("SPAM", "spam"),
        ("very-bad", "very_bad"),
        ("ham ", "ham"),
        ("gru\u0308n", "gr\xfcn"),
    ],
)
def test_names_are_the_same_whatever_their_case_and_separator(ours: str, theirs: str) -> None:
    labels = task({0: "other", 1: ours}).labels.align(ClassLabel(names=[theirs, "other"]), [0, 1])
    assert ids(labels, 0, 1) == [1, 0]


def test_model_labels_that_differ_only_by_case_stay_apart() -> None:
    labels = task({0: "A", 1: "a"}).labels.align(ClassLabel(names=["a", "A"]), [0, 1])
    assert ids(labels, 0, 1) == [1, 0]
    assert "Dataset: ['B', 'a']" in mismatch(task({0: "A", 1: "a"}), ClassLabel(names=["B", "a"]), [0, 1])


def test_dataset_may_use_fewer_labels_than_the_model_has() -> None:
    labels = task(NLI).labels.align(ClassLabel(names=["neutral", "entailment"]), [0, 1])
    assert ids(labels, 0, 1, 2) == [2, 1, None]


@pytest.mark.parametrize("names", [["ham", "eggs"], ["ham", "spam", "eggs"], ["0", "1"]])
def test_other_names_are_a_mismatch_that_shows_both_sides(names: list[str]) -> None:
    message = mismatch(task(SPAM), ClassLabel(names=names), [0, 1])
    assert f"Dataset: {names}" in message
    assert "model (id2label): 0=ham, 1=spam" in message
    assert "--label-column" in message


def test_many_labels_are_shown_in_part() -> None:
    message = mismatch(task(SPAM), TEXT, [f"label{i:03}" for i in range(100)])
    assert "label000" in message
    assert "label099" not in message


def test_nameless_model_takes_named_labels_by_position_and_says_so() -> None:
    labels = task(GENERIC).labels.align(ClassLabel(names=["ham", "spam"]), [0, 1])
    assert ids(labels, 0, 1) == [0, 1]
    assert labels.how == "by position, since the model does not name its labels: taken as 0=ham, 1=spam"


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (ClassLabel(names=["ham", "spam", "eggs"]), [0, 1, 2]),  # another number of labels
        (ClassLabel(names=["ham"]), [0]),
        (TEXT, ["ham", "spam"]),  # strings have no position
    ],
    ids=["more", "fewer", "strings"],
)
def test_nameless_model_does_not_guess(feature: Any, values: list[Any]) -> None:
    assert "0=LABEL_0, 1=LABEL_1" in mismatch(task(GENERIC), feature, values)


def test_nameless_labels_on_both_sides_are_names_too() -> None:
    labels = task(GENERIC).labels.align(ClassLabel(names=["LABEL_1", "LABEL_0"]), [0, 1])
    assert ids(labels, 0, 1) == [1, 0]


@pytest.mark.parametrize("names", [SPAM, GENERIC], ids=["named", "nameless"])
def test_integers_are_the_models_ids_and_it_is_said(names: dict[int, str]) -> None:
    labels = task(names).labels.align(Value("int64"), [1, 0])
    assert ids(labels, 0, 1, 2) == [0, 1, None]
    assert labels.how.startswith("by id: integers are the model's ids (0=")


@pytest.mark.parametrize("values", [[0, 1, 2], [1, 2], [-2, 0]])
def test_integers_that_are_no_ids_are_a_mismatch(values: list[int]) -> None:
    message = mismatch(task(SPAM), Value("int64"), values)
    assert f"Dataset: {values}" in message
    assert "0=ham, 1=spam" in message


def test_strings_are_matched_by_name() -> None:
    labels = task(SPAM).labels.align(TEXT, ["spam", "Ham"])
    assert ids(labels, "spam", "Ham", "eggs") == [1, 0, None]
    assert "['eggs', 'ham']" in mismatch(task(SPAM), TEXT, ["ham", "eggs"])


@pytest.mark.parametrize("values", [[0.5, 1.0], [float("inf"), 1.0], [True, False], ["ham", 1]], ids=str)
def test_other_types_are_a_mismatch(values: list[Any]) -> None:
    assert "0=ham, 1=spam" in mismatch(task(SPAM), Value("float32"), values)


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (ClassLabel(names=["spam", "ham"]), [-1, 0, 1], [None, 1, 0]),
        (Value("int64"), [1, None, -1], [1, None, None]),
        (TEXT, ["ham", None, "spam"], [0, None, 1]),
    ],
    ids=["names", "integers", "strings"],
)
def test_unlabelled_examples_fit_any_labels_and_have_none(
    feature: Any, values: list[Any], expected: list[int | None]
) -> None:
    assert ids(task(SPAM).labels.align(feature, values), *values) == expected


def test_split_without_any_label_is_a_mismatch() -> None:
    assert "0=ham, 1=spam" in mismatch(task(SPAM), Value("int64"), [-1, None])


def test_ids_are_ordered_as_numbers() -> None:
    names = {i: f"topic {i}" for i in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9, 11)}
    assert task(names).labels.names == [f"topic {i}" for i in range(12)]


def test_config_of_a_real_model_is_understood() -> None:
    config = BertConfig(id2label=NLI, label2id={name: i for i, name in NLI.items()})
    assert TextClassification(json.loads(config.to_json_string())).labels.names == list(NLI.values())
    assert TextClassification({}).labels.names == ["LABEL_0", "LABEL_1"]  # transformers leaves its default out


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"num_labels": 4}, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]),
        ({"label2id": {"spam": 1, "ham": 0}}, ["ham", "spam"]),
        ({"num_labels": 3, "label2id": {"c": 2, "b": 1, "a": 0}}, ["a", "b", "c"]),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"spam": 1, "ham": 0}}, ["ham", "spam"]),
        ({"id2label": {"0": "ham", "1": "spam"}, "label2id": {"a": 1, "b": 0}}, ["ham", "spam"]),
        ({"num_labels": 3, "label2id": {"a": 0, "b": 1}}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
    ids=["num_labels", "label2id", "both", "generic id2label", "id2label first", "label2id of other size"],
)
def test_labels_are_those_of_the_model_that_transformers_makes(config: dict[str, Any], names: list[str]) -> None:
    assert TextClassification(config).labels.names == names
    assert BertConfig(**config).num_labels == len(names)


def test_more_labels_than_two_need_id2label() -> None:
    with pytest.raises(UnsupportedError, match=r'Add "id2label": {"0": "a", "1": "b", "2": "c"} to config.json'):
        TextClassification({"label2id": {"c": 2, "a": 0, "b": 1}})
    with pytest.raises(UnsupportedError, match=r'Add "id2label": {"0": "a", "1": "b", "2": "c"} to config.json'):
        TextClassification({"label2id": {"c": "2", "a": "0", "b": "1"}})


def test_labels_are_numbered_as_outputs_are() -> None:
    with pytest.raises(UnsupportedError, match=r"numbers its 2 labels \[1, 2\]; expected 0 to 1"):
        TextClassification({"id2label": {"1": "bad", "2": "good"}})


@pytest.mark.parametrize(
    "values", [[1.0, 0.0], [1.0, 0.0, float("nan")], ["1", "0"], ["1.0", "0.0", None, "-1"]], ids=str
)
def test_whole_numbers_are_ids_however_they_are_written(values: list[Any]) -> None:
    labels = task(SPAM).labels.align(Value("float64"), values)
    assert ids(labels, *values) == [1, 0, None, None][: len(values)]
    assert labels.how.startswith("by id")


def test_truth_is_matched_by_name() -> None:
    labels = task({0: "True", 1: "false"}).labels.align(Value("bool"), [True, False])
    assert ids(labels, True, False, None) == [0, 1, None]


def test_numbers_may_be_names() -> None:
    stars = {i: f"{i + 1}" for i in range(5)}
    assert ids(task(stars).labels.align(Value("int64"), [1, 5]), 1, 5) == [0, 4]
    assert ids(task(stars).labels.align(TEXT, ["0", "4"]), "0", "4") == [0, 4]
    assert ids(task({0: "-1", 1: "0", 2: "1"}).labels.align(Value("int64"), [-1, 0, 1]), -1, 0, 1) == [0, 1, 2]
    with pytest.raises(DataError, match=r"\[1, 2\] are names of the model's labels and ids of others"):
        task(stars).labels.align(Value("int64"), [1, 2])


@pytest.mark.parametrize("values", [["01", "1"], ["1.5"], ["1e0"]], ids=str)
def test_codes_are_no_numbers(values: list[str]) -> None:
    assert f"Dataset: {values}" in mismatch(task(SPAM), TEXT, values)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "text-classification"),
        ({"problem_type": "regression", "id2label": {"0": "LABEL_0"}}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi-label-classification"),
        ({"id2label": {"0": "LABEL_0"}}, "regression"),
    ],
)
def test_a_config_says_which_problem_it_is_for(config: dict[str, Any], name: str) -> None:
    config["architectures"] = ["BertForSequenceClassification"]
    assert make_task(config).name == name
    assert make_task(config, name="text-classification").name == name  # what the Hub calls them all


def test_one_label_is_no_classification() -> None:
    with pytest.raises(UnsupportedError, match="expected two or more"):
        TextClassification({"id2label": {"0": "LABEL_0"}})


def features(**columns: Any) -> Features:
    return Features({name: Value(kind) if isinstance(kind, str) else kind for name, kind in columns.items()})


@pytest.mark.parametrize(
    "pair",
    [
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("premise", "hypothesis"),
        ("question", "sentence"),
        ("text", "text_pair"),
    ],
)
def test_known_pairs_are_read_in_the_order_models_know(pair: tuple[str, str]) -> None:
    columns = features(**{pair[1]: "string", "id": "string", pair[0]: "string", "idx": "int32", "label": "int64"})
    assert text_columns(columns, [], "label") == list(pair)


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_only_text_column_is_the_text(kind: str) -> None:
    columns = features(idx="int32", review=kind, label=ClassLabel(names=["ham", "spam"]))
    assert text_columns(columns, [], "label") == ["review"]


def test_label_column_is_no_text() -> None:
    columns = features(message="string", kind="string")
    assert text_columns(columns, [], "kind") == ["message"]


@pytest.mark.parametrize(
    ("columns", "texts"),
    [({"title": "string", "body": "string"}, "title, body"), ({"idx": "int32"}, "none")],
    ids=["two", "none"],
)
def test_unclear_text_columns_are_asked_for(columns: dict[str, Any], texts: str) -> None:
    with pytest.raises(DataError) as caught:
        text_columns(features(**columns, label="int64"), [], "label")
    message = str(caught.value)
    assert f"Columns: {', '.join(columns)}, label; with text: {texts}." in message
    assert "--text-column" in message


def test_requested_text_columns_are_taken_in_their_order() -> None:
    columns = features(sentence1="string", sentence2="string", label="int64")
    assert text_columns(columns, ["sentence2", "sentence1"], "label") == ["sentence2", "sentence1"]
    assert text_columns(columns, ["sentence2"], "label") == ["sentence2"]


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (["txt"], "--text-column 'txt' is not a column of the dataset. Columns: a, b, c, label."),
        (["a", "b", "c"], "--text-column was given 3 times; a model reads one text or a pair."),
    ],
)
def test_requested_text_columns_have_to_fit(requested: list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        text_columns(features(a="string", b="string", c="string", label="int64"), requested, "label")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": "string", "label": "int64"}, "label"),
        ({"text": "string", "labels": "string"}, "labels"),
        ({"label": "int64", "intent": ClassLabel(names=["a", "b"])}, "label"),
        ({"text": "string", "intent": ClassLabel(names=["a", "b"])}, "intent"),
    ],
    ids=["label", "labels", "named first", "classes"],
)
def test_label_column_is_found(columns: dict[str, Any], found: str) -> None:
    assert label_column(features(**columns), None) == found


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "string", "kind": "string"},
        {"label": "int64", "labels": "int64"},
        {"intent": ClassLabel(names=["a", "b"]), "mood": ClassLabel(names=["a", "b"])},
    ],
    ids=["none", "both", "two of classes"],
)
def test_unclear_label_column_is_asked_for(columns: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        label_column(features(**columns), None)
    assert f"Columns: {', '.join(columns)}. Name it with --label-column; where" in str(caught.value)


def test_requested_label_column_is_taken_or_missed() -> None:
    columns = features(text="string", label="int64", kind="string")
    assert label_column(columns, "kind") == "kind"
    with pytest.raises(
        DataError, match=r"--label-column 'sort' is not a column of the dataset\. Columns: text, label, kind\."
    ):
        label_column(columns, "sort")


CARD = {
    "model-index": [
        {"name": "empty", "results": []},
        {
            "name": "m",
            "results": [
                {"task": {"type": "text-classification"}, "metrics": []},
                {"dataset": {"name": "GLUE MRPC", "type": "glue", "config": "mrpc", "split": "validation"}},
                {"dataset": {"name": "later", "type": "later"}},
            ],
        },
    ],
    "datasets": ["imdb"],
}


def find(card: dict[str, Any], recipes: Path, **recipe: Any) -> DatasetReference:
    checkpoint = Checkpoint(CheckpointInfo("me/bert", "a" * 40), Path("none"), {}, card, (), {})
    return find_dataset(checkpoint, Recipe(checkpoint="me/bert", **recipe), recipes=recipes)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text("checkpoint: you/bert\ndataset: wrong\n")
    (tmp_path / "b.yaml").write_text("checkpoint: me/bert\n")  # names no dataset
    (tmp_path / "c.yaml").write_text("checkpoint: me/bert\ndataset: sst2\nsubset: plain\nsplit: dev\n")
    return tmp_path


def test_requested_dataset_comes_before_all_others(recipes: Path) -> None:
    assert find(CARD, recipes, dataset="mine", subset="en") == DatasetReference("mine", "en")
    assert find(CARD, recipes, dataset="mine") == DatasetReference("mine")  # the card's subset is another dataset's


def test_result_of_the_card_comes_first(recipes: Path) -> None:
    assert find(CARD, recipes) == DatasetReference("glue", "mrpc", "validation")


def test_requested_subset_replaces_the_cards(recipes: Path) -> None:
    assert find(CARD, recipes, subset="sst2") == DatasetReference("glue", "sst2", "validation")


def test_old_cards_name_the_subset_in_args(recipes: Path) -> None:
    def card(args: Any) -> dict[str, Any]:
        return {"model-index": [{"name": "m", "results": [{"dataset": {"type": "glue", "args": args}}]}]}

    assert find(card("mrpc"), recipes) == DatasetReference("glue", "mrpc")
    assert find(card({"some": 1}), recipes) == DatasetReference("glue")


@pytest.mark.parametrize("datasets", [["imdb"], "imdb"], ids=["list", "string"])
def test_datasets_of_the_card_come_second(recipes: Path, datasets: Any) -> None:
    assert find({"datasets": datasets}, recipes) == DatasetReference("imdb")


@pytest.mark.parametrize("card", [{}, {"datasets": []}, {"datasets": ["imdb", "sst2"]}, {"model-index": None}], ids=str)
def test_recipe_of_the_checkpoint_comes_last(recipes: Path, card: dict[str, Any]) -> None:
    assert find(card, recipes) == DatasetReference("sst2", "plain", "dev")


def test_unknown_dataset_is_an_error_that_lists_what_was_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        find({"datasets": ["imdb", "sst2"]}, tmp_path)
    message = str(caught.value)
    for looked_at in ("me/bert", "model-index", "['imdb', 'sst2']", str(tmp_path), "--dataset"):
        assert looked_at in message


def test_dataset_that_only_its_author_has_is_not_looked_for(tmp_path: Path) -> None:
    card = {"model-index": [{"name": "m", "results": [{"dataset": {"name": "sms", "type": "local", "split": "test"}}]}]}
    with pytest.raises(DataError, match="No dataset is known"):
        find(card, tmp_path)


@pytest.mark.parametrize("datasets", [{"imdb": 1}, [{"name": "imdb"}]], ids=str)
def test_strange_datasets_of_a_card_are_passed_over(recipes: Path, datasets: Any) -> None:
    assert find({"datasets": datasets}, recipes) == DatasetReference("sst2", "plain", "dev")
