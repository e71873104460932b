"""What a reader of a card sees, and that a card cannot be made to say anything else."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from support.factories import HOSTILE, make_report, report_saying

from hfq.common import resources
from hfq.common.errors import HfqError, HubError, UsageError
from hfq.common.names import PLOT_FILES
from hfq.common.resources import resource
from hfq.measure.figures import Comparison
from hfq.publish import validate_card
from hfq.report import plots
from hfq.report.card import TEMPLATE, render_card
from hfq.report.page import render_page
from hfq.report.report import Layers, Report
from hfq.report.view import model_name
from hfq.source.checkpoint import CheckpointInfo


def test_table_holds_the_reports_figures() -> None:
    report = make_report()
    rows = _table(render_card(report, repo_id="me/x"), "Info Type")
    assert rows[0] == ["Info Type", "Baseline FP32", "Quantized INT8"]
    assert [row[0] for row in rows[1:4]] == ["Accuracy (validation)", "Accuracy (test, held out)", "Duration (s)"]
    found = {row[0]: (float(row[1]), float(row[2])) for row in rows[1:]}
    float_, int8 = report.baseline, report.quantized
    assert found == {
        "Accuracy (validation)": (float_.accuracy, int8.accuracy),
        "Duration (s)": (float_.duration_s, int8.duration_s),
        "Memory (MiB)": (float_.memory_mib, int8.memory_mib),
        "Accuracy (test, held out)": (float_.holdout_accuracy, int8.holdout_accuracy),
        "Size on disk (MiB)": (float_.size_mib, int8.size_mib),
        "Peak memory (MiB)": (float_.peak_memory_mib, int8.peak_memory_mib),
        "Throughput (examples/s)": (float_.examples_per_s, int8.examples_per_s),
    }


def test_large_and_small_figures_stay_readable() -> None:
    report = make_report(quantized=replace(make_report().quantized, memory_mib=123456.7, duration_s=0.00912345))
    rows = _table(render_card(report, repo_id=None), "Info Type")
    assert {row[0]: row[2] for row in rows}["Memory (MiB)"] == "123457"
    assert {row[0]: row[2] for row in rows}["Duration (s)"] == "0.009123"


def test_int8_layers_are_counted_by_how_they_run_and_not_called_linear() -> None:
    assert "INT8 layers: 2 static, 1 dynamic, 1 embedding; kept in float: 1 layer." in render_card(
        make_report(), repo_id=None
    )
    convolutions = Layers(["stem.convolution"], [], [], {}, weight_only=["stages.0.convolution"])
    card = render_card(make_report(layers=convolutions), repo_id=None)
    assert "INT8 layers: 1 static, 1 weight-only; kept in float: 0 layers." in card


def test_metadata_publishes_the_int8_result_of_the_holdout() -> None:
    report = make_report()
    data = ModelCard(render_card(report, repo_id="me/bert-int8")).data.to_dict()
    assert data["base_model"] == "Intel/bert-base-uncased-mrpc"
    assert data["base_model_relation"] == "quantized"
    assert (data["pipeline_tag"], data["library_name"]) == ("text-classification", "transformers")
    assert (data["license"], data["language"]) == ("apache-2.0", ["en"])
    assert (data["datasets"], data["metrics"]) == (["nyu-mll/glue"], ["accuracy"])
    assert {"int8", "compressed-tensors", "hfq"} <= set(data["tags"])
    [entry] = data["model-index"]
    assert entry["name"] == "bert-int8"
    assert entry["results"] == [
        {
            "task": {"type": "text-classification"},
            "dataset": {
                "name": "nyu-mll/glue mrpc",
                "type": "nyu-mll/glue",
                "config": "mrpc",
                "split": "test",
                "revision": "b" * 40,
            },
            "metrics": [{"type": "accuracy", "value": report.quantized.holdout_accuracy}],
        }
    ]


@pytest.mark.parametrize(
    ("metric", "label", "published"),
    [
        ("spearman", "Spearman of cosine", ("spearmanr", "Spearman of cosine")),
        ("micro_f1", "Micro F1", ("f1", "Micro F1")),
        ("f1", "Entity F1", ("f1", "Entity F1")),
        ("f1", "F1", ("f1", None)),
    ],
)
def test_a_metric_has_the_hubs_name_and_its_own(metric: str, label: str, published: tuple[str, str | None]) -> None:
    card = render_card(make_report(metric=metric, metric_label=label), repo_id=None)
    data = ModelCard(card).data
    [result] = data.eval_results
    assert (result.metric_type, result.metric_name) == published
    assert data.metrics == [published[0]]


def test_without_a_holdout_the_evaluation_split_is_published_and_said_to_be_tuned_on() -> None:
    report = make_report()
    report = replace(
        report,
        dataset=replace(report.dataset, holdout_split=None, holdout_examples=0),
        baseline=replace(report.baseline, holdout_accuracy=None),
        quantized=replace(report.quantized, holdout_accuracy=None),
        comparisons=report.comparisons[:1],
    )
    card = render_card(report, repo_id=None)
    [result] = ModelCard(card).data.eval_results
    assert (result.dataset_split, result.metric_value) == ("validation", report.quantized.accuracy)
    assert result.metric_name == "Accuracy on the split that tuning chose by"
    assert "was used in tuning" in card
    assert "for want of a labelled split that tuning never saw" in card
    assert "held-out" not in card


def test_difference_is_put_into_words() -> None:
    card = render_card(make_report(), repo_id=None)
    assert "1 example of 408 in favour of FP32 (5 only FP32 gets right, 4 only INT8), exact McNemar p = 1" in card
    assert "Accuracy differs by -0.06 points, 95 % interval [-0.64 points, +0.52 points]; i.e. within noise" in card
    assert "`test` (1,725 examples) was seen by neither calibration nor tuning" in card


@pytest.mark.parametrize(
    ("interval", "p_value", "words"),
    [
        ((-0.02, 0.01), 0.4, "within noise"),
        ((-0.05, -0.01), 0.001, "outside noise"),
        ((-0.03, -0.0001), 0.06, "the interval and the test disagree"),
    ],
)
def test_noise_is_called_noise(interval: tuple[float, float], p_value: float, words: str) -> None:
    comparison = Comparison("test", 100, 0.88, -0.08, interval, False, 80, 10, 2, p_value)
    assert words in render_card(make_report(comparisons=[comparison]), repo_id=None)


def test_missed_goal_is_the_first_thing_said() -> None:
    card = ModelCard(render_card(make_report(met=False), repo_id="me/x"))
    opening = card.text.strip().split("\n\n")[1]
    assert opening.startswith("> [!WARNING]\n> **This model does not meet its accuracy goal.**")
    assert "0.8211" in opening and "0.8186" in opening
    assert "not meet" not in render_card(make_report(), repo_id="me/x")


def test_trials_layers_calibration_hardware_warnings_and_command_are_there() -> None:
    report = make_report()
    card = render_card(report, repo_id="me/bert-int8")
    [_, trial] = _table(card, "Candidate")
    assert trial == ["static-minmax", "0.8186", "0.003", "0.91", "0.0123", "yes"]
    assert "1 more candidate" in card
    assert "- `classifier`: the head decides; it is small" in card
    assert "Calibration: 100 samples of `train`." in card
    assert "torch 2.13.0" in card and "Xeon" in card
    assert report.warnings[0] in card
    assert f"```bash\n{report.command}\n```" in card


def test_plots_are_shown_where_there_are_some(tmp_path: Path) -> None:
    report = make_report()
    assert "![" not in render_card(report, repo_id=None) and "Sensitivity" not in render_card(report, repo_id=None)
    card = render_card(report, repo_id="me/x", plots=plots.write(report, tmp_path))
    shown = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", card)
    assert [path for _, path in shown] == ["plots/accuracy_speed.png", "plots/layer_sensitivity.png"]
    assert all((tmp_path / path).is_file() for _, path in shown)
    assert shown[0][0] == (
        "Accuracy on validation against speed: FP32 0.8211 at 125.5 examples/s; static-minmax (chosen) 0.8186 at "
        "448.4 examples/s; the goal is at least 0.8129."
    )
    assert shown[1][0] == (
        "Output error of each INT8 layer alone, the largest first: encoder.0.k 4.6 %; pooler.dense 1.2 %; "
        "encoder.0.q 0.078 %."
    )


def test_plots_are_small_the_same_each_time_and_say_nothing_of_when_or_where(tmp_path: Path) -> None:
    long = {f"encoder.layer.{i}.$x$." + "attention." * 9: 0.1 / (i + 1) for i in range(40)}
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        plots.write(make_report(sensitivity=long), tmp_path / name)
    for path in PLOT_FILES:
        content = (tmp_path / "first" / path).read_bytes()
        assert content == (tmp_path / "again" / path).read_bytes()
        assert len(content) < 60_000
        image = Image.open(tmp_path / "first" / path)
        assert not image.info and image.width == 1008


def test_a_report_without_figures_for_a_plot_gets_none(tmp_path: Path) -> None:
    old = json.loads(make_report().to_json())
    del old["sensitivity"], old["baseline_pass_s"]
    report = Report.from_json(json.dumps(old))
    drawn = plots.write(report, tmp_path)
    assert drawn == {"accuracy_speed": "plots/accuracy_speed.png"}
    assert "FP32 0.8211 at" not in render_card(report, repo_id=None, plots=drawn)
    assert plots.write(replace(report, trials=[]), tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_agreement_with_stock_transformers_is_that_of_data_that_chose_nothing() -> None:
    card, page = render_card(make_report(), repo_id=None), render_page(make_report())
    assert "Both ways agree to 99.38 % on 480 examples of `test`, which neither calibration nor tuning saw" in card
    assert "outputs differ by 0.0512 on average" in card
    assert "99.38 %" in page and "99.7 %" not in card + page


def test_agreement_on_the_tuning_split_alone_is_said_to_flatter() -> None:
    report = make_report(held_out_stock=None)
    card = render_card(report, repo_id=None)
    assert "Both ways agree to 99.7 % on 384 examples of `validation`, by which the candidate was chosen" in card
    assert "<code>validation</code>, which tuning chose by" in render_page(report)
    assert "Both ways" not in render_card(replace(report, stock_agreement=None), repo_id=None)


def test_snippets_load_from_where_the_model_is_published() -> None:
    report = make_report()
    card = render_card(report, repo_id="me/_bert_-int8")
    assert card.count('pipeline("text-classification", model="me/_bert_-int8"') == 2
    assert "compressed-tensors" in card and "import hfq" in card
    remote = replace(report, checkpoint=replace(report.checkpoint, remote_code=True))
    assert render_card(remote, repo_id=None).count("trust_remote_code=True)") == 2


def test_a_card_says_that_remote_code_was_allowed_and_whether_there_was_any() -> None:
    said = {}
    for code in (True, False):
        for allowed in (True, False):
            report = make_report()
            found = replace(report.checkpoint, remote_code=code, remote_code_allowed=allowed)
            said[code, allowed] = render_card(replace(report, checkpoint=found), repo_id=None)
    assert "`--trust-remote-code`: code from the base model's repository ran." in said[True, True]
    assert "`--trust-remote-code`: the base model brings no code, and none ran." in said[False, True]
    assert "--trust-remote-code" not in said[True, False] + said[False, False]


def test_local_checkpoint_and_data_make_no_links_and_show_no_paths() -> None:
    report = make_report()
    report = replace(
        report,
        checkpoint=CheckpointInfo("/home/bob smith/my ckpt", "sha256:" + "c" * 64),
        dataset=replace(report.dataset, id="/data/private/sms", subset=None, revision=None),
        command="hfq quantize '/home/bob smith/my ckpt' --dataset /data/private/sms --output=/tmp/out",
        warnings=["Read file:///home/bob/x.csv, and /var/lib/y.csv."],
        hardware={"cpu": "Intel(R) Xeon(R) CPU w/ AMX at 2/4"},
    )
    card = render_card(report, repo_id=None)
    data = ModelCard(card).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(data)
    [entry] = data["model-index"]
    assert entry["results"][0]["dataset"] == {"name": "sms", "type": "local", "split": "test"}
    assert not re.search(r"/(home|data|tmp|var)\b|bob", card)
    assert "hfq quantize 'my ckpt' --dataset sms --output=out" in card
    assert "w/ AMX at 2/4" in card
    assert "# my-ckpt-int8\n" in card


@pytest.mark.parametrize("id_", ["./ckpt", "../ckpt", "ckpt", "a/b/c", "models/ckpt"])
def test_a_folders_name_is_never_taken_for_a_repository(id_: str) -> None:
    checkpoint = CheckpointInfo(id_, "sha256:" + "c" * 64)
    dataset = replace(make_report().dataset, id=id_, revision=None)
    card = render_card(make_report(checkpoint=checkpoint, dataset=dataset), repo_id=None)
    assert not {"base_model", "datasets"} & set(ModelCard(card).data.to_dict())
    assert "huggingface.co" not in card


def test_a_token_in_the_command_is_not_shown() -> None:
    command = "hfq quantize a/b --push --token my-secret --dataset hf_AbCdEfGhIjKlMnOp"
    card = render_card(make_report(command=command), repo_id=None)
    assert "my-secret" not in card and "hf_AbCd" not in card
    assert "--token HF_TOKEN" in card


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_are_shown_not_obeyed(text: str) -> None:
    drawn = {"accuracy_speed": "a.png", "layer_sensitivity": "b.png"}
    harmless = _tokens(render_card(report_saying("two words"), repo_id="me/x", plots=drawn))
    card = render_card(report_saying(text), repo_id="me/x", plots=drawn)
    assert [token.type for token in _tokens(card)] == [token.type for token in harmless]
    assert "49" not in card.replace("448.4", "")
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "other"
    assert "language" not in data
    assert "base_model" not in data
    assert not re.search(r"<script|<img|evil|mro", card[: card.index("\n---\n")])


def test_hostile_repository_names_are_refused() -> None:
    with pytest.raises(UsageError, match="not a repository id"):
        render_card(make_report(), repo_id='me/x") # <script>')


@pytest.mark.parametrize(
    ("id_", "name"),
    [
        ("Intel/bert-base", "bert-base-int8"),
        ("./out", "out-int8"),
        ("/a/b c--d..e", "b-c-d-e-int8"),
        ("..", "model-int8"),
        ("x/" + "y" * 200, "y" * 90 + "-int8"),
    ],
)
def test_default_name_can_be_a_repository(id_: str, name: str) -> None:
    report = make_report(checkpoint=CheckpointInfo(id_, "sha256:0"))
    assert model_name(report) == name
    render_card(report, repo_id=f"me/{name}")


def test_template_is_found_in_a_checkout_and_in_a_wheel(tmp_path: Path) -> None:
    template = resource(TEMPLATE)
    installed = tmp_path / "hfq" / TEMPLATE
    shutil.copytree(Path(resources.__file__).parents[1], tmp_path / "hfq", ignore=shutil.ignore_patterns("__pycache__"))
    installed.parent.mkdir()
    shutil.copy(template, installed)
    code = f"from hfq.common.resources import resource; print(resource({TEMPLATE!r}))"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert found.decode().strip() == str(installed)
    with pytest.raises(HfqError, match="missing from this installation"):
        resource("model_cards/none")


def test_card_modules_do_not_import_torch() -> None:
    code = "import sys, hfq.report.card, hfq.publish; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hub_accepts_the_card(hub: Any) -> None:
    report = make_report()
    validate_card(render_card(report, repo_id="me/x"))
    tuned_on = replace(report, dataset=replace(report.dataset, holdout_split=None))
    validate_card(render_card(tuned_on, repo_id="me/x", plots={"accuracy_speed": "plots/accuracy_speed.png"}))
    local = make_report(
        checkpoint=CheckpointInfo("./ckpt", "sha256:0"), dataset=replace(make_report().dataset, revision=None)
    )
    validate_card(render_card(local, repo_id=None))
    for text in HOSTILE:
        validate_card(render_card(report_saying(text), repo_id=None))


def test_broken_metadata_is_named(hub: Any) -> None:
    for broken in (
        "---\n- a\n- b\n---\n",
        "---\na: [\n---\n",
        "---\nlicense: [1, {}]\nmodel-index: 3\n---\n",
    ):
        with pytest.raises(HubError, match=r"README\.md is not valid"):
            validate_card(broken)


def _tokens(card: str) -> list[Token]:
    """The body as a Markdown reader takes it, without the text itself."""
    document = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    flat = [token for block in document for token in (block.children or [block])]
    return [token for token in flat if token.type not in ("text", "text_special", "html_inline", "code_inline")]


def _table(card: str, corner: str) -> list[list[str]]:
    """The rows of the table whose first heading is `corner`."""
    lines = card[card.index(f"| {corner} |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not set("".join(row)) <= set("-:")]
