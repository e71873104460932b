"""Question answering, from strangers' rows to a published model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.command import CHECKPOINT, forkserver
from support.trained.training import has_digits, messages, train
from torchmetrics.functional.text import squad
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from hfq.common.errors import DataError
from hfq.data.dataset import load_splits
from hfq.source.checkpoint import pull
from hfq.tasks.base import Processor
from hfq.tasks.text.question_answering import KEPT, Answers, Asked, QuestionAnswering, best_threshold, given

CONFIG = {"architectures": ["BertForQuestionAnswering"]}
QUESTION = "Which number?"
CONTEXT = "Ada wrote the first program in 1843, for a machine that was never built."
SQUAD = {"question": ["When?"], "context": [CONTEXT], "answers": [{"text": ["1843"], "answer_start": [31]}]}


def row(text: str) -> dict[str, Any]:
    """The first word with digits of the start of a message, if there is one."""
    context = text[:64]
    numbers = [word for word in context.split() if has_digits(word)][:1]
    starts = [context.index(word) for word in numbers]
    return {"id": "x", "question": QUESTION, "context": context, "answers": {"text": numbers, "answer_start": starts}}


def write(folder: Path, *, answered: bool, **counts: int) -> Path:
    folder.mkdir()
    for split, count in counts.items():
        rows = [row(text) for text in messages(split, 900)]
        rows = [each for each in rows if each["answers"]["text"] or not answered][:count]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def batch(tokenizer: Any, texts: Any) -> dict[str, Any]:
        rows = [row(text) for text in texts]
        tokens = tokenizer(
            [QUESTION] * len(rows), [each["context"] for each in rows], padding=True, truncation=True, max_length=32,
            return_tensors="pt",
        )  # fmt: skip
        places = torch.zeros(2, len(rows), dtype=torch.long)
        for i, each in enumerate(rows):
            for start, text in zip(each["answers"]["answer_start"], each["answers"]["text"], strict=True):
                found = [tokens.char_to_token(i, place, 1) for place in (start, start + len(text) - 1)]
                places[:, i] = torch.tensor([place or 0 for place in found])
        return {**tokens, "start_positions": places[0], "end_positions": places[1]}

    to = tmp_path_factory.mktemp("answers") / "bert-mini-numbers"
    return train(to, "AutoModelForQuestionAnswering", batch, epochs=2)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return QuestionAnswering(CONFIG).processor(pull(str(CHECKPOINT)), max_length=None, trust_remote_code=False)


def references(rows: Dataset) -> list[Any]:
    task = QuestionAnswering(CONFIG)
    columns = task.columns(rows.features, {})
    return task.references(rows, columns, task.align([rows], columns))


def outputs_of(spans: list[tuple[int, int] | None], contexts: list[str]) -> list[torch.Tensor]:
    """What a model puts out that answers with these characters, or with nothing."""
    found = []
    for span, context in zip(spans, contexts, strict=True):
        start, end = span or (0, 1)
        found.append(torch.tensor([start / len(context), end / len(context), 1.0, -1.0 if span else 3.0]))
    return found


def test_answers_have_the_forms_of_squad() -> None:
    listed = {**SQUAD, "answers": [[{"text": "1843", "answer_start": 31}, {"text": "in 1843", "answer_start": 28}]]}
    assert references(Dataset.from_dict(SQUAD)) == [Asked(CONTEXT, ("1843",))]
    assert references(Dataset.from_list([{name: value[0] for name, value in listed.items()}])) == [
        Asked(CONTEXT, ("1843", "in 1843"))
    ]
    both = {name: value * 2 for name, value in SQUAD.items()}
    both["answers"] = [*SQUAD["answers"], {"text": [], "answer_start": []}]
    rows, task = Dataset.from_dict(both), QuestionAnswering(CONFIG)
    columns = task.columns(rows.features, {})
    assert task.align([rows], columns) == Answers("50.0% of the questions have no answer, as in SQuAD 2.0", True)
    assert references(rows)[1] == Asked(CONTEXT, ())
    for starts in (["31"], [31.0], [None]):
        answers = [{"text": ["1843"], "answer_start": starts}]
        assert references(Dataset.from_dict({**SQUAD, "answers": answers})) == [Asked(CONTEXT, ("1843",))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answers": [{"text": ["1844"], "answer_start": [31]}]},
            r"Row 0 \(from 0\) has the answer '1844'.*not in its text",
        ),
        (
            {"answers": [{"text": ["1843"], "answer_start": [3]}]},
            "has the answer '1843' at 3 .* where its text has ' wro'",
        ),
        (
            {"answers": [{"text": ["1843"], "answer_start": [31 - len(CONTEXT)]}]},
            "starts at -41 in column 'answers'; expected",
        ),
        (
            {"answers": [{"text": ["1843"], "answer_start": ["there"]}]},
            "starts at 'there' in column 'answers'; expected",
        ),
        (
            {"answers": [{"text": ["1843", "Ada"], "answer_start": [31]}]},
            r"Row 0 \(from 0\) has 2 answers and 1 places",
        ),
        ({"answers": [{"text": [], "answer_start": []}]}, "No question has an answer in column 'answers'"),
        ({"answers": ["1843"]}, "Column 'answers' holds '1843'; expected answers as SQuAD has them"),
        ({"answers": [{"answer": ["1843"]}]}, "Column 'answers' holds .*; expected answers as SQuAD has them"),
        ({"answers": [{"text": [""], "answer_start": [0]}]}, r"Row 0 \(from 0\) has an answer without text"),
        ({"context": [None]}, "has None in column 'context', and not a text"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        references(Dataset.from_dict({**SQUAD, **changes}))


def test_squads_own_files_are_read(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "When?", "answers": [{"text": "1843", "answer_start": 31}], "is_impossible": False},
        {"id": "2", "question": "Where?", "answers": [], "is_impossible": True},
    ]
    article = {"title": "Ada", "paragraphs": [{"context": CONTEXT, "qas": asked}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": [article]}), encoding="utf-8")
    (rows,) = load_splits(str(tmp_path / "dev-v2.0.json"), None, token=None)[0].values()
    rows = QuestionAnswering(CONFIG).unfolded(rows)
    assert rows["question"] == ["When?", "Where?"]
    assert references(rows) == [Asked(CONTEXT, ("1843",)), Asked(CONTEXT, ())]


@pytest.mark.parametrize(
    "paragraphs", [None, "text", [{"context": CONTEXT}], [{"context": CONTEXT, "qas": [{"answers": []}]}]]
)
def test_what_is_no_file_of_squads_is_refused(paragraphs: Any) -> None:
    rows = Dataset.from_list([{"title": "Ada", "paragraphs": paragraphs}])
    with pytest.raises(
        DataError, match=r"Row 0 \(from 0\) of split 'given' has .* expected a list of \{\"context\": …"
    ):
        QuestionAnswering(CONFIG).unfolded(rows)


def test_columns_that_are_missing_are_named(processor: Processor) -> None:
    task = QuestionAnswering(CONFIG)
    with pytest.raises(DataError, match=r"holds the context is not clear. Columns: question. .* --column context=…"):
        task.columns(Dataset.from_dict({"question": ["a"]}).features, {})
    long = Dataset.from_dict({"question": ["who " * 500], "context": ["a"]})
    with pytest.raises(DataError, match=r"The question of row 0 \(from 0\) has 500 tokens, which leaves none of 128"):
        task.encode(long, task.inputs(long.features, {}), processor)


def test_a_long_text_is_read_in_windows_and_padding_changes_nothing(checkpoint: Path, processor: Processor) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint).eval()
    task, narrow = QuestionAnswering(CONFIG), Processor(processor.tool, 48)
    contexts = ["short 12 text", "word " * 60 + "0800 " + "word " * 60, CONTEXT]
    rows = Dataset.from_dict({"question": [QUESTION] * 3, "context": contexts})
    encodings = task.encode(rows, task.inputs(rows.features, {}), narrow)
    assert len(encodings[0]["input_ids"]) == 1 < len(encodings[1]["input_ids"])
    assert max(map(len, encodings[1]["input_ids"])) == 48
    with torch.inference_mode():
        together = task.outputs(model, task.collate(encodings, narrow))
        alone = [task.outputs(model, task.collate([encoding], narrow))[0] for encoding in encodings]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert task.model_inputs(task.collate(encodings, narrow))["input_ids"].shape[0] == sum(
        len(encoding["input_ids"]) for encoding in encodings
    )


def test_a_tokenizer_that_pads_on_the_left_reads_the_text_first(processor: Processor) -> None:
    tool = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    task, left = QuestionAnswering(CONFIG), Processor(tool, 32)
    rows = Dataset.from_dict({"question": ["Where, in all?", QUESTION], "context": ["word " * 40, "hi 12"]})
    encodings = task.encode(rows, task.inputs(rows.features, {}), left)
    assert tool.decode(encodings[1]["input_ids"][0]) == "[CLS] hi 12 [SEP] which number? [SEP]"
    batch = task.collate(encodings, left)
    places = batch["labels"][..., 0]
    assert batch["input_ids"][places == -2].tolist() == [tool.cls_token_id] * sum(
        len(encoding["input_ids"]) for encoding in encodings
    )
    assert tool.pad_token_id not in batch["input_ids"][places >= 0].tolist()
    assert tool.decode(batch["input_ids"][1][places[1] >= 0]) == "hi 12"


def test_the_best_span_is_found_as_the_example_finds_it(checkpoint: Path, processor: Processor) -> None:
    """Against a plain reading of run_qa's rules for one window."""
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint).eval()
    task = QuestionAnswering(CONFIG)
    contexts = [text[:200] for text in messages("test", 20)]
    rows = Dataset.from_dict({"question": [QUESTION] * 20, "context": contexts})
    encodings = task.encode(rows, task.inputs(rows.features, {}), processor)
    with torch.inference_mode():
        outputs = task.outputs(model, task.collate(encodings, processor))
    for context, output in zip(contexts, outputs, strict=True):
        tokens = processor.tool(QUESTION, context, return_offsets_mapping=True, return_tensors="pt")
        offsets = tokens.pop("offset_mapping")[0].tolist()
        with torch.inference_mode():
            answer = model(**tokens)
        inside = [i for i, part in enumerate(tokens.sequence_ids()) if part == 1]
        start, end = answer.start_logits[0], answer.end_logits[0]
        first, last = (sorted(inside, key=lambda i, x=x: -x[i].item())[:20] for x in (start, end))
        spans = [(start[i] + end[j], i, j) for i in first for j in last if i <= j < i + 30]
        score, i, j = max(spans, key=lambda span: span[0].item())
        assert output[2].item() == pytest.approx(score.item(), abs=1e-4)
        assert output[3].item() == pytest.approx((start[0] + end[0]).item(), abs=1e-4)
        assert given(output, Asked(context, ()), None) == context[offsets[i][0] : offsets[j][1]]


