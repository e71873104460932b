"""What of a checkpoint's folder is copied and published, what its card keeps of the source's, and what is said of the rest."""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.command import CHECKPOINT, Done, copy_checkpoint, forkserver, write_slice
from support.factories import make_folder, make_report

from hfq.common.errors import SourceError, UnsupportedError
from hfq.common.names import EXPORT
from hfq.hub.local import LocalHub
from hfq.output import finish, work_folder
from hfq.publish import push_folder
from hfq.report.card import render_card
from hfq.report.report import Report
from hfq.source.checkpoint import CheckpointInfo, pull
from hfq.source.contents import Contents, list_contents
from hfq.source.metadata import read_card
from hfq.tasks.registry import make_task

# What lies in the folder of somebody who trained a model there, and is nobody else's business.
PRIVATE = {
    "trainer_state.json": '{"best_model_checkpoint": "/home/anna/runs"}',
    "all_results.json": "{}",
    "predictions.json": '["Dear Mr Smith"]',
    "notes.txt": "ask Smith",
    "customers.model.csv": "Smith",
    "customers.model": "Smith",
    "events.out.tfevents.1": "x",
    "training_args.bin": "x",
    "optimizer.pt": "x",
    ".env": "PASSWORD=x",
    "run.log": "x",
    "train.py": "x",
    "license_keys.txt": "x",
    "runs/host-anna/events.json": "{}",
    "checkpoint-500/config.json": "{}",
    "1_Pooling/notes.txt": "x",
}
LEFT = {name for name in PRIVATE if "/" not in name} | {"runs/", "checkpoint-500/", "1_Pooling/notes.txt"}
# What loaders read, and what says who may do what.
READ = {
    "LICENSE": "Take it.",
    "notice.md": "By Anna.",
    "docs/terms.txt": "And give it.",
    "vocab.txt": "[PAD]\n",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ messages }}",
    "modules.json": json.dumps([{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]),
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"word_embedding_dimension": 8}',
}
# Where the model was trained, as transformers 4 wrote it into configs.
PLACES = {
    "config.json": {"_name_or_path": "/home/anna/runs/3", "text_config": {"name_or_path": "../anna"}},
    "tokenizer_config.json": {"name_or_path": "./anna", "special_tokens_map_file": "C:\\Users\\anna\\map.json"},
}
CARD = """---
license: [CC-BY-NC-ND-4.0, mit]
license_name: as-you-like
license_link: docs/terms.txt
language: [no, zh-CN, PT_br, EN]
extra_gated_prompt: |
  You agree to be kind.

  Always.
extra_gated_fields:
  Yes: checkbox
  Since: 2024-01-01
inference: false
library_name: sentence-transformers
tags: [not-for-all-audiences, mine]
---
# Mine
"""