def test_metrics_are_those_of_squad() -> None:
    contexts = [CONTEXT] * 4
    right = [Asked(CONTEXT, ("1843",)), Asked(CONTEXT, ("the first program",)), Asked(CONTEXT, ()), Asked(CONTEXT, ())]
    outputs = outputs_of([(28, 35), (10, 17), None, (0, 3)], contexts)  # "in 1843", "first p", nothing, "Ada"
    task = QuestionAnswering(CONFIG).informed(Answers("", True))
    target = [
        {"answers": {"text": list(r.answers) or [""], "answer_start": [0]}, "id": str(i)} for i, r in enumerate(right)
    ]
    said = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(["in 1843", "e first", "", "Ada"])]
    outputs[1] = outputs_of([(12, 19)], [CONTEXT])[0]
    expected = squad(said, target)
    assert task.score("f1", outputs, right) == pytest.approx(expected["f1"].item() / 100)
    assert task.score("exact_match", outputs, right) == pytest.approx(expected["exact_match"].item() / 100)
    having = squad(said[:2], target[:2])["f1"].item() / 100
    assert task.score("has_answer_f1", outputs, right) == pytest.approx(having)
    assert task.score("no_answer_f1", outputs, right) == 0.5
    assert task.trivial("f1", right).score == 0.5
    assert list(QuestionAnswering(CONFIG).metrics) == ["f1", "exact_match"]
    other = [outputs[0], outputs[1], outputs[3], outputs[3]]
    assert (task.fidelity(outputs, outputs), task.fidelity(outputs, other)) == (1, 0.75)


def ranked(*spans: tuple[float, float, float], none: float) -> torch.Tensor:
    """What a model puts out that scores these spans so, and all others 0."""
    (start, end, score), *others = [*spans, *[(0.9 + i / 100, 1.0, 0.0) for i in range(KEPT - len(spans))]]
    return torch.tensor([start, end, score, none, *(number for span in others for number in span)])


def test_an_answer_is_ahead_of_the_best_other_one() -> None:
    first, second, third = (0.1, 0.2), (0.3, 0.4), (0.5, 0.6)
    task = QuestionAnswering(CONFIG)
    outputs = [ranked((*first, 5.0), (*second, 4.5), none=4.75)] * 4
    others = [
        outputs[0],
        ranked((*second, 5.0), (*first, 4.75), none=0.0),
        ranked((*second, 5.0), (*third, 4.0), none=0.0),
        ranked((*first, 5.0), (*second, 4.5), none=6.0),
    ]
    assert task.margins(outputs, others).tolist() == [0.5, -0.25, -5.0, 0.5]
    lacking = task.informed(Answers("", True))
    assert lacking.margins(outputs, others).tolist() == [0.25, -0.25, -5.0, -1.0]
    assert lacking.margins(others[3:], others[:1]).tolist() == [-0.25]


def test_the_spans_of_all_windows_are_ranked_each_once(checkpoint: Path, processor: Processor) -> None:
    task = QuestionAnswering(CONFIG)
    context = " ".join(f"It was in {1800 + i} that it happened." for i in range(40))
    rows = Dataset.from_dict({"question": ["When?"], "context": [context]})
    columns = {name: [name] for name in ("question", "context")}
    batch = task.collate(task.encode(rows, columns, processor), processor)
    assert batch["labels"].shape[1] > 1
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        (output,) = task.outputs(model, batch)
    spans = torch.cat([output[:3], output[4:]]).view(KEPT, 3)
    assert len({(start, end) for start, end, _ in spans.tolist()}) == KEPT
    assert spans[:, 2].diff().le(0).all()
    assert task.margins([output], [output]).item() == pytest.approx((spans[0, 2] - spans[1, 2]).item())