def write_all(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def hidden_at_v(line: str) -> set[str]:
    found = re.search(r"\((.*)\)$", line)
    assert found
    return set(found[1].split(", "))


def said(done: Done, where: str) -> str:
    """The one line that says what was left behind."""
    (line,) = (line for line in done.err.splitlines() if f"not {where}, as no loader" in line)
    return line


@dataclass(frozen=True)
class Published:
    cwd: Path
    to: str
    done: Done

    @property
    def out(self) -> Path:
        return self.cwd / "out"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A folder of everything, by `hfq quantize --push -v`."""
    cwd = tmp_path_factory.mktemp("contents")
    model = write_all(copy_checkpoint(cwd / "model"), {**PRIVATE, **READ, "README.md": CARD})
    for name, found in PLACES.items():
        (model / name).write_text(json.dumps({**json.loads((model / name).read_text()), **found}))
    write_slice(cwd / "data", train=60, validation=40)
    to = f"hfq-user/contents-{secrets.token_hex(4)}"
    flags = ["--dataset", "./data", "--approach", "dynamic", "--output", "out", "--push", "--to", to, "-v"]
    done = forkserver().hfq("quantize", "./model", *flags, cwd=cwd)
    assert done.code == 0, done.err
    return Published(cwd, to, done)


def test_what_loaders_read_and_licences_are_exported_and_nothing_else(published: Published, hub: LocalHub) -> None:
    own = {"README.md", "config.json", "hfq.json", "model.safetensors", "plots/accuracy_speed.png"}
    own |= {"plots/layer_sensitivity.png"} & names(published.out)
    expected = own | set(READ) | {"tokenizer.json", "tokenizer_config.json"}
    assert names(published.out) == expected
    assert set(hub.files(published.to)) == expected | {".gitattributes"}
    assert all((published.out / name).read_text() == text for name, text in READ.items())


@pytest.mark.parametrize("name", PLACES)
def test_configs_do_not_say_where_a_model_was_trained(name: str, published: Published) -> None:
    exported = (published.out / name).read_text()
    assert "anna" not in exported
    assert json.loads((CHECKPOINT / name).read_text()).items() <= json.loads(exported).items()


def test_what_is_left_behind_is_said_once_by_name(published: Published) -> None:
    assert hidden_at_v(said(published.done, "exported")) == LEFT
    assert "not published" not in published.done.err  # nothing of it came so far


def test_the_card_keeps_who_may_do_what(published: Published) -> None:
    data = yaml.safe_load((published.out / "README.md").read_text().split("---\n")[1])
    assert data["license"] == ["cc-by-nc-nd-4.0", "mit"]
    assert (data["license_name"], data["license_link"]) == ("as-you-like", "docs/terms.txt")
    assert data["language"] == ["no", "zh", "pt", "en"]
    assert data["language_bcp47"] == ["zh-CN", "pt-BR"]
    assert data["extra_gated_prompt"] == "You agree to be kind.\n\nAlways.\n"
    assert data["extra_gated_fields"] == {"Yes": "checkbox", "Since": "2024-01-01"}
    assert data["inference"] is False
    assert data["library_name"] == "sentence-transformers"
    assert "not-for-all-audiences" in data["tags"] and "mine" not in data["tags"]


def test_the_text_of_the_card_names_licence_and_files(published: Published) -> None:
    text = (published.out / "README.md").read_text().split("## Licence")[1]
    assert "`CC-BY-NC-ND-4.0`, `mit`, `as-you-like`, [its text](docs/terms.txt)." in text
    assert "[LICENSE](LICENSE)" in text and "[notice.md](notice.md)" in text


def test_a_licence_that_forbids_derivatives_is_warned_of_before_the_work(published: Published) -> None:
    lines = published.done.err.splitlines()
    (warning,) = (at for at, line in enumerate(lines) if "forbids derived works" in line)
    assert "CC-BY-NC-ND-4.0" in lines[warning]
    assert warning < lines.index("▸ Dataset")
    report = Report.from_json((published.out / "hfq.json").read_text())
    assert any("forbids derived works" in warning for warning in report.warnings)


def test_what_was_put_into_an_export_is_not_published(published: Published, hub: LocalHub) -> None:
    before = hub.files(published.to)
    write_all(published.out, {**PRIVATE, "tokenizer_config.json": "{}"})
    try:
        done = forkserver().hfq("push", "out", "--to", published.to, "--create-pr", cwd=published.cwd)
        assert done.code == 0, done.err
        assert "(-v names them)" in said(done, "published")
        proposed = hub.files(published.to, "refs/pr/1")
        assert set(proposed) == set(before)
        assert proposed["tokenizer_config.json"] == b"{}"
        done = forkserver().hfq("push", "out", "--to", published.to, "--verbose", cwd=published.cwd)
        assert hidden_at_v(said(done, "published")) == LEFT
        assert set(hub.files(published.to)) == set(before)
    finally:
        for name in PRIVATE:
            (published.out / name).unlink()


def test_a_new_run_leaves_what_somebody_put_into_the_output_folder(tmp_path: Path) -> None:
    output = write_all(make_folder(tmp_path / "out"), {**PRIVATE, "vocab.txt": "of the earlier model"})
    with work_folder(output) as work:
        make_folder(work / EXPORT, weights=b"new")
        finish(output, work)
    assert (output / "model.safetensors").read_bytes() == b"new"
    assert names(output) == {"README.md", "config.json", "hfq.json", "model.safetensors", *PRIVATE}


# From the Hub


def test_what_belongs_is_pulled_and_no_more(hub: LocalHub, tmp_path: Path) -> None:
    repo = f"hfq-user/trained-{secrets.token_hex(4)}"
    files = {**PRIVATE, **READ, "README.md": CARD, "model.fp16.safetensors": "x", "onnx/model.onnx": "x"}
    sha = hub.commit_folder(repo, write_all(copy_checkpoint(tmp_path / "model"), files))
    hub.reset()
    found = pull(repo)
    fetched = {path.partition(f"/resolve/{sha}/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    demo = {path.name for path in CHECKPOINT.iterdir()}
    assert {name.replace("%2F", "/") for name in fetched} == demo | set(READ) | {"README.md"}
    assert set(found.left) - {"model.fp16.safetensors", "onnx/"} == LEFT
    assert set(list_contents(found.path, found.contents)) >= set(READ)
    assert found.info.terms["license_link"] == "docs/terms.txt"


def test_a_licence_elsewhere_in_the_source_is_linked_there(hub: LocalHub, tmp_path: Path) -> None:
    repo = f"hfq-user/linked-{secrets.token_hex(4)}"
    card = CARD.replace("docs/terms.txt", "terms.json")
    sha = hub.commit_folder(repo, write_all(copy_checkpoint(tmp_path / "m"), {"README.md": card, "terms.json": "{}"}))
    assert pull(repo).info.terms["license_link"] == f"https://huggingface.co/{repo}/blob/{sha}/terms.json"


def test_shards_are_pulled_as_their_index_names_them(hub: LocalHub, tmp_path: Path) -> None:
    model = copy_checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    halves = {f"model-0000{n}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for shard, held in halves.items():
        save_file({name: tensors[name] for name in held}, model / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, held in halves.items() for name in held}}
    write_all(model, {"model.safetensors.index.json": json.dumps(index), "other.safetensors": "x"})
    repo = f"hfq-user/shards-{secrets.token_hex(4)}"
    hub.commit_folder(repo, model)
    found = pull(repo)
    assert {path.name for path in found.weights} == set(halves)
    assert found.left == ("other.safetensors",)


# Which files


def test_every_vocabulary_that_a_tokenizer_of_transformers_reads_belongs() -> None:
    found = set()
    for path in Path(transformers.__file__).parent.rglob("*tokenization*.py"):
        for mapping in re.findall(r"FILES_NAMES?\s*(?::[^=\n]+)?=\s*(\{[^}]*\})", path.read_text()):
            found |= set(re.findall(r""":\s*["']([^"']+)["']""", mapping))
    assert len(found) > 20
    assert {name for name in found if name not in Contents()} == set()


@pytest.mark.parametrize(
    "name", ["LICENCE", "license.md", "COPYING.LESSER", "NOTICE.txt", "LICENSE-APACHE-2.0", "Model_License.pdf"]
)
def test_a_licence_belongs_however_it_is_spelled(name: str) -> None:
    assert name in Contents()


@pytest.mark.parametrize("name", ["license_keys.txt", "notice_to_smith.txt", "../LICENSE", "/LICENSE", ".git/LICENSE"])
def test_what_only_begins_like_a_licence_does_not(name: str) -> None:
    assert name not in Contents()


def test_code_belongs_where_it_was_allowed_with_the_files_that_it_reads(tmp_path: Path) -> None:
    model = copy_checkpoint(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    files = {
        "config.json": json.dumps({**config, "auto_map": {"AutoModel": "own.Own"}}),
        "own.py": "from .parts import x\nTABLE = 'rules.tsv'\nOLD = 'training_args.bin'\n",
        "parts.py": "x = 1",
        "train.py": "x = 2",
        "rules.tsv": "a",
        "training_args.bin": "x",
    }
    write_all(model, files)
    found = pull(str(model), trust_remote_code=True)
    assert set(list_contents(model, found.contents)) >= {"own.py", "parts.py", "rules.tsv"}
    assert found.left == ("train.py", "training_args.bin")


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b", ".ssh", "a\\b"])
def test_modules_elsewhere_are_refused(path: str, tmp_path: Path) -> None:
    model = write_all(copy_checkpoint(tmp_path / "model"), {"modules.json": json.dumps([{"path": path}])})
    with pytest.raises(SourceError, match=r"modules\.json names the folder"):
        pull(str(model))


def test_a_module_that_is_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    write_all(tmp_path / "secret", {"config.json": "{}"})
    model = write_all(copy_checkpoint(tmp_path / "model"), {"modules.json": json.dumps([{"path": "1_Pooling"}])})
    (model / "1_Pooling").symlink_to(tmp_path / "secret")
    found = pull(str(model))
    with pytest.raises(SourceError, match="is a link out of its folder"):
        list_contents(model, found.contents)


# Metadata


@pytest.mark.parametrize(
    ("stated", "codes", "regional"),
    [
        (["no"], ["no"], None),
        (["zh-CN", "zh-Hans"], ["zh"], ["zh-CN", "zh-Hans"]),
        (["PT-br", "pt"], ["pt"], ["pt-BR"]),
        (["EN", "multilingual", "code"], ["en", "multilingual", "code"], None),
        (["English"], None, None),
    ],
)
def test_languages_are_what_the_hub_takes(
    stated: list[str], codes: list[str] | None, regional: list[str] | None, hub: LocalHub
) -> None:
    info = CheckpointInfo("me/bert", "a" * 40, license="other", language=stated)
    card = ModelCard(render_card(make_report(checkpoint=info), repo_id=None))
    card.validate()
    data = card.data.to_dict()
    assert (data.get("language"), data.get("language_bcp47")) == (codes, regional)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("language: no", {"language": "no"}),
        ("language: [no, on, y]", {"language": ["no", "on", "y"]}),
        ("inference: false", {"inference": False}),
        ("extra_gated_fields: {No: 010, Time: 12:30, When: 2024-01-01}", None),
        ("license: 4.10", {"license": "4.10"}),
        ("license_name: [1.0, true, null]", {"license_name": ["1.0", "true", None]}),
    ],
)
def test_metadata_are_read_as_the_hub_reads_them(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"\ufeff---\n{text}\n---\n")
    value = value or {"extra_gated_fields": {"No": "010", "Time": "12:30", "When": "2024-01-01"}}
    assert read_card(path) == value


@pytest.mark.parametrize(
    ("card", "licence", "said"),
    [
        ("license: 4.0", "4.0", ["`4.0`"]),
        ("license: {name: acme, link: 'https://x.org/l'}", "other", ["`name: acme, link: https://x.org/l`"]),
        ("license: [mit, {id: [a, 1.0]}]", ["mit", "other"], ["`mit`", "`id: a / 1.0`"]),
        ("license: other\nlicense_name: [acme, 2.0]", "other", ["`acme`", "`2.0`"]),
        (
            "license_link: [LICENSE, 'https://x.org/(l)']",
            None,
            ["[its text](LICENSE)", "its text: `https://x.org/(l)`"],
        ),
        ("licence: MIT", "mit", ["`MIT`"]),
        ("language: [English, y, 12, {en: x}]", None, ["`English`, `y`, `12`, `en: x`"]),
    ],
)
def test_nothing_that_is_written_of_licence_and_language_is_lost(
    card: str, licence: object, said: list[str], tmp_path: Path
) -> None:
    model = write_all(copy_checkpoint(tmp_path / "model"), {"README.md": f"---\n{card}\n---\n"})
    written = ModelCard(render_card(make_report(checkpoint=pull(str(model)).info), repo_id=None))
    written.validate()
    assert written.data.to_dict().get("license") == licence
    text = written.text.split("## Licence")[1]
    assert [words for words in said if words not in text] == []


@pytest.mark.parametrize("text", ["license: [mit", "- mit", "license: *x"])
def test_metadata_that_cannot_be_read_are_warned_of(text: str, tmp_path: Path) -> None:
    model = write_all(copy_checkpoint(tmp_path / "model"), {"README.md": f"---\n{text}\n---\n"})
    (warning,) = pull(str(model)).warnings
    assert "neither licence nor language is known" in warning


def test_a_damaged_result_does_not_cost_the_licence(tmp_path: Path) -> None:
    card = "---\nlicense: mit\nmodel-index: 5\n---\n"
    found = pull(str(write_all(copy_checkpoint(tmp_path / "model"), {"README.md": card})))
    assert (found.info.license, found.warnings) == ("mit", ())


@pytest.mark.parametrize(
    ("card", "warned"),
    [
        ("license: cc-by-nd-3.0", True),
        ("license: other\nlicense_name: Acme-NoDerivatives", True),
        ("license: {id: cc-by-nd-4.0}", True),
        ("license: other\nlicense_link: https://creativecommons.org/licenses/by-nc-nd/4.0", True),
        ("license: cc-by-nc-sa-4.0", False),
        ("license: bsd-3-clause-clear", False),
        ("license: afl-3.0", False),
    ],
)
def test_a_licence_without_derivatives_is_known(card: str, warned: bool, tmp_path: Path) -> None:
    found = pull(str(write_all(copy_checkpoint(tmp_path / "model"), {"README.md": f"---\n{card}\n---\n"})))
    assert any("forbids derived works" in warning for warning in found.warnings) == warned


def test_a_report_of_an_earlier_version_opens() -> None:
    report = json.loads(make_report().to_json())
    for key in ("terms", "license_files"):
        del report["checkpoint"][key]
    assert Report.from_json(json.dumps(report)).checkpoint.license == "apache-2.0"


# Folders that hold no checkpoint as it is expected


def move(to: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / to).mkdir()
        for path in [path for path in folder.iterdir() if path.is_file() and path.name != "modules.json"]:
            path.rename(folder / to / path.name)

    return change


def sentence_model(folder: Path) -> None:
    modules = [{"path": "0_Transformer", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    write_all(folder, {"modules.json": json.dumps(modules), "1_Pooling/config.json": "{}"})
    move("0_Transformer")(folder)


def rename(to: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / to)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (sentence_model, ("is a sentence-transformers model", "in 0_Transformer/", "and quantize ./model")),
        (move("checkpoint-500"), ("is no checkpoint itself", "checkpoint-500")),
        (rename("model.fp16.safetensors"), ("a variant only (fp16)", "variant='fp16'", "save_pretrained")),
        (rename("model.fp16-00001-of-00001.safetensors"), ("a variant only (fp16)",)),
        (rename("model-00001-of-00001.safetensors"), ("shards of weights, but not model.safetensors.index.json",)),
        (rename("consolidated.safetensors"), ("no weights that transformers looks for, but consolidated.safetensors",)),
    ],
)
@pytest.mark.parametrize("from_hub", [False, True])
def test_a_folder_without_a_checkpoint_at_its_top_says_what_it_is(
    change: Callable[[Path], object], says: tuple[str, ...], from_hub: bool, tmp_path: Path, hub: LocalHub
) -> None:
    model = copy_checkpoint(tmp_path / "model")
    change(model)
    reference = f"hfq-user/odd-{secrets.token_hex(4)}" if from_hub else str(model)
    if from_hub:
        hub.commit_folder(reference, model)
    with pytest.raises(SourceError) as caught:
        pull(reference)
    for text in (*says, reference):
        assert text in str(caught.value)


@pytest.mark.parametrize("architecture", ["BertModel", "BertForNextSentencePrediction", "GPT2LMHeadModel"])
def test_a_task_that_is_not_supported_names_those_that_are_and_fit(architecture: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        make_task({"architectures": [architecture]})
    assert "text-classification" in str(caught.value)
    assert "hfq.quantization.fit" in str(caught.value)


def test_push_folder_keeps_the_code_of_a_model_only_where_it_has_some(tmp_path: Path, hub: LocalHub) -> None:
    folder = make_folder(tmp_path / "out")
    files = {"own.py": "x = 1", "config.json": '{"auto_map": {"AutoModel": "own.Own"}}'}
    options = {"default_name": "x", "token": None, "message": "x"}
    for remote_code in (False, True):
        report = make_report()
        info = CheckpointInfo("me/bert", "a" * 40, remote_code=remote_code, remote_code_allowed=remote_code)
        make_folder(folder, Report(**{**vars(report), "checkpoint": info}))
        pushed = push_folder(write_all(folder, files), repo_id=f"hfq-user/code-{remote_code}".lower(), **options)
        assert pushed.left == (() if remote_code else ("own.py",))