def test_the_threshold_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    right = [Asked(CONTEXT, ("Ada",) if i % 3 else ()) for i in range(60)]
    outputs = [
        torch.tensor(
            [0, 3 / len(CONTEXT), 0.0, 2.0 * (not asked.answers) + torch.randn((), generator=generator).item()]
        )
        for asked in right
    ]
    task = QuestionAnswering(CONFIG).informed(Answers("", True))
    assert task.undecided
    decided = task.decided(outputs, right)
    assert not decided.undecided and decided.decisions == {"null_threshold": best_threshold(outputs, right)}
    tried = [task._changed(threshold=value / 50).score("f1", outputs, right) for value in range(-200, 200)]
    assert decided.score("f1", outputs, right) >= max(tried)


def test_a_checkpoint_is_quantized_and_opens_in_stock_transformers(checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data", answered=False, train=60, validation=100, test=80)
    goal = ("--tolerable-loss", 0.03)
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", *goal, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"], report["metric"]) == (
        "question-answering",
        "question-answering",
        "f1",
    )
    assert report["baseline"]["accuracy"] > report["trivial"]["score"]
    assert report["quantized"]["accuracy"] >= 0.97 * report["baseline"]["accuracy"]
    assert report["stock_agreement"] >= 0.9
    assert "have no answer, as in SQuAD 2.0" in report["dataset"]["alignment"]
    threshold = report["decisions"]["null_threshold"]
    out = tmp_path / "out"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "`null_threshold` is" in card and "answers on `validation` alone" in card
    for what in ("Exact match", "F1, questions with an answer", "F1, questions without an answer"):
        assert re.search(rf"{what}: FP32 [01]\.\d+, INT8 [01]\.\d+\.", card)
    usage = card.split("import hfq  # before the model is loaded; nothing else changes\n")[1].split("```")[0]
    exec(usage.replace("path/to/this/folder", str(out)), {})
    tokens = AutoTokenizer.from_pretrained(out)(QUESTION, "call 0800 now", return_tensors="pt")
    assert AutoModelForQuestionAnswering.from_pretrained(out)(**tokens).start_logits.shape == tokens["input_ids"].shape
    test = ("--dataset", data, "--split", "test", "--json")
    again = json.loads(forkserver().hfq("eval", out, *test, cwd=tmp_path).out)
    assert again["accuracy"] == pytest.approx(report["quantized"]["holdout_accuracy"], abs=0.02)  # with its threshold
    changed = json.loads((out / "hfq.json").read_text())
    moved = Path(shutil.copytree(out, tmp_path / "moved"))
    (moved / "hfq.json").write_text(json.dumps({**changed, "decisions": {"null_threshold": threshold - 1000}}))
    never = json.loads(forkserver().hfq("eval", moved, *test, cwd=tmp_path).out)
    assert never["accuracy"] == pytest.approx(
        sum(not row(text)["answers"]["text"] for text in messages("test", 80)) / 80, abs=1e-6
    )


def test_every_question_may_have_an_answer(checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data", answered=True, validation=60)
    done = forkserver().hfq("eval", checkpoint, "--dataset", data, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["accuracy"] > 0.3
    assert "every question has an answer, as in SQuAD 1.1" in done.err
